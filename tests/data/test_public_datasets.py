"""Each public data set in each of its formats, hand-written; and the subsets beside the project, where present."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from byte_tokens import BOS, EOS, TOKENIZER

from cotune.data.batches import encode_example
from cotune.data.records import read_examples, read_splits
from cotune.data.templates import Example
from cotune.errors import DataError

ARTICLE = "It fell all day.\nAnna stayed at home."
XSUM = [Example(f"Summarize this text.\n\n{ARTICLE}\n\nSummary:", " Rain has fallen on Rome.")]
CNN = [Example(f"Summarize this text.\n\n{ARTICLE}\n\nSummary:", " Rain in Rome .\nAnna stays in .")]
COQA_FIRST = "Anna is in Rome.\n\nQuestion: Who?\nAnswer:"
COQA = [Example(COQA_FIRST, " Anna."), Example(f"{COQA_FIRST} Anna.\nQuestion: Where?\nAnswer:", " Rome.")]
OPTIONS = "Options:\n- air\n- fire\n- rain\n- wind\n"
SCIQ = [Example(f"Rain falls.\n\nQuestion: What falls?\n{OPTIONS}Answer:", " rain")]

XSUM_ROW = {"document": ARTICLE, "summary": "Rain has fallen on Rome.", "id": "1"}
CNN_ROW = {"article": ARTICLE, "highlights": "Rain in Rome .\nAnna stays in .", "id": "0a"}
COQA_HUB_ROW = {
    "source": "mctest",
    "story": "Anna is in Rome.",
    "questions": ["Who?", "Where?"],
    "answers": {"input_text": ["Anna.", "Rome."], "answer_start": [0, 11], "answer_end": [4, 15]},
}
COQA_ROW = {
    "source": "mctest",
    "id": "3x",
    "filename": "mc160.train.1",
    "story": "Anna is in Rome.",
    "questions": [{"input_text": "Who?", "turn_id": 1}, {"input_text": "Where?", "turn_id": 2}],
    "answers": [
        {"span_start": 0, "span_end": 4, "span_text": "Anna", "input_text": "Anna.", "turn_id": 1},
        {"span_start": 11, "span_end": 15, "span_text": "Rome", "input_text": "Rome.", "turn_id": 2},
    ],
    "name": "mc160.train.1",
}
MCTEST_ROW = {
    "id": "mc160.train.1",
    "story": "Anna is in Rome.",
    "turns": [{"question": "Who?", "answer": "Anna.", "options": []}, {"question": "Where?", "answer": "Rome."}],
}
SCIQ_ROW = {
    "question": "What falls?",
    "distractor3": "wind",
    "distractor1": "fire",
    "distractor2": "air",
    "correct_answer": "rain",
    "support": "Rain falls.",
}
# Data set, row, examples.
CASES: list[tuple[str, dict[str, Any], list[Example]]] = [
    ("xsum", XSUM_ROW, XSUM),
    ("cnn_dailymail", CNN_ROW, CNN),
    ("coqa", COQA_HUB_ROW, COQA),
    ("coqa", COQA_ROW, COQA),
    ("mctest", MCTEST_ROW, COQA),
    ("coqa", MCTEST_ROW, COQA),
    ("sciq", SCIQ_ROW, SCIQ),
]


@pytest.mark.parametrize(("dataset", "row", "examples"), CASES)
def test_json_in_all_its_forms(tmp_path: Path, dataset: str, row: dict[str, Any], examples: list[Example]) -> None:
    texts = {
        "lines.jsonl": json.dumps(row) + "\n",
        "lines.json": json.dumps(row) + "\n" + json.dumps(row) + "\n",
        "list.json": json.dumps([row, row], indent=2),
        "data.json": json.dumps({"version": "1.0", "data": [row, row]}, indent=2),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        expected = examples if name == "lines.jsonl" else examples * 2
        assert read_examples(tmp_path / name) == expected
        assert read_examples(tmp_path / name, dataset) == expected


@pytest.mark.parametrize(("dataset", "row", "examples"), CASES)
def test_parquet(tmp_path: Path, dataset: str, row: dict[str, Any], examples: list[Example]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kept = {key: value for key, value in row.items() if value is not None}
    if dataset == "mctest" or row is MCTEST_ROW:
        kept["turns"] = [{"question": turn["question"], "answer": turn["answer"]} for turn in row["turns"]]
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([kept]), tmp_path / "data" / "train-00000-of-00001.parquet")
    assert read_examples(tmp_path, dataset) == examples


@pytest.mark.parametrize(("dataset", "row", "examples"), [case for case in CASES if case[0] not in ("coqa", "mctest")])
def test_csv(tmp_path: Path, dataset: str, row: dict[str, Any], examples: list[Example]) -> None:
    with (tmp_path / "test.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    assert read_examples(tmp_path, dataset, split="test") == examples


def test_article_files(tmp_path: Path) -> None:
    (tmp_path / "1.summary").write_text(
        f"[SN]URL[SN]\nx\n\n[SN]TITLE[SN]\ny\n\n[SN]FIRST-SENTENCE[SN]\nRain has fallen on Rome.\n\n"
        f"[SN]RESTBODY[SN]\nShare this with\n{ARTICLE}\n",
        encoding="utf-8",
    )
    assert read_examples(tmp_path, "xsum") == read_examples(tmp_path / "1.summary") == XSUM
    story = ARTICLE.replace("\n", "\n\n") + "\n\n@highlight\n\nRain in Rome\n\n@highlight\n\nAnna stays in\n"
    (tmp_path / "cnn").mkdir()
    (tmp_path / "cnn" / "0a.story").write_text(story, encoding="utf-8")
    prompt = CNN[0].prompt.replace(".\nA", ". A")
    assert read_examples(tmp_path / "cnn", "cnn_dailymail") == [Example(prompt, CNN[0].target)]
    (tmp_path / "cnn" / "0b.story").write_text("Rain.", encoding="utf-8")
    with pytest.raises(DataError, match=r"0b\.story: the story has no highlight"):
        read_examples(tmp_path / "cnn")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[\n{"document": "a", "summary": "b"},\n{"b": }\n]',
            r"line 3: the file is not JSON \(Expecting value at character 7 of the line\)",
        ),
        ('[\n{"document": "a", "summary": "b"},\n"c"]', "line 3: the list holds text, expected only JSON objects"),
        (
            '{"data": [\n{"document": "a"}\n]}',
            "line 2: data set 'xsum' has columns document \\+ summary, but the columns",
        ),
        (
            '[\n{"document": "a",\n"summary": "b"\n},\n\n{"document": "a"}]',
            "line 6: column 'summary' is missing; found 'document'",
        ),
        ('[{"document": "a", "summary": "b"}', "line 1: the file is not JSON"),
        ('{\n"rows": []\n}', "the file is one JSON object, expected a list of objects, or one under 'data'"),
        ('{"data" 1}', "line 1: the "),
        ("[]", "the file holds no rows"),
        ("", "the file holds no rows"),
        ("[" * 100_000, "too large to read"),
        ('[{"a": ' + "9" * 5000 + "}]", "too large to read"),
    ],
)
def test_bad_json_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.json.*" + message):
        read_examples(tmp_path / "bad.json", "xsum")


def test_a_json_file_is_bounded_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotune.data.row_readers.MAX_JSON_BYTES", 1024 * 1024)
    (tmp_path / "a.json").write_bytes(b"[" + b" " * 1024 * 1024)
    with pytest.raises(DataError, match=r"a\.json: the file is larger than 1 MiB, expected less"):
        read_examples(tmp_path / "a.json")
    (tmp_path / "b.json").write_bytes(b'[{"text": "\xff"}]')
    with pytest.raises(DataError, match=r"b\.json: byte 11 of the file is not UTF-8"):
        read_examples(tmp_path / "b.json")


def test_splits_are_drawn_by_seed_number_and_share(tmp_path: Path) -> None:
    for name, num in (("train", 20), ("valid", 6), ("test", 5)):
        rows = [{**XSUM_ROW, "summary": f"{name} {index}."} for index in range(num)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    whole = read_splits(tmp_path, "xsum", seed=1)
    assert (len(whole.train), len(whole.validation), len(whole.test)) == (20, 6, 5)
    assert whole.validation[0].target.startswith(" valid ")
    part = read_splits(tmp_path, "xsum", seed=1, train_share=0.25, num_validation=2, num_test=3)
    assert part.train == whole.train[:5]
    assert (part.validation, part.test) == (whole.validation[:2], whole.test[:3])
    assert read_splits(tmp_path, seed=1, num_train=7).train == whole.train[:7]
    assert read_splits(tmp_path, seed=2).train != whole.train
    assert read_examples(tmp_path, seed=1, share=0.5) == whole.train[:10]


def test_a_missing_split_is_empty_and_a_file_has_none(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps(SCIQ_ROW), encoding="utf-8")
    splits = read_splits(tmp_path, "sciq")
    assert (splits.train, splits.validation, splits.test) == ([], [], SCIQ)
    with pytest.raises(DataError, match=r"test\.jsonl: there is no such folder, expected one with a file for each"):
        read_splits(tmp_path / "test.jsonl")
    with pytest.raises(DataError, match=r"test\.jsonl, line 1: data set 'xsum' has columns document \+ summary"):
        read_splits(tmp_path, "xsum")


def test_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([COQA_HUB_ROW])
    datasets.DatasetDict({"train": rows, "dev": rows}).save_to_disk(str(tmp_path / "two"))
    splits = read_splits(tmp_path / "two", "coqa", seed=3)
    assert sorted(splits.train, key=lambda each: len(each.prompt)) == COQA
    assert (len(splits.validation), splits.test) == (2, [])
    rows.save_to_disk(str(tmp_path / "one"))
    with pytest.raises(DataError, match="none of the splits train, validation, test; found none"):
        read_splits(tmp_path / "one")


def test_the_hub_is_asked_for_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(*arguments: object, split: str) -> list[dict[str, Any]]:
        asked.append((*arguments, split))
        return [CNN_ROW]

    def get_dataset_split_names(*arguments: object) -> list[str]:
        asked.append(arguments)
        return ["train", "val"]

    hub = SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=get_dataset_split_names)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    splits = read_splits("hub:abisee/cnn_dailymail:3.0.0", "cnn_dailymail")
    assert (splits.train, splits.validation, splits.test) == (CNN, CNN, [])
    name = ("abisee/cnn_dailymail", "3.0.0")
    assert asked == [name, (*name, "train"), (*name, "val")]
    read_examples("hub:abisee/cnn_dailymail", "cnn_dailymail")
    assert asked[-1] == ("abisee/cnn_dailymail", None, "train")


SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
SIZES = {
    "xsum": ("xsum", (459, 100, 300)),
    "cnn_dailymail": ("cnn_dailymail", (0, 0, 118)),
    "sciq": ("sciq", (514, 80, 250)),
    # Stories with four questions each.
    "mctest_coqa_style": ("mctest", (4 * 370, 4 * 80, 4 * 110)),
}


@pytest.mark.parametrize("folder", SIZES)
def test_the_subsets_beside_the_project(folder: str) -> None:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"../shared/data/{folder} is not here")
    dataset, sizes = SIZES[folder]
    splits = read_splits(SHARED / folder, dataset)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
    for example in (*splits.train[:20], *splits.test[:20]):
        assert example.document is not None
        encoded = encode_example(TOKENIZER, example, eos_token_id=EOS, max_length=1024)
        assert len(encoded.input_ids) <= 1024
        target = TOKENIZER.decode(encoded.input_ids[encoded.first_target :].tolist())
        assert (encoded.input_ids[0], target) == (BOS, example.target)
