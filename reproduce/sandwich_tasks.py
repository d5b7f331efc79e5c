"""The four tasks of the sandwich's studies: requests, answers, what is private, prompts to choose from, and a metric.

| task | data | a request | metric |
|---|---|---|---|
| decomposition | ultratool_planning | a wish and tools, some of no use | mean F1 of the tools and of their order |
| tools | api_bank | a dialogue and descriptions of APIs | the API is right, times the share of its arguments |
| tools | or api_bank_by_script | the same | the same |
| dialogue | dailydialog | a dialogue so far | token F1 of the next turn |
| dialogue | or sgd | a dialogue so far and calls | the call is right, times the share of its slots |
| nlu | sst2, or trec | a text | exact match of the label |

The parts of API-Bank have hardly an API in common: what is trained on was written for its third level. By script are
the dialogues of its first two levels alone, with all variants of one script in one part.

`made` stands in for each where no data is given: requests that cotune makes itself, with names and addresses in them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from cotune.data.api_bank import OWN_WORDS, gold_units, parse_call
from cotune.data.row_readers import read_jsonl
from cotune.errors import InputError
from cotune.evaluation import exact_match, token_f1
from cotune.sandwich.detector_table import RULES, STRICT
from cotune.sandwich.detectors.dictionary import DictionaryEntry
from cotune.sandwich.detectors.unlisted import learn_common_words
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.text_problem import Metric

PARTS = ("train", "validation", "test")
SOURCES: Mapping[str, tuple[str, ...]] = {
    "decomposition": ("ultratool_planning",),
    "tools": ("api_bank", "api_bank_by_script"),
    "dialogue": ("dailydialog", "sgd"),
    "nlu": ("sst2", "trec"),
}
"""The data sets of each task; the first is the usual one."""
TASKS = tuple(SOURCES)
_NUM_TOOLS = 6
_MIN_TEXTS = 5
_SCRIPTED = ("level-1-api", "level-2-api")
_VARIANT = re.compile(r"-\d+\.jsonl#\d+$")
# Of names such as file_write and FindMovies.
_NAME_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[^\W\d_a-zA-Z]+|\d+")
_MOST_NAMED = 12
_WORD_FORM = re.compile(r"[^\W_]+")
# Of the requests' own forms and of API-Bank's transcripts.
_FORM_WORDS = "APIs Tools One of User AI API Request A B"
_SEPARATORS = re.compile(r"\s*(?:,|;|->|\n)\s*")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many examples."""

    num_train: int
    """That have targets."""
    num_unlabelled: int
    """Other requests, without targets: a distillation may ask about them."""
    num_validation: int
    num_test: int
    seed: int
    """Of all draws but the test part's, which is the same for all seeds."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task.

    Attributes:
        name: of it.
        train, validation, test: examples.
        unlabelled: requests whose targets nobody looks at.
        prompts: to choose from; the first is the plain one.
        metric: of final texts, in [0, 1].
        max_tokens, max_new_tokens: of the cloud's and of the edge's answers.
        detectors: that look.
        own_words: the user's dictionary.
        allow_list: strict, words that may stay; empty where all may that no detector finds.
    """

    name: str
    train: tuple[PrivateExample, ...] = field(repr=False)
    validation: tuple[PrivateExample, ...] = field(repr=False)
    test: tuple[PrivateExample, ...] = field(repr=False)
    unlabelled: tuple[str, ...] = field(repr=False)
    prompts: tuple[str, ...]
    metric: Metric
    max_tokens: int
    max_new_tokens: int
    detectors: tuple[str, ...] = RULES
    own_words: tuple[DictionaryEntry, ...] = field(default=(), repr=False)
    allow_list: tuple[str, ...] = field(default=(), repr=False)


