"""What the last section of each report says."""

from __future__ import annotations

import re

from cotune.evaluation.setup_content import setup_content


def test_all_parts_are_there_and_what_is_empty_is_not() -> None:
    content = setup_content(
        {"loop": {"epochs": 2, "clip": None}, "options": {}},
        repeat=["cotune demo --seed 1", "cotune ledger <run>"],
        versions={"numpy": "9.1"},
        seeds={"seed": 1},
    )
    assert content is not None
    told = " ".join(re.sub(r"<[^>]+>", " ", content).split())
    assert "cotune demo --seed 1 cotune ledger &lt;run&gt;" in told
    assert "Seeds seed 1 Versions numpy 9.1" in told and "loop.epochs 2" in told
    assert "clip" not in told and "options" not in told


def test_nothing_is_no_section() -> None:
    assert setup_content(None) is None and setup_content({"a": None}, versions={}) is None
