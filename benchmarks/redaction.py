"""What redaction finds and what it takes by mistake, and its time per kilobyte.

    python benchmarks/redaction.py --data FOLDER

Three ways to look, since no public set here marks private spans:

- `planted`: made-up values of each kind, in several ways to write them, put into sentences of real text. What was
  planted is known to the character, so recall and precision are exact; the values are ours, so it says what the rules
  do, not how people write.
- `api_bank`: the arguments of API-Bank's calls that tell about a person are gold units where they stand in the request.
  A unit leaks if it stands in the text that is sent, in any case. With the rules alone, with a dictionary of the names
  and addresses, which a user would have, with the detector of identifiers too, and strict: only words stay that
  DailyDialog and Alpaca use in small letters, or that the descriptions of the tools are made of.
  What it costs, without a model: `copyable`, the share of all arguments of the calls that stand in the request and that
  a cloud which copies words can still give (no placeholder covers a part of one and something beside it), and
  `over_redaction`, the share of the words outside of units that are missing.
- `plain`: texts with nothing private by intention (old books, sums in words); each finding there is a mistake.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from measurement import Spread, describe_machine, finish, make_parser

from cotune.data.api_bank import OWN_WORDS, fold, gold_units, parse_call, stands_in
from cotune.data.row_readers import read_jsonl
from cotune.sandwich.detect import HereFinder
from cotune.sandwich.detector_table import RULES, STRICT, DetectorSettings, build_detector
from cotune.sandwich.detectors.dictionary import DictionaryEntry
from cotune.sandwich.detectors.unlisted import learn_common_words
from cotune.sandwich.leak import over_redaction
from cotune.sandwich.redact import Redacted, Redactor
from cotune.sandwich.surrogates import SURROGATES

_FORMS = {
    "EMAIL": "ann.lee@mail.example.org",
    "PHONE": "+49 30 901820",
    "IBAN": "DE89 3704 0044 0532 0130 00",
    "CARD": "4111 1111 1111 1111",
    "IP": "10.1.2.3",
    "URL": "https://example.org/a/b",
}
_MARKS = frozenset({"user", "ai", "api", "request", "generate"})
_US_PHONE = "(415) 555-2671"


def planted_values(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Kind, way of writing, value: without end, each kind and way in turn."""
    disguises = {
        "plain": lambda value: value,
        "upper case": str.upper,
        "full width": lambda value: "".join(chr(ord(c) + 0xFEE0) if c.isdigit() or c in "@." else c for c in value),
        "zero width": lambda value: value[:3] + "\u200b" + value[3:],
        "other dashes": lambda value: value.replace(" ", "\u2011"),
    }
    while True:
        for kind, form in _FORMS.items():
            for way, disguise in disguises.items():
                if (kind == "URL" and way in ("full width", "zero width")) or (
                    way == "other dashes" and " " not in form
                ):
                    continue
                source = _US_PHONE if kind == "PHONE" and rng.random() < 0.5 else form
                yield kind, way, disguise(SURROGATES[kind](source, rng))
        name = f"{rng.choice(['ann', 'bob', 'eva'])}.{rng.choice(['lee', 'kim', 'roe'])}"
        yield "EMAIL", "at and dot", f"{name} [at] example [dot] org"
        yield "KEY", "plain", "sk-" + "".join(rng.choice("abcdefghijkABCDEFGHIJK0123456789") for _ in range(32))
        yield "KEY", "no prefix", "".join(rng.choice("abcdefghijkmnpqrstABCDEFGHJKLMNPQRST23456789") for _ in range(32))


def measure_planted(texts: Sequence[str], redactor: Redactor, rng: random.Random) -> list[dict[str, Any]]:
    """Recall of each kind and way, and precision over all: what was replaced and touches nothing that was planted."""
    planted, found = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    num_replaced, num_right = 0, 0
    values = planted_values(rng)
    for text in texts:
        kind, way, value = next(values)
        words = text.split(" ")
        place = rng.randrange(len(words) + 1)
        before = " ".join(words[:place]) + " "
        mixed = before + value + " " + " ".join(words[place:])
        start, end = len(before), len(before) + len(value)
        redacted = redactor.request(rng).redact(mixed)
        covered = {at for each in redacted.replacements for at in range(each.start, each.end)}
        needed = [at for at in range(start, end) if mixed[at].isalnum()]
        planted[kind, way] += 1
        found[kind, way] += covered.issuperset(needed)
        num_replaced += len(redacted.replacements)
        num_right += sum(each.start < end and each.end > start for each in redacted.replacements)
    rows: list[dict[str, Any]] = [
        {"kind": kind, "written": way, "planted": number, "recall": found[kind, way] / number}
        for (kind, way), number in sorted(planted.items())
    ]
    return [*rows, {"kind": "all", "written": "all", "planted": len(texts),
                    "recall": found.total() / len(texts), "precision": num_right / num_replaced}]  # fmt: skip