def load_task(
    name: str,
    root: Path | None,
    sizes: Sizes,
    *,
    source: str | None = None,
    is_strict: bool = False,
    own_words: Mapping[str, str] | None = None,
) -> Task:
    """A task by name.

    Args:
        name: one of `TASKS`.
        root: folder of data sets; None for requests that cotune makes itself.
        sizes: how many.
        source: the data set, one of the task's `SOURCES`; None for the first.
        is_strict: only words stay that several requests of the training part use, or that are public: in prompts, in
            labels, in descriptions of tools.
        own_words: what the user calls a label, or a part of the names of tools and calls; requests have the public
            one, and the cloud is not told.

    Raises:
        InputError: there is no such task or data set, too few examples, or no such label.
    """
    found = {part: examples_of(name, root, part, source=source) for part in PARTS}
    for number, part in enumerate(PARTS):
        Random(number if part == "test" else f"{sizes.seed}-{part}").shuffle(found[part])
    words: set[str] = set()
    if name == "tools" and root is not None:
        words.update(*(_named_words(row) for part in PARTS for row in _rows(root, _source(name, source), part)))
    _, prompts, metric, max_tokens = _KINDS[_source(name, source if root else None)]
    limits = {"train": sizes.num_train, "validation": sizes.num_validation, "test": sizes.num_test}
    for part, limit in limits.items():
        if len(found[part]) < limit:
            raise InputError(f"{name} has {len(found[part])} examples to {part} with, expected {limit}; ask for fewer")
    allowed: set[str] = set()
    if is_strict:
        public = [_FORM_WORDS, *prompts, *(text for rows in found.values() for each in rows for text in each.public)]
        if name == "nlu":
            public += [each.target for each in found["train"]]
        allowed = {word.casefold() for text in public for word in _WORD_FORM.findall(text)}
        allowed |= set(learn_common_words((each.request for each in found["train"]), min_texts=_MIN_TEXTS))
    if own_words:
        found = _in_own_words(found, own_words)
    rest = found["train"][sizes.num_train : sizes.num_train + sizes.num_unlabelled]
    is_made = root is None
    return Task(
        name=name,
        **{part: tuple(found[part][:limit]) for part, limit in limits.items()},
        unlabelled=tuple(each.request for each in rest),
        prompts=prompts,
        metric=metric,
        max_tokens=max_tokens,
        max_new_tokens=max_tokens,
        detectors=(
            *RULES,
            *(["id"] if name == "tools" and not is_strict else []),
            *(["dictionary"] if words or is_made else []),
            *(STRICT if is_strict else []),
        ),
        allow_list=tuple(sorted(allowed)),
        own_words=tuple(DictionaryEntry((word,), "TERM") for word in sorted(words or _NAMES if is_made else words)),
    )


def examples_of(name: str, root: Path | None, part: str, *, source: str | None = None) -> list[PrivateExample]:
    """All examples of one part of a task, in the order of the data.

    Args:
        name, root, source: as for `load_task`.
        part: one of `PARTS`.

    Raises:
        InputError: there is no such task or data set, or no data.
    """
    if name not in TASKS:
        raise InputError(f"the task is {name!r}, expected one of {', '.join(TASKS)}")
    source = _source(name, source)
    if root is None:
        return made_examples(name, part)
    return list(_KINDS[source][0](_rows(root, source, part), Random(PARTS.index(part))))


def _source(name: str, source: str | None) -> str:
    known = SOURCES[name]
    if source is not None and source not in known:
        raise InputError(f"the data set of {name} is {source!r}, expected one of {', '.join(known)}")
    return source or known[0]


def _rows(root: Path, source: str, part: str) -> list[Mapping[str, Any]]:
    if source == "api_bank_by_script":
        rows = _rows(root, "api_bank", "test")
        return [row for row in rows if row["level"] in _SCRIPTED and _part_of_script(row["id"]) == part]
    folder = root / source
    packed = folder / f"{part}.jsonl.gz"
    path = packed if packed.is_file() else folder / f"{part}.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is not there, expected a data set of the study; see --data-root")
    return [dict(row) for _, row in read_jsonl(path)]


def _part_of_script(name: str) -> str:
    """Half of the scripts to train with, a tenth to choose by, the rest to judge by.

    Example:
        >>> _part_of_script("GetToday-level-2-1.jsonl#0") == _part_of_script("GetToday-level-2-3.jsonl#4")
        True
    """
    script = _VARIANT.sub("", name)
    share = int.from_bytes(hashlib.sha256(script.encode()).digest()[:8]) / 2**64
    return "train" if share < 0.5 else "validation" if share < 0.6 else "test"


