from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cotune.data.records import read_examples, read_prompts
from cotune.data.templates import Example
from cotune.errors import DataError, InputError


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(path: Path, num: int, prefix: str = "t") -> Path:
    return write_rows(path, [{"text": f"{prefix}{index}"} for index in range(num)])


def targets(examples: list[Example]) -> list[str]:
    return [example.target for example in examples]


def test_reads_a_file_in_order_and_up_to_a_limit(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", 5)
    assert targets(read_examples(path)) == ["t0", "t1", "t2", "t3", "t4"]
    assert targets(read_examples(str(path), limit=2)) == ["t0", "t1"]


def test_a_seed_shuffles_before_the_limit_and_repeats(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", 50)
    shuffled = targets(read_examples(path, seed=3))
    assert shuffled != targets(read_examples(path))
    assert sorted(shuffled) == sorted(targets(read_examples(path)))
    assert targets(read_examples(path, seed=3, limit=7)) == shuffled[:7]
    assert targets(read_examples(path, seed=4)) != shuffled


def test_the_limit_counts_examples_and_stops_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"speaker": "A", "text": "x"}, {"speaker": "B", "text": "y"}, {"speaker": "A", "text": "z"}]
    path.write_text(json.dumps({"turns": turns}) + "\nnot JSON\n", encoding="utf-8")
    assert len(read_examples(path, limit=2)) == 2
    with pytest.raises(DataError, match="line 2"):
        read_examples(path, limit=3)


def test_a_template_by_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "Nice.", "label": "good"}])
    assert read_examples(path) == [Example("Text: Nice.\nLabel:", " good")]
    assert read_examples(path, template="text") == [Example("", "Nice.")]


def test_csv_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("request,answer\nHello!,Hi.\n", encoding="utf-8")
    assert read_examples(tmp_path / "a.csv") == [Example("User: Hello!\nAssistant:", " Hi.")]


def test_folder_with_splits(tmp_path: Path) -> None:
    write_texts(tmp_path / "train_00.jsonl", 1, "a")
    write_texts(tmp_path / "train_01.jsonl", 1, "b")
    write_texts(tmp_path / "test.jsonl", 1, "c")
    write_texts(tmp_path / "tests.jsonl", 1, "d")
    (tmp_path / "README.md").write_text("facts", encoding="utf-8")
    assert targets(read_examples(tmp_path)) == ["a0", "b0"]
    assert targets(read_examples(tmp_path, split="test")) == ["c0"]
    with pytest.raises(DataError, match=r"no file for split 'dev'; found 'test\.jsonl', "):
        read_examples(tmp_path, split="dev")


def test_folder_with_one_file(tmp_path: Path) -> None:
    write_texts(tmp_path / "notes.jsonl", 2)
    assert len(read_examples(tmp_path)) == 2


def test_saved_hugging_face_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list([{"text": "x"}, {"text": "y"}])
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": train, "test": train.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert targets(read_examples(tmp_path / "one")) == ["x", "y"]
    assert targets(read_examples(tmp_path / "two")) == ["x", "y"]
    assert targets(read_examples(tmp_path / "two", split="test")) == ["y"]
    with pytest.raises(DataError, match="no split 'dev'; found 'test', 'train'"):
        read_examples(tmp_path / "two", split="dev")
    with pytest.raises(DataError, match="the data set has no splits"):
        read_examples(tmp_path / "one", split="dev")


def test_without_datasets_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}", encoding="utf-8")
    for path in (str(tmp_path), "hub:owner/name"):
        with pytest.raises(DataError, match=r"pip install 'cotune\[train\]'"):
            read_examples(path)


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "target": "b"}, {"prompt": "a", "target": ""}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the target is empty") as caught:
        read_examples(path)
    assert (caught.value.path, caught.value.line) == (str(path), 2)
    path = write_rows(tmp_path / "b.jsonl", [{"prompt": "a", "target": "b"}, {"prompt": "a"}])
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: column 'target' is missing; found 'prompt'"):
        read_examples(path)
    path = write_rows(tmp_path / "c.jsonl", [{"poem": "a"}])
    with pytest.raises(DataError, match=r"c\.jsonl, line 1: no template fits the columns 'poem'"):
        read_examples(path)


def test_what_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: there is no such file or folder"):
        read_examples(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match="there is no such file or folder; a Hub data set is 'hub:owner/name'"):
        read_examples("owner/name")
    with pytest.raises(DataError, match="the folder holds no data file"):
        read_examples(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"empty\.jsonl: the file holds no rows"):
        read_examples(tmp_path / "empty.jsonl")
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"ends in '\.txt', expected one of '\.csv', "):
        read_examples(tmp_path / "a.txt")


def test_rows_without_examples(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"turns": [{"speaker": "A", "text": "x"}]}])
    with pytest.raises(DataError, match="there is no example in it"):
        read_examples(path)


def test_arguments(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "a.jsonl", 1)
    with pytest.raises(InputError, match="limit is 0, expected at least 1"):
        read_examples(path, limit=0)
    with pytest.raises(DataError, match="split is 'test', but this is a single file"):
        read_examples(path, split="test")


def test_prompts_alone_whatever_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"request": "Who?"}\n{"request": "What?", "answer": ""}\n{"request": "Why?", "answer": "So."}\n')
    assert read_prompts(path) == [f"User: {one}\nAssistant:" for one in ("Who?", "What?", "Why?")]
    assert len(read_prompts(path, limit=2, seed=1)) == 2
    path.write_text('{"request": "Who?"}\n{"reply": "me"}\n')
    with pytest.raises(DataError, match=r"line 2: .*no question is in the columns 'reply'"):
        read_prompts(path)
    path.write_text("")
    with pytest.raises(DataError, match="no question in it"):
        read_prompts(path)
