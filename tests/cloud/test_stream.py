"""The central promise, on both state machines: same token ids whatever the schedule, answer form and network."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import STOP, ToyBackbone, toy_personal
from virtual_network import VirtualRun, Weather, toy_prompt

from cotune.generation.modes import MODES
from cotune.generation.reference import generate
from cotune.generation.request import ANSWERS, SCHEDULES, GenerationRequest
from cotune.generation.sampling import Sampling


def _request(mode: str, seed: int, **changes: object) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=toy_prompt(seed), mode=mode, stop_token_ids=(STOP,), **{"max_new_tokens": 24, **changes}
    )


@settings(max_examples=300, deadline=None)
@given(
    mode=st.sampled_from(sorted(MODES)),
    schedule=st.sampled_from(SCHEDULES),
    answer=st.sampled_from(ANSWERS),
    sampling=st.sampled_from(
        [Sampling(), Sampling(temperature=0.8, seed=3), Sampling(temperature=1.2, top_p=0.8, seed=9)]
    ),
    strength=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    seed=st.integers(0, 10_000),
    top_k=st.sampled_from([1, 4, 24]),
    window=st.sampled_from([1, 2, 32]),
    weather=st.builds(
        Weather,
        delay_s=st.sampled_from([0.0, 0.001, 0.05]),
        jitter_s=st.sampled_from([0.0, 0.1]),
        duplicate=st.sampled_from([0.0, 0.3]),
        cut=st.sampled_from([0.0, 0.05]),
        forgets=st.sampled_from([0.0, 0.5]),
    ),
)
def test_token_ids_equal_the_reference(
    mode: str,
    schedule: str,
    answer: str,
    sampling: Sampling,
    strength: float,
    seed: int,
    top_k: int,
    window: int,
    weather: Weather,
) -> None:
    personal, request = toy_personal(strength), _request(mode, seed, sampling=sampling)
    expected = generate(ToyBackbone(), personal, request)
    run = VirtualRun(
        personal,
        request,
        schedule=schedule,
        answer=answer,
        top_k=top_k,
        window=window,
        weather=weather,
        seed=seed,
    ).run()
    assert run.device.token_ids == expected.token_ids
    assert run.device.ending == expected.ending
    assert [d.consulted for d in run.device.decisions] == [d.consulted for d in expected.decisions]
    if run.num_cuts == 0:
        assert run.device.decisions == expected.decisions


def _run(mode: str, schedule: str, answer: str, *, strength: float = 0.1, delay_s: float = 0.025) -> VirtualRun:
    request = _request(mode, 5, max_new_tokens=60)
    return VirtualRun(
        toy_personal(strength),
        request,
        schedule=schedule,
        answer=answer,
        weather=Weather(step_s=0.02, delay_s=delay_s),
    ).run()


def _counters(run: VirtualRun) -> dict[str, float]:
    counters = run.device.cloud_counters
    assert counters is not None
    return {name: float(str(value)) for name, value in counters.items()}


def test_blocking_waits_once_for_every_token() -> None:
    run = _run("integration", "blocking", "correction")
    num_tokens = len(run.device.decisions)
    assert _counters(run)["num_delayed"] == num_tokens
    assert _counters(run)["num_wasted_steps"] == 0
    # c + R for each token: 20 ms and twice 25 ms; the opening and the end take one trip more.
    assert run.now_s == pytest.approx(num_tokens * 0.07 + 0.05, abs=0.03)


@pytest.mark.parametrize("answer", ANSWERS)
def test_optimistic_waits_only_where_the_device_disagrees(answer: str) -> None:
    run = _run("integration", "optimistic", answer, strength=0.02)
    num_changed = sum(d.changed for d in run.device.decisions)
    assert 0 < num_changed < len(run.device.decisions) / 2
    counters = _counters(run)
    assert counters["num_rollbacks"] == num_changed
    # Every rollback delays the stream by one round trip; so does each end that the cloud ran into, true or not.
    assert num_changed < counters["num_delayed"] <= num_changed + 4
    assert counters["num_wasted_steps"] >= num_changed


def test_optimistic_without_disagreement_takes_one_round_trip_in_all() -> None:
    run = _run("integration", "optimistic", "correction", strength=0.0)
    assert run.now_s == pytest.approx(len(run.device.decisions) * 0.02 + 0.1, abs=0.03)
    assert _counters(run)["num_wasted_steps"] == 0


def test_spa_is_undisturbed_where_the_gate_is_closed() -> None:
    run = _run("spa", "blocking", "token")
    num_consulted = sum(d.consulted for d in run.device.decisions)
    assert 0 < num_consulted < len(run.device.decisions)
    assert _counters(run)["num_delayed"] == num_consulted
    assert run.device.num_corrections == num_consulted


def test_near_networks_make_optimism_wait() -> None:
    # The answer comes in 2 ms, a step takes 20: waiting is cheaper than doing a third of the steps twice.
    far = _counters(_run("integration", "optimistic", "correction", strength=0.4, delay_s=0.025))
    near = _counters(_run("integration", "optimistic", "correction", strength=0.4, delay_s=0.001))
    assert far["num_wasted_steps"] > 20
    assert near["num_wasted_steps"] <= 3


def test_stop_strings_end_the_text_on_both_sides() -> None:
    def letters(ids: object) -> str:
        return "".join(chr(97 + int(i) % 26) for i in np.asarray(ids))

    plain = _request("integration", 3, max_new_tokens=40)
    text = letters(generate(ToyBackbone(), toy_personal(), plain).token_ids)
    request = _request("integration", 3, max_new_tokens=40, stop_strings=(text[7:10],))
    expected = generate(ToyBackbone(), toy_personal(), request, letters)
    assert expected.ending.reason == "stop_string"
    for answer in ANSWERS:
        run = VirtualRun(
            toy_personal(), request, schedule="optimistic", answer=answer, weather=Weather(), detokenize=letters
        ).run()
        assert run.device.token_ids == expected.token_ids
        assert run.device.ending == expected.ending