def _decompositions(rows: Sequence[Mapping[str, Any]], rng: Random) -> Iterator[PrivateExample]:
    everything = sorted({tool for row in rows for tool in row["tools"]})
    for row in rows:
        wanted = list(dict.fromkeys(row["tools"]))
        others = [tool for tool in rng.sample(everything, min(len(everything), 2 * _NUM_TOOLS)) if tool not in wanted]
        shown = wanted + others[: max(0, _NUM_TOOLS - len(wanted))]
        rng.shuffle(shown)
        yield PrivateExample(f"Tools: {', '.join(shown)}\n{row['instruction']}", ", ".join(row["tools"]))


def _calls(rows: Sequence[Mapping[str, Any]], rng: Random) -> Iterator[PrivateExample]:
    for row in rows:
        name, arguments = parse_call(row["calls"][0])
        if name:
            tools = [
                f"{tool.get('name') or tool.get('apiCode')}"
                f"({', '.join(tool.get('input_parameters') or tool.get('parameters') or {})})"
                for tool in row["tools"]
            ]
            called = f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
            text = f"APIs: {'; '.join(tools)}\n{row['instruction'].strip()}"
            yield PrivateExample(text, called, tuple(gold_units(row)), tuple(tools))


def _named_words(row: Mapping[str, Any]) -> list[str]:
    return [unit for unit, kind in gold_units(row).items() if kind in OWN_WORDS]


def _turns(rows: Sequence[Mapping[str, Any]], rng: Random) -> Iterator[PrivateExample]:
    for row in rows:
        turns = [f"{turn['speaker']}: {turn['text']}" for turn in row["turns"]]
        if len(turns) > 1:
            cut = rng.randrange(1, len(turns))
            if row["turns"][cut]["text"].strip():
                speaker = row["turns"][cut]["speaker"]
                yield PrivateExample("\n".join([*turns[:cut], f"{speaker}:"]), row["turns"][cut]["text"])


def _service_calls(rows: Sequence[Mapping[str, Any]], rng: Random) -> Iterator[PrivateExample]:
    methods: dict[str, set[str]] = {}
    for row in rows:
        for turn in row["turns"]:
            if "call" in turn:
                methods.setdefault(turn["call"]["service"], set()).add(turn["call"]["method"])
    for row in rows:
        turns = [f"{turn['speaker'].capitalize()}: {turn['text']}" for turn in row["turns"]]
        places = [place for place, turn in enumerate(row["turns"]) if "call" in turn]
        if places:
            # One of a dialogue, so that no two examples share turns.
            place = rng.choice(places)
            call = row["turns"][place]["call"]
            calls = sorted({method for service in row["services"] for method in methods.get(service, ())})
            request = "\n".join([f"Calls: {', '.join(calls)}", *turns[:place]])
            values = ", ".join(f"{slot}={value!r}" for slot, value in call["parameters"].items())
            yield PrivateExample(request, f"{call['method']}({values})")


def _labels(rows: Sequence[Mapping[str, Any]], rng: Random) -> Iterator[PrivateExample]:
    labels = ", ".join(sorted({row["label"] for row in rows}))
    for row in rows:
        yield PrivateExample(f"{row['text']}\nOne of: {labels}", row["label"])


def _in_own_words(
    found: Mapping[str, list[PrivateExample]], own_words: Mapping[str, str]
) -> dict[str, list[PrivateExample]]:
    known = {word for rows in found.values() for each in rows for word in _NAME_PART.findall(each.target)}
    for word in own_words:
        if word not in known:
            told = ", ".join(sorted(known)[:_MOST_NAMED])
            raise InputError(f"own words rename {word!r:.40}, which no answer has, expected one of {told}; correct it")

    def renamed(text: str) -> str:
        return _NAME_PART.sub(lambda name: own_words.get(name[0], name[0]), text)

    return {part: [replace(each, target=renamed(each.target)) for each in rows] for part, rows in found.items()}


def tool_graph_f1(text: str, references: Sequence[str]) -> float:
    """Mean of the F1 of the tools and the F1 of their neighbours in order, as TaskBench counts nodes and edges.

    Example:
        >>> tool_graph_f1("a, c", ["a, b, c"])
        0.4
    """
    (reference,) = references
    ours, theirs = _names(text), _names(reference)
    nodes = _f1(set(ours), set(theirs))
    if len(theirs) < 2:
        return nodes
    return (nodes + _f1(set(pairwise(ours)), set(pairwise(theirs)))) / 2


