"""Templates: from the columns of a row to prompts and targets.

| template | columns | one example for each |
|---|---|---|
| `prompt_target` | prompt, target | row |
| `prompt_response` | prompt, response | row |
| `prompt_completion` | prompt, completion | row |
| `request` | request, answer | row, in the prompt format of the built-in model |
| `summary` | document, summary | row |
| `conversation` | story, turns[{question, answer}] | turn, with the conversation so far |
| `question` | question, answer (context, options) | row |
| `messages` | messages[{role, content}] | message of the assistant, with the conversation so far |
| `dialogue` | turns[{speaker, text}] | turn but the first, with the dialogue so far |
| `instruction` | instruction, output (input) | row |
| `sentence_pair` | sentence1, sentence2, label | row |
| `label` | text, label | row |
| `text` | text | row: no prompt, all is target |

Without a name, the first template in this order whose columns are all there is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cotune.errors import DataError

Row = Mapping[str, object]


@dataclass(frozen=True)
class Example:
    """What a model reads and what it should write after it. The text of both together is the natural text."""

    prompt: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Template:
    """How rows with certain columns become examples.

    Attributes:
        name: key in `TEMPLATES`.
        columns: columns that a row must have.
        render: the examples of one row; raises `DataError` where a value has the wrong type or a target is empty.
    """

    name: str
    columns: tuple[str, ...]
    render: Callable[[Row], list[Example]]


def format_request(request: str) -> str:
    """The prompt of the built-in model for one request; the answer follows after a space.

    Example:
        >>> format_request("Hello!")
        'User: Hello!\\nAssistant:'
    """
    return f"User: {request}\nAssistant:"


def format_answer(answer: str) -> str:
    """The target that follows `format_request`."""
    return f" {answer}"


def common_prompt_format(examples: Iterable[Example]) -> str:
    """How the prompts of these examples are built around a bare request, with {prompt} in its place.

    Example:
        >>> common_prompt_format([Example(format_request("Hello!"), " Hi.")])
        'User: {prompt}\\nAssistant:'
    """
    start, end = format_request("\0").split("\0")
    is_request = all(each.prompt.startswith(start) and each.prompt.endswith(end) for each in examples)
    return f"{start}{{prompt}}{end}" if is_request else "{prompt}"


def make_example(prompt: str, target: str) -> Example:
    """An example with a space between prompt and target where neither side has white space.

    Raises:
        DataError: the target is empty, or a text holds half of a surrogate pair.
    """
    if not target.strip():
        raise DataError("the target is empty, expected text to learn; leave this row out")
    for text in (prompt, target):
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError("the text holds half of a surrogate pair, expected valid Unicode")
    needs_space = prompt and not prompt[-1].isspace() and not target[0].isspace()
    return Example(prompt, f" {target}" if needs_space else target)


def text_in(row: Row, column: str) -> str:
    """The text of a column; whole numbers and fractions count as text, a missing or null one does not."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if column not in row:
        raise DataError(f"column '{column}' is missing; found {quote_names(row)}")
    raise DataError(f"column '{column}' is {name_type(value)}, expected text")


def optional_text_in(row: Row, column: str) -> str:
    """The text of a column, or nothing where it is missing or null."""
    return "" if row.get(column) is None else text_in(row, column)


def list_in(row: Row, column: str) -> list[Row]:
    """A column that holds a list of objects, such as `turns`."""
    value = row.get(column)
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise DataError(f"column '{column}' is {name_type(value)}, expected a list of objects")
    return value


def name_type(value: object) -> str:
    """The type of a value in the words of JSON."""
    if isinstance(value, list):
        kinds = sorted({name_type(each) for each in value})
        return f"a list of {' and '.join(kinds)}" if kinds else "an empty list"
    names = {
        "NoneType": "null",
        "bool": "true or false",
        "int": "a number",
        "float": "a number",
        "str": "text",
        "dict": "an object",
    }
    kind = type(value).__name__
    return names.get(kind, f"a value of type {kind}")


def quote_names(names: Iterable[str]) -> str:
    """Column names for a message."""
    return ", ".join(f"'{name}'" for name in sorted(map(str, names))) or "none"


def render_columns(prompt_column: str, target_column: str) -> Callable[[Row], list[Example]]:
    """Prompt and target as they stand in two columns."""
    return lambda row: [make_example(optional_text_in(row, prompt_column), text_in(row, target_column))]


def render_request(row: Row) -> list[Example]:
    return [make_example(format_request(text_in(row, "request")), text_in(row, "answer"))]


