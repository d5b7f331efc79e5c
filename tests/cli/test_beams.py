"""`cotune device generate --num-beams`: the reference's texts, M per step, or one clear sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from clouds import in_a_thread
from tiny_models import device_for
from toy import STOP, ToyBackbone, toy_model
from toy_plugin import toy_plugin

from cotune.device.runtime import GenerationOptions
from cotune.generation.beam_reference import BeamGeneration, search


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with in_a_thread(toy_model()) as url:
        yield url


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    toy_plugin().save(tmp_path / "plugin")
    return tmp_path / "plugin"


def reference(mode: str, **options: Any) -> BeamGeneration:
    device = device_for(toy_plugin())
    chosen = GenerationOptions(mode=mode, schedule="blocking", max_new_tokens=9, **options)
    request = device.request_for(device.format_prompt("w5 w9"), chosen, (STOP,))
    assert chosen.beams is not None
    return search(ToyBackbone(), device.personal, request, chosen.beams)


@pytest.mark.parametrize("mode", ["integration", "spa"])
def test_json_reports_texts_and_trips(run: Callable[..., Any], url: str, plugin: Path, mode: str) -> None:
    words = ("device", "generate", plugin, "w5 w9", "--cloud", url, "--max-new-tokens", 9, "--mode", mode, "--json")
    outcome = run(*words, "--num-beams", 4, "--length-penalty", 0.5)
    assert outcome.status == 0, outcome.err
    told = json.loads(outcome.out)
    expected = reference(mode, num_beams=4, length_penalty=0.5)
    counters = expected.counters
    assert told["token_ids"] == expected.token_ids and told["schedule"] == "blocking"
    beams = told["beams"]
    assert (beams["num_beams"], beams["length_penalty"], beams["num_steps"]) == (4, 0.5, counters.num_steps)
    assert [text["score"] for text in beams["texts"]] == [text.score for text in expected.beams]
    assert beams["texts"][0]["text"] == told["text"]
    assert beams["M_per_step"] == counters.num_trips / counters.num_steps
    assert beams["M_per_token"] == told["M"] == counters.num_trips / len(expected.decisions)
    share = counters.num_consulted / counters.num_beam_steps
    assert beams["consult_rate_per_beam"] == share
    assert beams["predicted_M_per_step"] == pytest.approx(1 - (1 - share) ** 4)
    if mode == "integration":
        assert beams["M_per_step"] == beams["predicted_M_per_step"] == 1.0
    assert told["egress"]["beam correct"]["count"] == counters.num_trips


def test_the_text_and_a_line_about_the_trips(run: Callable[..., Any], url: str, plugin: Path) -> None:
    outcome = run("device", "generate", plugin, "w5 w9", "--cloud", url, "--max-new-tokens", 9, "--num-beams", 3)
    expected = reference("integration", num_beams=3)
    assert outcome.status == 0, outcome.err
    assert outcome.out.split() == [f"w{token}" for token in expected.token_ids]
    assert f"3 beams, {expected.counters.num_steps} steps; M per step 1.00" in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-beams", 9), "num_beams is 9, expected 2 to 8"),
        (("--num-beams", 0), "num_beams is 0, expected 2 to 8"),
        (
            ("--num-beams", 4, "--schedule", "optimistic"),
            "schedule is optimistic with beams, expected blocking or gated",
        ),
        (("--num-beams", 4, "--answer", "token"), "use answer correction"),
        (("--num-beams", 4, "--temperature", 0.7), "temperature is 0.7 with beams, expected 0"),
        (("--num-beams", 4, "--deadline-ms", 50), "deadline_ms is 50 with beams"),
        (("--num-beams", 4, "--length-penalty", 99), "length_penalty is 99.0, expected -10 to 10"),
    ],
)
def test_refusals(run: Callable[..., Any], plugin: Path, words: tuple[object, ...], message: str) -> None:
    outcome = run("device", "generate", plugin, "w5", "--cloud", "ws://127.0.0.1:9", *words)
    outcome.check_refusal(message)