def call_score(text: str, references: Sequence[str]) -> float:
    """1 for the right API, times the share of arguments that are there with the same value, of all that either names.

    Example:
        >>> call_score("Find(name='ann lee', age=8)", ["Find(name='Ann Lee', age='7')"])
        0.5
    """
    (reference,) = references
    (name, ours), (wanted, theirs) = parse_call(text), parse_call(reference)
    if name != wanted:
        return 0.0
    fields = ours.keys() | theirs.keys()
    same = sum(key in ours and key in theirs and ours[key].casefold() == theirs[key].casefold() for key in fields)
    return same / len(fields) if fields else 1.0


def _names(text: str) -> list[str]:
    return [name for name in (each.strip(" .`\"'") for each in _SEPARATORS.split(text.strip())) if name]


def _f1(ours: set[Any], theirs: set[Any]) -> float:
    return 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours or theirs else 1.0


_Maker = Callable[[Sequence[Mapping[str, Any]], Random], Iterator[PrivateExample]]
_Kind = tuple[_Maker, tuple[str, ...], Metric, int]
_CLASSES: _Kind = (
    _labels,
    (
        "Classify the text.",
        "Answer with one of the labels and nothing else.",
        "Which label fits best? Write it in lower case.",
        "Read the text, think of what it is about, and write one label.",
    ),
    exact_match,
    8,
)
_API_CALLS: _Kind = (
    _calls,
    (
        "Write the API call that comes next.",
        "Answer with one call such as Name(key='value') and nothing else. Copy values as they stand.",
        "Choose the API that does what the user wants, and fill in its arguments from the dialogue: Name(key='value').",
        "Write one line: the API's name, then its arguments in brackets. Keep words in angle brackets as they are.",
    ),
    call_score,
    64,
)
_KINDS: Mapping[str, _Kind] = {
    "ultratool_planning": (
        _decompositions,
        (
            "List the tools that are needed, in order, with commas.",
            "Which of the tools are called, one after the other? Answer with their names and commas alone.",
            "Break the wish into steps. Write the name of one tool for each step, with commas between them.",
            "Answer like this: first_tool, second_tool. Leave out tools that are not needed.",
        ),
        tool_graph_f1,
        32,
    ),
    "api_bank": _API_CALLS,
    "api_bank_by_script": _API_CALLS,
    "dailydialog": (
        _turns,
        (
            "Write the next turn of the dialogue.",
            "Answer as the person whose turn it is, in one short sentence.",
            "Go on with the dialogue politely and to the point; one turn, without the speaker's letter.",
            "What would somebody say next in daily life? Write that alone.",
        ),
        token_f1,
        32,
    ),
    "sgd": (
        _service_calls,
        (
            "Write the call that comes next.",
            "Answer with one call such as Name(slot='value') and nothing else.",
            "Choose the call that does what the user wants, and fill in its slots from the dialogue: "
            "Name(slot='value').",
            "Write one line: the name of the call, then its slots in brackets, as the dialogue tells them.",
        ),
        call_score,
        96,
    ),
    "sst2": _CLASSES,
    "trec": _CLASSES,
}

_NAMES = ("Ann Lee", "Bob Roe", "Eva Kim", "Tom Day")
_WORDS = ("lamp", "river", "coat", "garden", "letter", "train")
_MADE = 120


def made_examples(name: str, part: str) -> list[PrivateExample]:
    """Requests of a task that cotune makes itself, each with a name and an address; no request is in two parts.

    Example:
        >>> made_examples("nlu", "test")[0].private
        ('Ann Lee', 'ann0@test.example.org')
    """
    return [_made(name, part, number) for number in range(_MADE)]


def _made(name: str, part: str, number: int) -> PrivateExample:
    who, thing = _NAMES[number % len(_NAMES)], _WORDS[number % len(_WORDS)]
    mail = f"{who.split()[0].casefold()}{number}@{part}.example.org"
    asks = f"{who} ({mail}) writes: item {number}, a {thing}."
    target = {
        "decomposition": f"find_{thing}, send_mail",
        "tools": f"Send(address='{mail}', item='{thing}')",
        "dialogue": f"Thank you, {who}, for the {thing}.",
        "nlu": thing,
    }[name]
    return PrivateExample(asks, target, (who, mail))