def measure_api_bank(
    rows: Sequence[Mapping[str, Any]],
    *,
    with_dictionary: bool,
    with_ids: bool,
    allow_list: Sequence[str] = (),
    with_quoted: bool = False,
) -> dict[str, Any]:
    """Share of units that leak, by what they are; share of requests with a leak; what was replaced besides."""
    units, leaked, arguments = Counter[str](), Counter[str](), Counter[bool]()
    num_requests = num_with_leak = num_replaced = num_right = 0
    beside = 0.0
    for row in rows:
        gold = gold_units(row)
        if not gold:
            continue
        own = tuple(DictionaryEntry((unit,), "TERM") for unit, kind in gold.items() if kind in OWN_WORDS)
        names = [*RULES, *(["dictionary"] if with_dictionary and own else []), *(["id"] if with_ids else [])]
        names += [*(["quoted"] if with_quoted else []), *(STRICT if allow_list else [])]
        settings = DetectorSettings(
            detectors=tuple(names),
            dictionary=own if "dictionary" in names else (),
            allow_list=(*allow_list, *words_of_tools(row)) if allow_list else (),
        )
        finder = HereFinder({name: build_detector(name, settings) for name in settings.names})
        redacted = Redactor(finder=finder).request(random.Random(0)).redact(row["instruction"])
        sent = fold(redacted.text)
        left = [kind for unit, kind in gold.items() if stands_in(unit, sent)]
        units.update(gold.values())
        leaked.update(left)
        arguments.update(copyable_arguments(row, redacted))
        beside += over_redaction(row["instruction"], list(gold), redacted.text)
        num_requests += 1
        num_with_leak += bool(left)
        num_replaced += len(redacted.replacements)
        num_right += sum(
            _touches_gold(row["instruction"], redacted, index, gold) for index in range(len(redacted.replacements))
        )
    return {
        "dictionary": with_dictionary,
        "ids": with_ids,
        "quoted": with_quoted,
        "strict": bool(allow_list),
        "requests": num_requests,
        "units": units.total(),
        "leaked": leaked.total(),
        "leak_rate": leaked.total() / units.total(),
        "any_leak": num_with_leak / num_requests,
        "leak_rate_by_kind": {kind: leaked[kind] / number for kind, number in sorted(units.items())},
        "units_by_kind": dict(sorted(units.items())),
        "replaced": num_replaced,
        "replaced_of_gold": num_right / max(1, num_replaced),
        "copyable": arguments[True] / max(1, arguments.total()),
        "over_redaction": beside / num_requests,
    }


def words_of_tools(row: Mapping[str, Any]) -> set[str]:
    """The words of a row's tools and of the transcript's own marks: the cloud's own, for all to read.

    Example:
        >>> sorted(words_of_tools({"tools": [{"name": "OpenAccount", "input_parameters": {"user_id": {}}}]}) - _MARKS)
        ['id', 'input', 'name', 'openaccount', 'parameters']
    """
    told = json.dumps(row["tools"], ensure_ascii=False)
    return {word.casefold() for word in re.findall(r"[^\W_]+", told)} | _MARKS


def copyable_arguments(row: Mapping[str, Any], redacted: Redacted) -> Iterator[bool]:
    """For each argument of the row's calls that stands in the request: whether its value can still be copied whole.

    A placeholder inside of a value is copied and restored; one that covers an end of it and something beside is not.
    """
    text = row["instruction"]
    for call in row["calls"]:
        for value in parse_call(call)[1].values():
            places = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE)]
            if value and places:
                yield any(
                    not any(
                        each.start < end and each.end > start and (each.start < start or each.end > end)
                        for each in redacted.replacements
                    )
                    for start, end in places
                )


def _touches_gold(text: str, redacted: Redacted, index: int, gold: Mapping[str, str]) -> bool:
    each = redacted.replacements[index]
    value = fold(text[each.start : each.end])
    return any(value in unit or unit in value for unit in gold if len(unit) > 2)


