"""The memory benchmark's methods run, and are measured as what the planner calls them."""

from __future__ import annotations

import argparse
import dataclasses
import sys

import pytest
import torch
from measurement import Spread
from method_memory import (
    CASES,
    SHAPES,
    TIMED,
    TINY,
    Scene,
    base_bytes,
    can_run,
    config_of,
    make_scene,
    measure_steps,
    predict,
    sized,
    targets_of,
)

from cotune.errors import InputError
from cotune.evaluation.allocations import count_allocations
from cotune.evaluation.method_cost import METHODS, predict_cost


@pytest.fixture
def scene() -> Scene:
    return make_scene(sized(TINY), dtype="float32", device="cpu", batch=2, length=32, seed=0)


def test_every_case_is_a_word_of_the_planner() -> None:
    assert {case.predicted for case in CASES.values()} <= set(METHODS)
    assert set(TIMED) <= set(CASES)


def test_shapes_have_the_sizes_that_they_are_named_after() -> None:
    def millions(name: str) -> float:
        scene = make_scene(sized(SHAPES[name]), dtype="float32", device="cpu", batch=1, length=1, seed=0)
        return scene.shape.num_parameters / 1e6

    assert millions("llama-49m") == pytest.approx(49.3, abs=0.1)
    assert millions("qwen-like-104m") == pytest.approx(104.1, abs=0.1)


@pytest.mark.parametrize("name", CASES)
def test_a_case_takes_a_step_in_about_the_memory_predicted(name: str, scene: Scene) -> None:
    case = CASES[name]
    if not can_run(case):
        pytest.skip("bitsandbytes is not installed")
    with case.run(scene, case.model(scene)) as step:
        step()
        found = count_allocations(step).peak_bytes
    cost = predict(case, scene)
    assert cost.method == case.predicted
    if not cost.gradients:
        # Moved weights are made in blocks of at most so many bytes as this tiny model never has.
        inference = predict_cost(scene.shape, "inference", scene.load)
        most = min(cost.activations, inference.activations + inference.weights)
        assert 0.9 * inference.activations <= found <= 1.1 * most
        return
    # What is made before the step is not counted here, so a step takes less than all; the benchmark itself counts it.
    assert 0.9 * cost.activations <= found <= 1.1 * (cost.activations + cost.gradients) + cost.optimizer


def test_goals_are_held_against_what_was_measured() -> None:
    def row(measured: float, ratio: float) -> dict[str, object]:
        return {"measured_above_mb": Spread.of([measured]), "ratio_above": ratio}

    memory = {"full": row(100, 0.9), "side": row(20, 1.2), "side, features here": row(30, 1.0), "lora": row(60, 1.0)}
    times = {
        name: {"ms": Spread.of([ms])} for name, ms in (("lora", 10.0), ("side", 1.0), ("side, features here", 6.0))
    }
    verdicts = {target.what: target.verdict for target in targets_of("m", memory, times)}
    assert [what for what, verdict in verdicts.items() if verdict == "MISS"] == [
        "m, side: prediction off the peak above the weights",
        "m, side, features here: peak above the weights, of full tuning's",
        "m, side, features here: time of a step, of LoRA's",
    ]
    assert len(verdicts) == 4 + 2 + 2


def test_forward_only_methods_are_held_against_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "mezo", dataclasses.replace(CASES["inference"], predicted="zeroth_order"))

    def verdict(above_mb: float) -> str:
        rows = {
            name: {"base_mb": 90.0, "measured_above_mb": Spread.of([mb]), "ratio_above": 1.0}
            for name, mb in (("inference", 10.0), ("mezo", above_mb))
        }
        (found,) = [t.verdict for t in targets_of("m", rows, {}) if "inference's" in t.what]
        return found

    assert (verdict(14.9), verdict(15.1)) == ("PASS", "MISS")


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set's peak is Linux's")
def test_a_peak_beyond_the_weights_is_measured() -> None:
    """In this process, and so roughly; the benchmark itself takes a child for each method."""
    args = argparse.Namespace(dtype="float32", device="cpu", seed=0, batch=2, length=64, steps=2)
    sizes = {**TINY, "V": 20_000}
    scene = make_scene(sized(sizes), dtype="float32", device="cpu", batch=2, length=64, seed=0)
    logits = 128 * 20_000 * 4
    found = measure_steps(CASES["inference"], args, sized(sizes))
    assert found["peak_bytes"] > logits and found["step_s"] > 0
    assert base_bytes(CASES["inference"], scene) == 4 * scene.shape.num_parameters
    assert base_bytes(CASES["side"], scene) == 0


def test_the_scene_is_the_same_for_a_seed(scene: Scene) -> None:
    again = make_scene(sized(TINY), dtype="float32", device="cpu", batch=2, length=32, seed=0)
    assert (again.batch.input_ids == scene.batch.input_ids).all()
    assert torch.equal(again.model().lm_head.weight, scene.model().lm_head.weight)
    assert predict_cost(scene.shape, "lora", scene.load) == predict_cost(again.shape, "lora", again.load)


def test_a_shape_is_a_name_or_a_config() -> None:
    assert config_of("small").hidden_size == 128
    assert config_of("llama-7b").num_hidden_layers == 32
    with pytest.raises(InputError, match="shape is 'no-such', expected one of llama-49m"):
        config_of("no-such")


@pytest.mark.skipif(not can_run(CASES["qlora, 4 bits"]), reason="bitsandbytes is not installed")
def test_a_base_of_four_bits_is_about_an_eighth_of_a_whole_one(scene: Scene) -> None:
    case = CASES["qlora, 4 bits"]
    assert base_bytes(case, scene) < 4 * scene.shape.num_parameters
    names = {type(module).__name__ for module in scene.model(4).modules()}
    assert "Linear4bit" in names
