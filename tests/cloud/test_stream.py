"""The central promise, on both state machines: same token ids whatever the schedule, answer form and network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import STOP, VOCAB, ToyBackbone, layered_gate, toy_basis, toy_gate, toy_personal
from virtual_network import KnowingDrafter, VirtualRun, Weather, drafter_named, toy_prompt

from cotune.cloud.stream import CloudStream, StreamConfig
from cotune.generation.gate import Gate
from cotune.generation.modes import MODES
from cotune.generation.reference import Personal, decide, generate
from cotune.generation.request import ANSWERS, SCHEDULES, Decision, GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.wire.frames import Close, Draft, End, Step


def _request(mode: str, seed: int, **changes: object) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=toy_prompt(seed), mode=mode, **{"stop_token_ids": (STOP,), "max_new_tokens": 24, **changes}
    )


@settings(max_examples=120, deadline=None)
@given(
    mode=st.sampled_from(sorted(MODES)),
    schedule=st.sampled_from(SCHEDULES),
    answer=st.sampled_from(ANSWERS),
    sampling=st.sampled_from(
        [Sampling(), Sampling(temperature=0.8, seed=3), Sampling(temperature=1.2, top_p=0.8, seed=9)]
    ),
    strength=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    seed=st.integers(0, 10_000),
    remembers=st.booleans(),
    max_branches=st.sampled_from([1, 2, 5]),
    free_rows=st.sampled_from([1, 2, 8]),
    top_k=st.sampled_from([1, 4, 24]),
    gate=st.sampled_from([toy_gate(), layered_gate()]),
    window=st.sampled_from([1, 2, 32]),
    drafter=st.sampled_from(["own", "perfect", "half", "wrong", "hostile", "lookup"]),
    weather=st.builds(
        Weather,
        delay_s=st.sampled_from([0.0, 0.001, 0.05]),
        jitter_s=st.sampled_from([0.0, 0.1]),
        duplicate=st.sampled_from([0.0, 0.3]),
        cut=st.sampled_from([0.0, 0.05]),
        forgets=st.sampled_from([0.0, 0.5]),
        device_s=st.sampled_from([0.0, 0.003]),
    ),
)
def test_token_ids_equal_the_reference(
    mode: str,
    schedule: str,
    answer: str,
    sampling: Sampling,
    strength: float,
    seed: int,
    remembers: bool,
    gate: Gate,
    max_branches: int,
    free_rows: int,
    top_k: int,
    window: int,
    drafter: str,
    weather: Weather,
) -> None:
    personal = replace(toy_personal(strength, remembers=remembers), gate=gate)
    request = _request(mode, seed, sampling=sampling)
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
        max_branches=max_branches,
        free_rows=free_rows,
        drafter=drafter_named(drafter, [*request.prompt_ids.tolist(), *expected.token_ids], seed),
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


def _knowing(
    schedule: str, answer: str, *, drafter: str = "perfect", strength: float = 0.4, **changes: object
) -> VirtualRun:
    request = _request("integration", 5, max_new_tokens=60)
    text = [*request.prompt_ids.tolist(), *generate(ToyBackbone(), toy_personal(strength), request).token_ids]
    return VirtualRun(
        toy_personal(strength),
        request,
        schedule=schedule,
        answer=answer,
        drafter=drafter_named(drafter, text),
        weather=Weather(step_s=0.02, delay_s=0.025),
        top_k=VOCAB,
        **changes,  # type: ignore[arg-type]
    ).run()


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("schedule", ["drafted", "auto"])
def test_a_perfect_draft_is_read_many_tokens_at_a_time(schedule: str, answer: str) -> None:
    run = _knowing(schedule, answer)
    counters, num_tokens = _counters(run), len(run.device.decisions)
    assert counters["num_drafts_kept"] > 0.8 * num_tokens
    assert counters["num_steps"] < num_tokens / 3
    assert run.now_s < 0.5 * _knowing("optimistic", answer).now_s


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_drafter_that_is_always_wrong_is_not_listened_to_for_long(answer: str) -> None:
    run, without = _knowing("auto", answer, drafter="wrong"), _knowing("optimistic", answer)
    assert _counters(run)["num_drafts_kept"] == 0
    assert run.device.num_drafts < 0.8 * len(run.device.decisions)
    assert run.now_s < 1.1 * without.now_s


def test_drafted_without_drafts_is_blocking() -> None:
    drafted, blocking = _knowing("drafted", "token", drafter="own"), _knowing("blocking", "token")
    assert drafted.device.num_drafts < 5
    assert drafted.now_s == pytest.approx(blocking.now_s, rel=0.05)


def test_a_trip_that_ends_in_another_token_is_counted_once() -> None:
    counters = _counters(_knowing("drafted", "token", drafter="half"))
    # Each stall is one trip: as many of these as passes that were followed by one.
    assert counters["num_delayed"] <= counters["num_steps"]


@pytest.mark.parametrize("schedule", ["drafted", "auto"])
@pytest.mark.parametrize("window", [1, 3])
def test_drafts_are_read_within_the_window(schedule: str, window: int) -> None:
    run = _knowing(schedule, "token", window=window)
    steps = [(plan.truncate_to, len(plan.token_ids)) for plan in run.plans]
    assert max(length for first, length in steps if first >= len(run.device.request.prompt_ids)) == window


def _check_late(personal: Personal, request: GenerationRequest, decisions: list[Decision]) -> None:
    """Each token is the reference's after those before it, or the base token where it is marked as late."""
    cursor, tokens = ToyBackbone().cursor(), request.prompt_ids
    for decision in decisions:
        expected = decide(cursor.extend(tokens), personal, request, cursor.length, personal.corrector.open())
        assert decision.consulted == expected.consulted
        if decision.late:
            assert decision.consulted
            assert decision.token_id == decision.base_token_id == expected.base_token_id
        else:
            assert decision.token_id == expected.token_id
        tokens = np.array([decision.token_id])


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(sorted(MODES)),
    schedule=st.sampled_from(SCHEDULES),
    strength=st.sampled_from([0.1, 1.0]),
    seed=st.integers(0, 10_000),
    deadline_ms=st.sampled_from([1, 60, 150]),
    drafter=st.sampled_from(["own", "perfect", "half"]),
    weather=st.builds(
        Weather,
        delay_s=st.sampled_from([0.001, 0.03]),
        jitter_s=st.sampled_from([0.0, 0.1]),
        duplicate=st.sampled_from([0.0, 0.3]),
        cut=st.sampled_from([0.0, 0.05]),
        forgets=st.sampled_from([0.0, 0.5]),
        device_s=st.sampled_from([0.0, 0.02]),
    ),
)
def test_late_tokens_are_marked_and_everything_else_is_as_it_should_be(
    mode: str, schedule: str, strength: float, seed: int, deadline_ms: int, drafter: str, weather: Weather
) -> None:
    personal, request = toy_personal(strength), _request(mode, seed)
    text = [*request.prompt_ids.tolist(), *generate(ToyBackbone(), personal, request).token_ids]
    run = VirtualRun(
        personal,
        request,
        schedule=schedule,
        answer="correction",
        weather=weather,
        seed=seed,
        drafter=drafter_named(drafter, text, seed),
        deadline_ms=deadline_ms,
    ).run()
    decisions = run.device.decisions
    _check_late(personal, request, decisions)
    assert run.cloud is not None
    assert run.cloud.tokens == [*request.prompt_ids.tolist(), *run.device.token_ids]
    if run.num_cuts == 0:
        assert _counters(run)["num_late"] == sum(decision.late for decision in decisions)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_device_that_is_always_late_leaves_the_base_text(schedule: str) -> None:
    request = _request("integration", 5, max_new_tokens=40)
    late = VirtualRun(
        toy_personal(0.4),
        request,
        schedule=schedule,
        answer="correction",
        deadline_ms=30,
        weather=Weather(step_s=0.02, delay_s=0.025),
    ).run()
    assert late.device.token_ids == generate(ToyBackbone(), None, request).token_ids
    assert all(decision.late for decision in late.device.decisions)
    # Nobody waits longer than the deadline for any token.
    assert late.now_s < len(late.device.decisions) * 0.05 + 0.15


