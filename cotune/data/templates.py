"""Templates: from the columns of a row to prompts and targets.

| template | columns | one example for each |
|---|---|---|
| `prompt_target` | prompt, target | row |
| `prompt_response` | prompt, response | row |
| `prompt_completion` | prompt, completion | row |
| `request` | request, answer | row, in the prompt format of the built-in model |
| `summary` | document, summary | row |
| `highlights` | article, highlights | row |
| `conversation` | story, turns[{question, answer}] | turn, with the story and the conversation so far |
| `conversation_lists` | story, questions, answers: lists as long as each other | turn, in the same way |
| `question` | question, answer (context, options) | row |
| `distractors` | question, correct_answer (support, distractor1 to 3) | row, options in alphabetical order |
| `messages` | messages[{role, content}] | message of the assistant, with the conversation so far |
| `dialogue` | turns[{speaker, text}] | turn but the first, with the dialogue so far |
| `instruction` | instruction, output (input) | row |
| `sentence_pair` | sentence1, sentence2, label | row |
| `label` | text, label | row |
| `text` | text | row: no prompt, all is target |

Without a name, the first template in this order whose columns are all there is taken. `DATASETS` names the public data
sets and the templates of the formats that each comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from cotune.errors import DataError

Row = Mapping[str, object]


@dataclass(frozen=True)
class Example:
    """What a model reads and what it should write after it. The text of both together is the natural text.

    Attributes:
        prompt: what the model reads.
        target: what it should write.
        document: first character in the prompt of an article, story or passage, and the one after its last; it is
            what becomes shorter where the whole is too long. None where there is no such part. Not compared.
    """

    prompt: str
    target: str
    document: tuple[int, int] | None = field(default=None, compare=False)


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


def make_example(prompt: str, target: str, document: tuple[int, int] | None = None) -> Example:
    """An example with a space between prompt and target where neither side has white space.

    Args:
        document: as in `Example`.

    Raises:
        DataError: the target is empty, or a text holds half of a surrogate pair.
    """
    if not target.strip():
        raise DataError("the target is empty, expected text to learn; leave this row out")
    for text in (prompt, target):
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError("the text holds half of a surrogate pair, expected valid Unicode")
    needs_space = prompt and not prompt[-1].isspace() and not target[0].isspace()
    return Example(prompt, f" {target}" if needs_space else target, document)


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


def render_summary_columns(document_column: str, summary_column: str) -> Callable[[Row], list[Example]]:
    """A text and its summary as they stand in two columns; an empty text, as some public rows have, gives nothing."""

    def render(row: Row) -> list[Example]:
        document, summary = text_in(row, document_column), text_in(row, summary_column)
        if not document.strip():
            return []
        before = "Summarize this text.\n\n"
        span = (len(before), len(before) + len(document))
        return [make_example(f"{before}{document}\n\nSummary:", summary, span)]

    return render


def ask(context: str, question: str, options: Iterable[object], answer: str) -> Example:
    """One question about a passage; without a passage or options, the prompt has no such part."""
    prompt = (f"{context}\n\n" if context else "") + f"Question: {question}\n"
    listed = "".join(f"- {option}\n" for option in options)
    prompt += f"Options:\n{listed}" if listed else ""
    return make_example(f"{prompt}Answer:", answer, (0, len(context)) if context else None)


def render_question(row: Row) -> list[Example]:
    options = row.get("options")
    if options is not None and not isinstance(options, list):
        raise DataError(f"column 'options' is {name_type(options)}, expected a list of texts")
    return [ask(optional_text_in(row, "context"), text_in(row, "question"), options or [], text_in(row, "answer"))]


def render_distractors(row: Row) -> list[Example]:
    """SciQ: in alphabetical order, the place of an option says nothing about which one is right."""
    answer = text_in(row, "correct_answer")
    wrong = [optional_text_in(row, f"distractor{number}") for number in (1, 2, 3)]
    options = sorted({answer, *filter(None, wrong)}) if any(wrong) else []
    return [ask(optional_text_in(row, "support"), text_in(row, "question"), options, answer)]


def converse(story: str, turns: Iterable[tuple[str, str]]) -> list[Example]:
    """One example for each turn: the story and all earlier questions and answers are in its prompt."""
    prompt = f"{story}\n\n"
    examples = []
    for question, answer in turns:
        prompt += f"Question: {question}\nAnswer:"
        example = make_example(prompt, answer, (0, len(story)))
        examples.append(example)
        prompt += f"{example.target}\n"
    return examples


def render_conversation(row: Row) -> list[Example]:
    turns = [(text_in(turn, "question"), text_in(turn, "answer")) for turn in list_in(row, "turns")]
    return converse(text_in(row, "story"), turns)


def render_conversation_lists(row: Row) -> list[Example]:
    """CoQA; turns without an answer, and those that its makers marked as bad, are left out."""
    questions, answers = turns_in(row, "questions"), turns_in(row, "answers")
    if len(questions) != len(answers):
        raise DataError(f"there are {len(questions)} questions and {len(answers)} answers, expected as many of both")
    turns = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
        ids = question.get("turn_id", number), answer.get("turn_id", number)
        if ids[0] != ids[1]:
            raise DataError(f"question {number} has turn_id {ids[0]} and its answer {ids[1]}, expected the same")
        is_bad = "true" in (question.get("bad_turn"), answer.get("bad_turn"))
        text = text_in(answer, "input_text")
        if text.strip() and not is_bad:
            turns.append((text_in(question, "input_text"), text))
    return converse(text_in(row, "story"), turns)


def turns_in(row: Row, column: str) -> list[Row]:
    """A list of objects with `input_text`, as in CoQA's own file; on the Hub it is texts, or an object of lists."""
    value = row.get(column)
    if isinstance(value, Mapping):
        value = value.get("input_text")
    if not isinstance(value, list) or not all(isinstance(each, str | Mapping) for each in value):
        came = name_type(row.get(column))
        raise DataError(f"column '{column}' is {came}, expected texts, objects with 'input_text', or lists under it")
    return [{"input_text": each} if isinstance(each, str) else each for each in value]


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
        Template(name="summary", columns=("document", "summary"), render=render_summary_columns("document", "summary")),
        Template(
            name="highlights", columns=("article", "highlights"), render=render_summary_columns("article", "highlights")
        ),
        Template(name="conversation", columns=("story", "turns"), render=render_conversation),
        Template(
            name="conversation_lists", columns=("story", "questions", "answers"), render=render_conversation_lists
        ),
        Template(name="question", columns=("question", "answer"), render=render_question),
        Template(name="distractors", columns=("question", "correct_answer"), render=render_distractors),
        Template(name="messages", columns=("messages",), render=render_messages),
        Template(name="dialogue", columns=("turns",), render=render_dialogue),
        Template(name="instruction", columns=("instruction", "output"), render=render_instruction),
        Template(name="sentence_pair", columns=("sentence1", "sentence2", "label"), render=render_sentence_pair),
        Template(name="label", columns=("text", "label"), render=render_label),
        Template(name="text", columns=("text",), render=render_text),
    )
}


