"""The sandwich's ablations on a tiny model: both epsilons, halves and modes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from study_command import Command
from zocp_cloud import OPTIONS, label_of

from cotune.sandwich.scripted_cloud import scripted_server


@pytest.mark.integration
def test_the_command_changes_one_thing_at_a_time(tmp_path: Path, tiny_model: Path, command: Command) -> None:
    with scripted_server(label_of) as server:
        options = [*OPTIONS, "--model", tiny_model, "--cloud", server.base_url, "--budget-tokens", 6000]
        options += ["--tolerances", 0, 0.3, "--radii", 0.001, 1.0, "--directions", 2]
        options += ["--cells", tmp_path / "cells", "--out", tmp_path / "out"]
        status, said = command("zocp_ablations", options)
        assert status == 0, said
        measured = json.loads((tmp_path / "out" / "measured.json").read_text())["nlu"]
    assert measured["tolerance"]["rows"].keys() == {"0.0", "0.3"}
    # Without a tolerance there is no gap once it is restored.
    assert measured["tolerance"]["rows"]["0.0"]["gap"]["mean"] <= 1e-3
    radius = measured["radius"]["rows"]
    assert radius["0.001"]["cosine"]["mean"] != radius["1.0"]["cosine"]["mean"]
    assert radius["0.001"]["sigma"] == radius["1.0"]["sigma"] and radius["1.0"]["least"]["mean"] > 0
    serial = [f"{half}, serial" for half in ("none", "pre", "post", "both")]
    tuned = ["pre tuned, serial", "both tuned, serial"]
    assert list(measured["halves"]) == [
        *serial,
        "post, parallel",
        "both, parallel",
        "post without copy, serial",
        *tuned,
    ]
    assert command("zocp_ablations", [*options, "--tolerances", -1])[0] == 2
