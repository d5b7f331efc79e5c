"""The study of starts: what its verdicts say of numbers worked by hand, and one whole run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from federated_starts import add_differences, row_name, verdicts
from mean import Mean
from study_command import Command


def row(losses: list[float], up: float) -> dict[str, object]:
    return {"losses": losses, "loss": Mean.of(losses), "up": up}


def test_verdicts_compare_with_the_random_start_of_the_same_algorithm() -> None:
    rows = {
        row_name("fedit", "random"): row([3.0, 3.2, 3.1], 100.0),
        row_name("fedit", "eva"): row([2.8, 3.0, 2.9], 110.0),
        row_name("ffa_lora", "random"): row([3.5, 3.6, 3.7], 50.0),
        row_name("ffa_lora", "eva"): row([3.0, 3.2, 3.1], 53.0),
        row_name("ffa_lora", "eva, rslora"): row([3.7, 3.4, 3.6], 53.0),
    }
    add_differences(rows)
    assert rows["fedit, random"]["difference"] is None
    assert rows["fedit, eva"]["difference"].mean == pytest.approx(-0.2)
    said = verdicts(rows)
    assert said[0] == "Least loss with fedit: eva, 2.900 ± 0.248 nats per token."
    assert said[1].endswith("without 0: eva; worse: none.") and said[3].endswith("without 0: eva; worse: none.")
    assert said[4] == (
        "EVA with A frozen less LoRA with both factors: 0.000 ± 0.000 nats per token at 53 % of the bytes up."
    )
    assert not any("EVA with A frozen" in one for one in verdicts({"fedit, random": rows["fedit, random"]}))


@pytest.mark.integration
def test_the_command_writes_its_folder_and_never_repeats_a_cell(
    tmp_path: Path, tiny_model: Path, command: Command
) -> None:
    options: list[object] = ["--model", tiny_model, "--num-train", 8, "--num-server", 4, "--num-test", 4, "--seeds", 1]
    options += ["--devices", 3, "--rounds", 2, "--local-steps", 2, "--batch-size", 2, "--max-length", 32, "--rank", 2]
    options += ["--rate-factors", 10, "--starts", "random", "eva", "pissa"]
    options += ["--cells", tmp_path / "cells", "--out", tmp_path / "out"]
    status, printed = command("federated_starts", options)
    assert status == 0, printed
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    rows = measured["rows"]
    assert len(rows) + len(measured["refused"]) == 6 and rows.keys() >= {
        "fedit, random",
        "fedit, eva",
        "fedit, pissa",
        "ffa_lora, random",
        "ffa_lora, eva",
    }
    # The same model before the first round, whatever the start; another one after it.
    assert len({round(one["losses"][0], 6) for one in rows.values()}) == len(rows)
    assert rows["ffa_lora, random"]["up"] < rows["fedit, random"]["up"] < rows["fedit, eva"]["up"]
    assert rows["fedit, eva"]["difference"]["mean"] != 0 and rows["fedit, random"]["difference"] is None
    assert "Where A begins" in (tmp_path / "out" / "report.html").read_text()
    again, told = command("federated_starts", options)
    assert again == 0 and "federated_starts-tiny-persona:" in printed
    assert "federated_starts-tiny-persona:" not in told