# Of a template, the column that a question may lack.
ANSWER_COLUMNS = frozenset(["target", "response", "completion", "answer", "summary", "highlights", "output", "label"])

# The public data sets, and the templates of the formats that each of them comes in.
DATASETS: dict[str, tuple[str, ...]] = {
    "xsum": ("summary",),
    "cnn_dailymail": ("highlights", "summary"),
    "coqa": ("conversation_lists", "conversation"),
    "mctest": ("conversation",),
    "sciq": ("distractors", "question"),
}


def choose_template(name: str | None, columns: Iterable[str]) -> Template:
    """The template of that name, or the first one that fits the columns.

    Args:
        name: a key of `TEMPLATES` or of `DATASETS`; None takes any template.
        columns: those of a row.

    Raises:
        DataError: no such template, or none fits; lists what was found and what is accepted.
    """
    found = frozenset(columns)
    if name in TEMPLATES:
        missing = [column for column in TEMPLATES[name].columns if column not in found]
        if missing:
            raise DataError(
                f"template '{name}' needs column {quote_names(missing)}, but the columns are {quote_names(found)}"
            )
        return TEMPLATES[name]
    if name is not None and name not in DATASETS:
        raise DataError(
            f"template is '{name}', expected one of {quote_names(TEMPLATES)}, or a data set: {quote_names(DATASETS)}"
        )
    candidates = TEMPLATES if name is None else DATASETS[name]
    for candidate in candidates:
        if found.issuperset(TEMPLATES[candidate].columns):
            return TEMPLATES[candidate]
    accepted = "; ".join(" + ".join(TEMPLATES[candidate].columns) for candidate in candidates)
    if name is not None:
        raise DataError(f"data set '{name}' has columns {accepted}, but the columns are {quote_names(found)}")
    raise DataError(f"no template fits the columns {quote_names(found)}; accepted are: {accepted}")


def choose_question_template(name: str | None, columns: Iterable[str]) -> Template:
    """As `choose_template`, of those that have a column for the answer, which need not be there.

    Raises:
        DataError: no such template, or none fits; lists what was found and what is accepted.

    Example:
        >>> choose_question_template(None, ["request"]).name
        'request'
    """
    found = frozenset(columns)
    if name is not None and name not in TEMPLATES and name not in DATASETS:
        return choose_template(name, found)
    names = (name,) if name in TEMPLATES else TEMPLATES if name is None else DATASETS[name]
    needed = {one: [column for column in TEMPLATES[one].columns if column not in ANSWER_COLUMNS] for one in names}
    candidates = [one for one in names if len(needed[one]) < len(TEMPLATES[one].columns)]
    for candidate in candidates:
        if found.issuperset(needed[candidate]):
            return TEMPLATES[candidate]
    accepted = "; ".join(dict.fromkeys(" + ".join(needed[one]) for one in candidates)) or "none of this template"
    raise DataError(f"no question is in the columns {quote_names(found)}; accepted are: {accepted}")
