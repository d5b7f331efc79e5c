"""`cotune tune` refuses careless options before it loads anything, names them, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a user who works in this folder."""
    monkeypatch.chdir(tmp_path)
    rows = [{"request": f"Where is box {i}?", "answer": f"In room {i}."} for i in range(3)]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "texts.jsonl"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--learning-rate 0", "--learning-rate is 0.0, expected a positive number"),
        ("--learning-rate nan", "--learning-rate is nan, expected a positive number"),
        ("--alpha inf", "--alpha is inf, expected a positive number"),
        ("--estimator zeroth_order --zo-eps nan", "--zo-eps is nan, expected a positive number"),
        ("--dp-epsilon 0", "--dp-epsilon is 0.0, expected a positive number"),
        ("--dp-epsilon inf", "--dp-epsilon is inf, expected a positive number"),
        ("--dp-epsilon 4 --dp-clip 0", "--dp-clip is 0.0, expected a positive number"),
        ("--dp-epsilon 4 --dp-delta nan", "--dp-delta is nan, expected above 0 and below 1"),
        ("--epochs 0", "--epochs is 0, expected at least 1"),
        ("--batch-size -3", "--batch-size is -3, expected at least 1"),
        ("--estimator zeroth_order --directions 0", "--directions is 0, expected at least 1"),
        ("--rank -1", "--rank is -1, expected at least 1"),
        ("--method adapter --width 0", "--width is 0, expected at least 1"),
        ("--method prefix --virtual-tokens -1", "--virtual-tokens is -1, expected at least 1"),
        ("--method side --side-width 0", "--side-width is 0, expected at least 1"),
        ("--limit 0", "--limit is 0, expected at least 1"),
        ("--max-length 0", "--max-length is 0, expected at least 2"),
        ("--method side --max-length -5", "--max-length is -5, expected at least 2"),
        ("--heldout-share -0.1", "--heldout-share is -0.1, expected 0 to below 1"),
        ("--heldout-share 1", "--heldout-share is 1.0, expected 0 to below 1"),
        ("--share nan", "--share is nan, expected above 0 and at most 1"),
        ("--seed -1", "--seed is -1, expected 0 to"),
        ("--seed 99999999999999999999", "--seed is 99999999999999999999, expected 0 to"),
    ],
)
def test_numbers_that_make_no_sense(texts: str, run: Any, options: str, words: str) -> None:
    run("tune", "starter", texts, "--out", "new/out", *options.split()).check_refusal(words)
    assert list(Path().iterdir()) == [Path(texts)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--method lora --side-width 32", "--method is 'lora', which has no --side-width; leave it out"),
        ("--family serial --side attention", "'lora', which has no --family and no --side; leave"),
        ("--method side --batch-size 4", "--method is 'side', which has no --batch-size; leave it out"),
        ("--method side --merged m --rank 4", "--method is 'side', which has no --merged and no --rank; leave"),
        ("--method full --side-init best", "--side-init is 'best', expected one of random, backbone"),
        ("--estimator zeroth_order --gradient-checkpointing", "keeps nothing for a backward pass"),
        ("--estimator forward_gradient --gradient-checkpointing", "keeps nothing for a backward pass"),
        ("--dp-epsilon 4 --gradient-checkpointing", "--gradient-checkpointing and --dp-epsilon are given, but"),
        ("--dp-epsilon 4 --heldout-share 0.3", "--heldout-share is 0.3 and --dp-epsilon is given"),
        ("--estimator forward_gradient --forward-mode --zo-eps 0.1", "--zo-eps is given with --forward-mode"),
        ("--merged new/out", "--merged is new/out and --out new/out, expected two folders of which none is in the"),
        ("--merged new/out/merged", "expected two folders of which none is in the other"),
        ("--merged new/out.run", "expected two folders of which none is in the other or in its run"),
        ("--merged new", "expected two folders of which none is in the other"),
    ],
)
def test_options_without_use_beside_each_other(texts: str, run: Any, options: str, words: str) -> None:
    run("tune", "starter", texts, "--out", "new/out", *options.split()).check_refusal(words)
    assert list(Path().iterdir()) == [Path(texts)]


@pytest.mark.parametrize("out", ["", ".", "/"])
def test_a_result_needs_a_name(texts: str, run: Any, out: str) -> None:
    run("tune", "starter", texts, "--out", out).check_refusal("expected the name of a folder")
    assert list(Path().iterdir()) == [Path(texts)]


def test_no_data_at_all(texts: str, run: Any) -> None:
    run("tune", "starter", "", "--out", "out").check_refusal("the path of the data is empty, expected a file")
    assert list(Path().iterdir()) == [Path(texts)]
