"""The study of federated methods: what curves say, worked by hand, and one whole run on a tiny model."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from federated_memory import measure
from federated_memory import parser as memory_parser
from federated_methods import (
    budgets_of,
    cost_to,
    first_at,
    goal,
    hash_seed,
    is_first_order,
    mean_within,
    parser,
    within,
)
from federated_study import FederatedStudy, Scene
from study_command import Command


def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
    """Loss and cumulative bytes up, as many down."""
    return [{"loss": loss, "up": up, "down": up, "device_s": 2 * place} for place, (loss, up) in enumerate(points)]


FALLING = curve((4.0, 0), (3.0, 10), (2.0, 20))
SLOW = curve((4.0, 0), (3.5, 5), (3.0, 10))


def test_quality_under_a_budget_is_that_of_the_last_round_it_pays_for() -> None:
    both = ("up", "down")
    assert [within(FALLING, budget, both) for budget in (0, 19, 20, 39, 40, 1000)] == [4.0, 4.0, 3.0, 3.0, 2.0, 2.0]
    # A later round counts even where it is worse: nobody chooses rounds by test texts.
    assert within(curve((4.0, 0), (1.0, 10), (2.0, 20)), 100, both) == 2.0
    found = mean_within([FALLING, SLOW], 20, both)
    assert (found.mean, found.num) == (3.0, 2)


def test_budgets_go_from_the_cheapest_round_to_the_dearest_run() -> None:
    found = budgets_of([FALLING, SLOW], ("up",), 3)
    assert found == [5.0, 10.0, 20.0]
    assert budgets_of([curve((4.0, 0), (3.0, 0))], ("up",)) == [0.0]
    # Two digits, rounded up, so that the ends still pay.
    assert budgets_of([curve((4.0, 0), (3.0, 111), (2.0, 9991))], ("up",), 2) == [120.0, 10000.0]


def test_cost_to_a_target_counts_the_seeds_that_reach_it() -> None:
    assert first_at(FALLING, 3.2) == (1, FALLING[1]) and first_at(FALLING, 1.0) is None
    found = cost_to([FALLING, SLOW], 3.0)
    assert found["num_reached"] == 2
    assert (found["rounds"].mean, found["bytes"].mean, found["device_s"].mean) == (1.5, 20.0, 3.0)
    assert cost_to([FALLING, SLOW], 2.5)["num_reached"] == 1 and cost_to([SLOW], 1.0)["bytes"] is None


def test_the_goal_of_rolora_is_told_with_its_interval() -> None:
    rows = {"fedit": {"losses": [2.0, 2.2], "bytes": 100.0}, "rolora": {"losses": [1.9, 2.1], "bytes": 52.0}}
    assert goal(rows) == ["rolora less fedit: -0.100 ± 0.000 nats per held-out token (better) at 52 % of its bytes."]
    rows["rolora"]["losses"] = [2.4, 2.0]
    assert "(not told apart)" in goal(rows)[0]
    rows["rolora"]["losses"] = [2.5, 2.7]
    assert "(worse)" in goal(rows)[0] and goal({"rolora": rows["rolora"]}) == []


def test_what_goes_backwards_is_first_order() -> None:
    assert is_first_order({"forward": 2, "backward": 1}) and not is_first_order({"forward": 2})
    assert len({hash_seed(a, b) for a in range(4) for b in range(4)}) == 16


def test_a_search_ends_where_round_after_round_is_rejected(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parser().parse_args(
        f"--model {tiny_model} --num-train 4 --num-server 2 --num-test 2 --devices 2 --rounds 5 --directions 1 "
        f"--batch-size 2 --max-length 48 --rank 2 --cells {tmp_path}".split()
    )
    rising = count(1)
    monkeypatch.setattr("federated_study.mean_loss", lambda model: lambda adapter: float(next(rising)))
    study, scene = FederatedStudy("rejected", args), Scene(algorithm="seed", factor=1.0)
    searched, whole = study.federate(scene, on_test=False), study.federate(scene)
    assert (searched["num_rejected"], len(searched["curve"])) == (3, 4)
    assert (whole["num_rejected"], len(whole["curve"])) == (5, 6)


def test_a_schedule_is_a_setting_of_every_cell_that_has_one(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = f"--model {tiny_model} --num-train 8 --num-server 4 --num-test 4 --devices 2 --rounds 3 --local-steps 1 "
    options += f"--batch-size 2 --max-length 48 --rank 2 --cells {tmp_path}"
    constant, cosine = (
        FederatedStudy("schedule", parser().parse_args([*options.split(), "--schedule", kind]))
        for kind in ("constant", "cosine")
    )
    assert [constant.rate_share(number) for number in (1, 2, 3)] == [1.0, 1.0, 1.0]
    assert [cosine.rate_share(number) for number in (1, 2, 3)] == pytest.approx([1.0, 0.775, 0.325])
    scene = Scene(algorithm="fedit", factor=3.0)
    curves = [[point["loss"] for point in study.federate(scene)["curve"]] for study in (constant, cosine)]
    assert curves[0][:2] == curves[1][:2] and curves[0][2] != curves[1][2]
    keys: list[dict[str, Any]] = []
    for study in (constant, cosine):
        monkeypatch.setattr(study.cells, "get", lambda group, key, run: keys.append(key))
        study.cell({"what": "x"}, dict)
    assert "schedule" not in keys[0] and keys[1] == keys[0] | {"schedule": "cosine"}


def test_prompts_and_classes_of_devices_are_tuned_as_well(tiny_model: Path, tmp_path: Path) -> None:
    args = parser().parse_args(
        f"--model {tiny_model} --num-train 8 --num-server 4 --num-test 4 --devices 4 --rounds 2 --local-steps 2 "
        f"--directions 3 --batch-size 2 --max-length 48 --rank 2 --cells {tmp_path}".split()
    )
    study = FederatedStudy("kinds", args)
    prompts, mixed = (study.federate(Scene(algorithm=name, factor=3.0)) for name in ("fedpeptao", "mixed"))
    # Scores first, which change nothing.
    losses = [point["loss"] for point in prompts["curve"]]
    assert losses[0] == losses[1] != losses[2] and prompts["num_void"] == 0
    # Two of four devices go backwards, twice a round; the others forwards alone, six times.
    assert mixed["passes"] == {"backward": 1.0, "forward": 4.0} and mixed["num_void"] == 0
    assert mixed["num_counted"] == 8 and mixed["curve"][-1]["loss"] != mixed["curve"][0]["loss"]


@pytest.mark.integration
def test_the_command_writes_its_folder_and_never_repeats_a_cell(
    tmp_path: Path, tiny_model: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The child's work in this process: what it costs is not looked at here.
    def here(arguments: list[str], **ignored: Any) -> dict[str, Any]:
        args = memory_parser().parse_args(arguments[1:])
        return measure(FederatedStudy("memory", args), args.algorithm)

    monkeypatch.setattr("federated_memory.run_measured", here)
    options: list[object] = ["--model", tiny_model, "--num-train", 8, "--num-server", 4, "--num-test", 4, "--seeds", 1]
    options += ["--devices", 4, "--rounds", 2, "--local-steps", 2, "--directions", 2, "--pool", 4, "--batch-size", 2]
    options += ["--max-length", 48, "--rank", 2, "--rate-factors", 10, "--splits", "domains", "--faults", "stragglers"]
    options += ["--algorithms", "fedit", "rolora", "seed", "--rouge-texts", 1, "--measure-memory"]
    options += ["--cells", tmp_path / "cells", "--out", tmp_path / "out"]
    status, printed = command("federated_methods", options)
    assert status == 0, printed
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    found = measured["splits"]["domains"]
    rows = found["rows"]
    assert rows.keys() == {"local only", "centralised", "fedit", "rolora", "seed"} and not measured["refused"]
    # One of two rounds of rolora sends B, the other one A; new devices get all.
    assert rows["seed"]["up"] < rows["rolora"]["up"] < rows["fedit"]["up"]
    assert rows["centralised"]["bytes"] == 0 and rows["centralised"]["losses"][0] < 20
    assert "backward" not in measured["passes"]["seed"] and measured["passes"]["fedit"]["backward"] == 2
    assert rows["fedit"]["rouge_l"]["mean"] >= 0 and found["target"] > rows["centralised"]["loss"]["mean"]
    assert measured["faults"]["fedit"]["stragglers"]["more"]["mean"] != 0
    memory = measured["memory"]
    assert (
        memory["seed"]["predicted_mb"] < memory["fedit"]["predicted_mb"] and memory["seed"]["measured_mb"] is not None
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Split: domains" in page and "Robustness" in page and measured["said"][0].split(":")[0] in page
    again, told = command("federated_methods", options)
    assert again == 0 and "federated_methods-tiny-persona:" in printed
    assert "federated_methods-tiny-persona:" not in told
