"""The study of combinations: what adds up, by hand, and one whole run of the command on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from study_command import Command
from survey_combinations import REFERENCE, Combination, pairs_of, paragraph, step_seconds, summarise, weight_bytes
from tiny_models import tiny_backbone


def of(what: str, how: str, bits: int = 32) -> Combination:
    return Combination(what=what, how=how, bits=bits)


def test_a_pair_adds_up_by_what_both_choices_save_together() -> None:
    whole = {
        REFERENCE: 100.0,
        of("lora", "backprop"): 60.0,
        of("full", "checkpointing"): 80.0,
        of("lora", "checkpointing"): 46.0,
        of("full", "zeroth_order"): 40.0,
        of("lora", "zeroth_order"): 40.0,
    }
    first, second = pairs_of(whole)
    # 40 and 20 alone, 54 together; 40 and 60 alone, 60 together.
    assert (first.alone, first.together, first.share, first.gain) == ((40.0, 20.0), 54.0, pytest.approx(0.9), 14.0)
    assert (second.alone, second.together, second.share, second.gain) == ((40.0, 60.0), 60.0, 0.6, 0.0)
    assert first.name == "lora with checkpointing (from full, backprop, 32 bit)"
    said = paragraph([first, second], 85.0)
    assert said.startswith("Of 2 pairs that save memory alone, 1 save together at least 85 % of what they save alone:")
    assert "checkpointing with fewer numbers 90 %; zeroth_order with fewer numbers 60 %. 1 of them gain nothing" in said
    other = replace(first, together=42.0)
    assert "checkpointing with fewer numbers 70 to 90 %. None of them" in paragraph([first, other], 85.0)
    assert "No pair" in paragraph([], 90.0)


def test_bits_are_paired_with_updates_of_the_same_parameters() -> None:
    whole = {
        of("lora", "backprop"): 60.0,
        of("lora", "zeroth_order"): 50.0,
        of("lora", "backprop", 4): 40.0,
        of("lora", "zeroth_order", 4): 30.0,
    }
    (pair,) = pairs_of(whole)
    assert pair.share == 1.0 and pair.name == "zeroth_order with 4 bit (from lora, backprop, 32 bit)"
    # What saves nothing alone cannot add up to anything.
    assert pairs_of({**whole, of("lora", "backprop", 4): 61.0}) == []
    assert pairs_of({one: b for one, b in whole.items() if one != of("lora", "zeroth_order")}) == []


def test_a_row_has_whole_memory_and_times_between_steps() -> None:
    assert step_seconds([(1, 1.0), (1, 2.0), (1, 5.0), (2, 50.0)]) == 2.0 and step_seconds([(1, 3.0)]) is None
    run = {"nats": 2.0, "base_nats": 3.0, "step_s": None, "num_trained": 7}
    row = summarise({"weight_bytes": 3_000_000, "above_bytes": 2_000_000}, [run, {**run, "nats": 4.0, "step_s": 0.5}])
    assert (row["weight_mb"], row["above_mb"], row["whole_mb"]) == (3.0, 2.0, 5.0)
    assert row["nats"].mean == 3.0 and row["step_s"] == 0.5


def test_weights_are_counted_in_the_type_that_they_have() -> None:
    model = tiny_backbone("llama").model
    numbers = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert weight_bytes(model) == 4 * numbers + buffers
    assert weight_bytes(model.half()) < 4 * numbers


@pytest.mark.integration
def test_the_command_writes_its_folder(
    tmp_path: Path, tiny_model: Path, command: Command, measured_here: list[list[str]]
) -> None:
    has_bits = find_spec("bitsandbytes") is not None
    options = ["--model", str(tiny_model), "--num-train", "10"]
    options += ["--num-test", "2", "--seeds", "1", "--epochs", "1", "--batch-size", "4", "--max-length", "48"]
    options += ["--what", "full", "lora", "--how", "backprop", "--bits", "32", "4"]
    options += ["--memory-length", "64", "--rate-factors", "1"]
    options += ["--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    first_status, first = command("survey_combinations", options)
    assert first_status == 0, first
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    whole = {str(of(what, "backprop")) for what in ("full", "lora")}
    assert whole <= measured["combinations"].keys()
    # Low-bit weights are never tuned themselves, with bitsandbytes or without.
    assert str(of("full", "backprop", 4)) in measured["refused"]
    assert (str(of("lora", "backprop", 4)) in measured["combinations"]) == has_bits
    row = measured["combinations"]["full, backprop, 32 bit"]
    assert row["above_mb"] == 5 and 0.1 < row["weight_mb"] < 1
    assert measured_here[0][-4:] == ["--child", "full", "backprop", "32"]
    # So few steps may not make it better.
    assert 0 < row["nats"]["mean"] != row["base_nats"]["mean"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert measured["said"].split(",")[0] in page and "MB at the peak, weights included" in page