@pytest.mark.parametrize("answer", ANSWERS)
def test_nothing_is_late_where_that_was_not_allowed(answer: str) -> None:
    run = _run("integration", "optimistic", answer, delay_s=2.0)
    assert not any(decision.late for decision in run.device.decisions)
    assert _counters(run)["num_late"] == 0


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("delay_s", [0.002, 0.025, 0.1])
@pytest.mark.parametrize("chance", [0.0, 0.9])
def test_auto_is_about_as_fast_as_the_best_schedule(chance: float, delay_s: float, answer: str) -> None:
    request, personal = _request("integration", 2, max_new_tokens=100, stop_token_ids=()), toy_personal(0.14)
    text = [*request.prompt_ids.tolist(), *generate(ToyBackbone(), personal, request).token_ids]

    def seconds(schedule: str) -> float:
        return (
            VirtualRun(
                personal,
                request,
                schedule=schedule,
                answer=answer,
                top_k=VOCAB,
                drafter=KnowingDrafter(text, chance, seed=1),
                stop_token_ids=(),
                weather=Weather(step_s=0.02, delay_s=delay_s, token_s=0.001),
            )
            .run()
            .now_s
        )

    # On single prompts; over many it is within a few percent nearly everywhere, see docs/log.md.
    assert seconds("auto") < 1.35 * min(map(seconds, ("blocking", "optimistic", "drafted")))


def test_a_close_far_behind_the_text_with_a_draft_in_hand_is_only_a_close() -> None:
    config = StreamConfig(
        mode="integration", schedule="drafted", answer="token", top_k=8, window=32, max_new_tokens=50,
        sampling=Sampling(), stop_token_ids=(STOP,), gate=None,
    )  # fmt: skip
    stream, prompt = CloudStream(7, toy_prompt(1), [], config, toy_basis()), toy_prompt(1)
    plan = stream.plan(ToyBackbone.prompt_chunk)
    features = ToyBackbone().cursor().extend(plan.token_ids)
    (step,) = stream.on_step(plan, [features], 0.01, 1.0)
    assert isinstance(step, Step)
    draft = np.array([step.base_token, 5, STOP, 6])
    stream.on_frame(Draft(session=7, pos=len(prompt), tokens=draft), 1.1)
    # The end token ends the draft, and need not be read before it is confirmed.
    assert stream.tokens[len(prompt) :] == [step.base_token, 5, STOP]
    assert stream.plan(ToyBackbone.prompt_chunk).token_ids.tolist() == [step.base_token, 5]
    (end,) = stream.on_frame(Close(session=7, pos=1000), 1.2)
    assert isinstance(end, End)
    assert end.pos == len(prompt) + 1