def measure_plain(texts: Sequence[str], redactor: Redactor) -> dict[str, Any]:
    """Findings where there is nothing to find."""
    counts = Counter[str]()
    for text in texts:
        counts.update(redactor.request(random.Random(0)).redact(text).counts)
    size = sum(len(text.encode()) for text in texts)
    return {
        "kilobytes": size / 1000,
        "mistakes": dict(sorted(counts.items())),
        "per_100_kB": 1e5 * counts.total() / size,
    }


def measure_time(texts: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds for a kilobyte: each rule alone, and whole requests through the detectors' process."""
    rows = []
    sizes = [len(text.encode()) / 1000 for text in texts]
    for name in RULES:
        finder = HereFinder({name: build_detector(name, DetectorSettings())})
        redactor = Redactor(finder=finder)
        rows.append({"what": name, "ms_per_kB": _ms_per_kb(texts, sizes, redactor, rounds)})
    with Redactor(DetectorSettings(), timeout_s=60) as redactor:
        redactor.request().redact("start the process")
        rows.append(
            {"what": "a request, all rules, own process", "ms_per_kB": _ms_per_kb(texts, sizes, redactor, rounds)}
        )
        fixed = _ms_per_kb(["x"] * len(texts), [1.0] * len(texts), redactor, rounds)
        rows.append({"what": "a request of one letter, all rules, own process", "ms": fixed})
    return rows


def _ms_per_kb(texts: Sequence[str], sizes: Sequence[float], redactor: Redactor, rounds: int) -> str:
    times = []
    for _ in range(rounds):
        for text, size in zip(texts, sizes, strict=True):
            begun = time.perf_counter()
            redactor.request().redact(text)
            times.append(1000 * (time.perf_counter() - begun) / size)
    return str(Spread.of(times))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, or of the same packed with gzip."""
    packed = path.with_name(path.name + ".gz")
    return [dict(row) for _, row in read_jsonl(path if path.is_file() else packed)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the result file."""
    parser = make_parser("redaction", __doc__ or "", "  python benchmarks/redaction.py --data ../shared/data")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with alpaca, api_bank, dailydialog, gsm8k, lm_classic_books"
    )
    parser.add_argument("--texts", type=int, default=1200, help="sentences to plant into")
    parser.add_argument("--min-texts", type=int, default=5, help="that a common word stands in (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the time measurement")
    args = parser.parse_args(arguments)
    machine = describe_machine()
    rng = random.Random(args.seed)
    dialogues = read(args.data / "dailydialog" / "test.jsonl")
    sentences = [turn["text"] for row in dialogues for turn in row["turns"]][: args.texts]
    books = [row["text"] for row in read(args.data / "lm_classic_books" / "test.jsonl")][:200]
    finder = HereFinder({name: build_detector(name, DetectorSettings()) for name in RULES})
    redactor = Redactor(finder=finder)
    with_ids = Redactor(finder=HereFinder({name: build_detector(name, DetectorSettings()) for name in (*RULES, "id")}))
    questions = [row["instruction"] for row in read(args.data / "gsm8k" / "test.jsonl")][:1000]
    api_bank = read(args.data / "api_bank" / "test.jsonl")
    others = [
        *("\n".join(turn["text"] for turn in row["turns"]) for row in read(args.data / "dailydialog" / "train.jsonl")),
        *(f"{row['instruction']} {row['output']}" for row in read(args.data / "alpaca" / "train.jsonl")),
    ]
    common = learn_common_words(others, min_texts=args.min_texts)
    results = {
        "planted": measure_planted(sentences, redactor, rng),
        "common words": {"texts": len(others), "words": len(common)},
        "api_bank": [
            measure_api_bank(api_bank, with_dictionary=own, with_ids=ids, with_quoted=quoted, allow_list=words)
            for own, ids, quoted, words in (
                (False, False, False, ()),
                (True, False, False, ()),
                (True, True, False, ()),
                (True, True, True, ()),
                (False, True, True, common),
                (True, True, True, common),
            )
        ],
        "plain": [
            {"texts": name, "detectors": "rules, id" if wider else "rules", **measure_plain(texts, wider or redactor)}
            for name, texts in (("books", books), ("questions", questions))
            for wider in (None, with_ids)
        ],
        "time": measure_time(books[:20], args.rounds),
    }
    for name, rows in results.items():
        print(f"\n{name}")
        for row in rows if isinstance(rows, list) else [rows]:
            print(
                "  "
                + ", ".join(
                    f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                )
            )
    finish("redaction", args, machine, results, [])


if __name__ == "__main__":
    main()