def render_summary(row: Row) -> list[Example]:
    prompt = f"Summarize this text.\n\n{text_in(row, 'document')}\n\nSummary:"
    return [make_example(prompt, text_in(row, "summary"))]


def render_question(row: Row) -> list[Example]:
    context = optional_text_in(row, "context")
    prompt = (f"{context}\n\n" if context else "") + f"Question: {text_in(row, 'question')}\n"
    options = row.get("options")
    if options is not None:
        if not isinstance(options, list):
            raise DataError(f"column 'options' is {name_type(options)}, expected a list of texts")
        if options:
            prompt += "Options:\n" + "".join(f"- {option}\n" for option in options)
    return [make_example(f"{prompt}Answer:", text_in(row, "answer"))]


def render_conversation(row: Row) -> list[Example]:
    prompt = f"{text_in(row, 'story')}\n\n"
    examples = []
    for turn in list_in(row, "turns"):
        prompt += f"Question: {text_in(turn, 'question')}\nAnswer:"
        example = make_example(prompt, text_in(turn, "answer"))
        examples.append(example)
        prompt += f"{example.target}\n"
    return examples


def render_messages(row: Row) -> list[Example]:
    prompt = ""
    examples = []
    for message in list_in(row, "messages"):
        role, content = text_in(message, "role"), text_in(message, "content")
        prompt += f"{role.capitalize()}:"
        if role == "assistant":
            examples.append(make_example(prompt, content))
        prompt += f" {content}\n"
    return examples


def render_dialogue(row: Row) -> list[Example]:
    prompt = ""
    examples = []
    for index, turn in enumerate(list_in(row, "turns")):
        text = text_in(turn, "text")
        prompt += f"{text_in(turn, 'speaker')}:"
        if index:
            examples.append(make_example(prompt, text))
        prompt += f" {text}\n"
    return examples


def render_instruction(row: Row) -> list[Example]:
    addition = optional_text_in(row, "input")
    request = text_in(row, "instruction") + (f"\n{addition}" if addition else "")
    return [make_example(format_request(request), text_in(row, "output"))]


def render_sentence_pair(row: Row) -> list[Example]:
    prompt = f"Sentence 1: {text_in(row, 'sentence1')}\nSentence 2: {text_in(row, 'sentence2')}\nLabel:"
    return [make_example(prompt, text_in(row, "label"))]


def render_label(row: Row) -> list[Example]:
    return [make_example(f"Text: {text_in(row, 'text')}\nLabel:", text_in(row, "label"))]


def render_text(row: Row) -> list[Example]:
    return [make_example("", text_in(row, "text"))]


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(name="prompt_target", columns=("prompt", "target"), render=render_columns("prompt", "target")),
        Template(name="prompt_response", columns=("prompt", "response"), render=render_columns("prompt", "response")),
        Template(
            name="prompt_completion", columns=("prompt", "completion"), render=render_columns("prompt", "completion")
        ),
        Template(name="request", columns=("request", "answer"), render=render_request),
        Template(name="summary", columns=("document", "summary"), render=render_summary),
        Template(name="conversation", columns=("story", "turns"), render=render_conversation),
        Template(name="question", columns=("question", "answer"), render=render_question),
        Template(name="messages", columns=("messages",), render=render_messages),
        Template(name="dialogue", columns=("turns",), render=render_dialogue),
        Template(name="instruction", columns=("instruction", "output"), render=render_instruction),
        Template(name="sentence_pair", columns=("sentence1", "sentence2", "label"), render=render_sentence_pair),
        Template(name="label", columns=("text", "label"), render=render_label),
        Template(name="text", columns=("text",), render=render_text),
    )
}


def choose_template(name: str | None, columns: Iterable[str]) -> Template:
    """The template of that name, or the first one that fits the columns.

    Raises:
        DataError: no such template, or none fits; lists what was found and what is accepted.
    """
    found = frozenset(columns)
    if name is not None:
        if name not in TEMPLATES:
            raise DataError(f"template is '{name}', expected one of {quote_names(TEMPLATES)}")
        missing = [column for column in TEMPLATES[name].columns if column not in found]
        if missing:
            raise DataError(
                f"template '{name}' needs column {quote_names(missing)}, but the columns are {quote_names(found)}"
            )
        return TEMPLATES[name]
    for template in TEMPLATES.values():
        if found.issuperset(template.columns):
            return template
    accepted = "; ".join(" + ".join(template.columns) for template in TEMPLATES.values())
    raise DataError(f"no template fits the columns {quote_names(found)}; accepted are: {accepted}")
