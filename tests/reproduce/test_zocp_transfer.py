"""From one cloud model to another: the prompt that was right for the first is wrong for the second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from study_command import Command
from zocp_cloud import OPTIONS, label_of

from cotune.sandwich.scripted_cloud import scripted_server


@pytest.mark.integration
def test_the_command_judges_three_ways_to_move(tmp_path: Path, tiny_model: Path, command: Command) -> None:
    asked: list[str] = []

    def answer(body: Mapping[str, Any]) -> str:
        asked.append(body["model"])
        return label_of(body) if body["model"] == "scripted" else "something else"

    with scripted_server(answer) as server:
        options = [*OPTIONS, "--model", tiny_model, "--cloud", server.base_url, "--others", "other"]
        options += ["--budget-tokens", 30_000, "--cells", tmp_path / "cells", "--out", tmp_path / "out"]
        status, said = command("zocp_transfer", options)
        assert status == 0, said
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())["nlu"]
    assert list(measured) == ["other, as it is", "other, prompt anew, 10 % of the tokens", "other, tuned there"]
    assert measured["other, prompt anew, 10 % of the tokens"]["tokens"] <= 3000
    assert measured["other, as it is"]["less tuned there"]["num"] == 2 and set(asked) == {"scripted", "other"}
