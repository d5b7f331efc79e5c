"""Both state machines of a beam search: in virtual time, over a network that delays, repeats and cuts; and alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import STOP, VOCAB, ToyBackbone, toy_gate, toy_personal
from virtual_beams import Pair, VirtualBeams, device_of, request_of
from virtual_network import Weather

from cotune.device.beam_stream import BeamDeviceStream
from cotune.errors import ConnectionLostError, FrameError, InputError, WireError
from cotune.generation.beam_reference import BeamGeneration, search
from cotune.generation.beams import BeamOptions
from cotune.generation.sampling import Sampling
from cotune.wire.frames import BeamCorrect, BeamStep, BeamTokens, Close, End, EndReason, Opened, Step


def check_same(device: BeamDeviceStream, expected: BeamGeneration) -> None:
    assert device.decisions == expected.decisions
    assert device.ending == expected.ending
    assert device.beams == expected.beams  # scores too, to the last bit
    assert device.counters == expected.counters


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_beams=st.integers(2, 8),
    mode=st.sampled_from(["integration", "spa"]),
    schedule=st.sampled_from(["blocking", "gated"]),
    threshold=st.sampled_from([-9.0, -1.0, 0.0, 1.0, 3.0, 9.0, 99.0]),
    strength=st.sampled_from([0.0, 0.3, 1.0]),
    length_penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
    weather=st.builds(
        Weather,
        step_s=st.sampled_from([0.02, 0.2]),
        delay_s=st.sampled_from([0.0, 0.025]),
        jitter_s=st.sampled_from([0.0, 0.05]),
        duplicate=st.sampled_from([0.0, 0.3]),
        cut=st.sampled_from([0.0, 0.05, 0.25]),
        forgets=st.sampled_from([0.0, 0.3]),
    ),
    evicts=st.sampled_from([0.0, 0.7]),
)
def test_any_network_gives_the_texts_of_the_reference(
    seed: int,
    num_beams: int,
    mode: str,
    schedule: str,
    threshold: float,
    strength: float,
    length_penalty: float,
    weather: Weather,
    evicts: float,
) -> None:
    personal = replace(toy_personal(strength), gate=toy_gate(threshold))
    options = BeamOptions(num_beams=num_beams, length_penalty=length_penalty)
    request = request_of(seed, mode)
    expected = search(ToyBackbone(), personal, request, options)
    run = VirtualBeams(
        device_of(request, personal, options, schedule=schedule), weather, seed=seed, evicts=evicts
    ).run()
    check_same(run.device, expected)
    if not run.num_cuts and not weather.duplicate:
        # One message a step that consults, whatever the number of beams; none elsewhere.
        assert run.num_asking_frames == expected.counters.num_trips


def test_the_hard_cases_of_the_test_above_happen() -> None:
    weather = Weather(duplicate=0.3, cut=0.15, forgets=0.3)
    runs = []
    for seed in range(12):
        device = device_of(request_of(seed), toy_personal(), BeamOptions(num_beams=4))
        runs.append(VirtualBeams(device, weather, seed=seed, evicts=0.5).run())
    assert sum(run.num_cuts for run in runs) > 20
    assert sum(run.num_forgotten for run in runs) > 3
    assert sum(run.num_evicted for run in runs) > 3


def test_steps_that_ask_nobody_cost_no_trip() -> None:
    """With a gate that never fires the whole search is one way."""
    personal = replace(toy_personal(), gate=toy_gate(99.0))
    options = BeamOptions(num_beams=3)
    run = VirtualBeams(device_of(request_of(3, "spa"), personal, options), Weather(step_s=0.02, delay_s=1.0)).run()
    assert run.device.counters.num_trips == 0 and run.device.num_corrections == 0
    # One delay for the open and one for the end; waiting once would add two.
    assert run.now_s < 2.0 + 0.02 * 20


def test_a_stop_string_cuts_the_best_text() -> None:
    def words(token_ids: Any) -> str:
        return "".join(f"<{token}>" for token in token_ids)

    options = BeamOptions(num_beams=3)
    whole = search(ToyBackbone(), toy_personal(), request_of(1), options)
    third = whole.token_ids[2]
    request = request_of(1, stop_strings=(f"<{third}>",))
    expected = search(ToyBackbone(), toy_personal(), request, options, words)
    assert expected.ending.reason == "stop_string" and len(expected.decisions) <= 3
    run = VirtualBeams(device_of(request, toy_personal(), options, detokenize=words), Weather()).run()
    check_same(run.device, expected)
    with pytest.raises(InputError, match="needs detokenize"):
        device_of(request, toy_personal(), options)


def test_all_beams_ask_in_one_frame_and_name_their_parents() -> None:
    pair = Pair(num_beams=3)
    first = pair.step()
    assert (first.parents, first.consult, len(first.taps)) == ((0,), (True,), 1)
    pair.cloud.on_frame(pair.answer(first), 0.0)
    second = pair.step()
    assert (second.parents, second.consult, len(second.taps)) == ((0, 0, 0), (True,) * 3, 3)
    correct = pair.answer(second)
    assert correct.beams == (0, 1, 2) and correct.parents == (0, 0, 0) and correct.pos == first.pos + 1
    assert pair.device.texts == [[token] for token in second.tokens]
    pair.cloud.on_frame(correct, 0.0)
    third = pair.step()
    pair.answer(third)
    assert pair.device.texts == [
        [second.tokens[parent], token] for parent, token in zip(third.parents, third.tokens, strict=True)
    ]


def test_repeated_frames_change_nothing() -> None:
    pair = Pair()
    first = pair.step()
    correct = pair.answer(first)
    assert pair.device.on_frame(first) == []
    pair.cloud.on_frame(correct, 0.0)
    assert pair.cloud.on_frame(correct, 0.0) == []
    assert pair.cloud.search.num_steps == 1
    stale = replace(correct, pos=correct.pos + 1, epoch=1)
    assert pair.cloud.on_frame(stale, 0.0) == []
    assert pair.device.on_frame(replace(first, session=8, pos=99)) == []
    assert pair.device.on_frame(replace(first, epoch=5, pos=99)) == []
    assert pair.device.on_frame(Step(session=7, pos=first.pos + 1, base_token=1)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos": 8}, "position 8 came, expected 6"),
        ({"parents": (0, 1, 0)}, "beams with parents \\(0, 1, 0\\)"),
        ({"parents": (7, 0, 0)}, "beams with parents \\(7, 0, 0\\)"),
        ({"parents": (0,) * 4, "tokens": (5,) * 4, "consult": (False,) * 4, "taps": ()}, "expected at most 3"),
        ({"tokens": (5, VOCAB, 6)}, f"token {VOCAB} came"),
        ({"taps": (b"abc",) * 3}, "bytes"),
    ],
)
def test_the_device_refuses_beams_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    pair = Pair(num_beams=3)
    pair.cloud.on_frame(pair.answer(pair.step()), 0.0)
    second = pair.step()
    with pytest.raises(FrameError, match=message):
        pair.device.on_frame(replace(second, **changes))


def test_the_device_refuses_another_prompt() -> None:
    pair = Pair()
    first = pair.step()
    with pytest.raises(FrameError, match="end the prompt"):
        pair.device.on_frame(replace(first, tokens=(first.tokens[0] + 1,)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos": 7}, "position 7 came, expected them for position 6"),
        ({"beams": (0, 1, 3)}, "beams \\(0, 1, 3\\)"),
        ({"parents": (0, 0, 1)}, "with parents \\(0, 0, 1\\) came for position 6, expected"),
        ({"codes": np.ones((3, 5), np.int8)}, "corrections of 5 codes, expected 6"),
    ],
)
def test_the_cloud_refuses_corrections_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    pair = Pair(num_beams=3)
    pair.cloud.on_frame(pair.answer(pair.step()), 0.0)
    correct = pair.answer(pair.step())
    with pytest.raises(FrameError, match=message):
        pair.cloud.on_frame(replace(correct, **changes), 0.0)
    # The right one still goes through.
    pair.cloud.on_frame(correct, 0.0)
    assert pair.cloud.search.num_steps == 2


def test_the_cloud_refuses_answers_to_no_question() -> None:
    pair = Pair()
    correct = pair.answer(pair.step())
    pair.cloud.on_frame(correct, 0.0)
    with pytest.raises(FrameError, match="once the device is asked"):
        pair.cloud.on_frame(replace(correct, pos=correct.pos + 1), 0.0)


def test_a_device_that_comes_back_is_told_what_it_missed() -> None:
    pair = Pair()
    for _ in range(3):
        step = pair.step()
        pair.cloud.on_frame(pair.answer(step), 0.0)
    last = pair.step()  # lost on its way
    held = [list(text) for text in pair.device.texts]
    frame = pair.device.open_frame()
    assert frame.resume and frame.generated_ids.tolist() == held[0]
    told = pair.cloud.resume(frame.generated_ids.tolist(), 0, 0.0)
    assert [(type(one), one.pos) for one in told] == [(BeamStep, last.pos - 1), (BeamStep, last.pos)]
    assert not any(told[0].consult) and told[1] == replace(last, epoch=1)  # type: ignore[attr-defined]
    pair.device.on_frame(Opened(session=7, epoch=1, pos=pair.cloud.num_confirmed, ticket=bytes(16)))
    told_nothing, answered = (pair.device.on_frame(one) for one in told)
    assert told_nothing == [] and isinstance(answered[0], BeamCorrect)
    # Another history than the cloud's: everything from the start.
    told = pair.cloud.resume([1, 2], 0, 0.0)
    assert pair.cloud.num_confirmed == pair.cloud.num_prompt and len(told) == 4


def test_other_beams_than_before_are_refused() -> None:
    pair = Pair()
    for _ in range(2):
        step = pair.step()
        pair.cloud.on_frame(pair.answer(step), 0.0)
    pair.device.open_frame()
    pair.device.on_frame(Opened(session=7, epoch=1, pos=step.pos, ticket=bytes(16)))
    other = replace(step, epoch=1, tokens=(step.tokens[1], step.tokens[0], step.tokens[2]))
    with pytest.raises(FrameError, match="other beams came"):
        pair.device.on_frame(other)
    pair.device.open_frame()
    with pytest.raises(WireError, match="opened the session at position 77"):
        pair.device.on_frame(Opened(session=7, epoch=1, pos=77, ticket=bytes(16)))


def test_ends_that_come_too_early() -> None:
    pair = Pair()
    end = End(session=7, pos=5, reason=EndReason.LENGTH)
    with pytest.raises(WireError, match="before the text was complete"):
        pair.device.on_frame(end)
    with pytest.raises(ConnectionLostError, match="shutting down"):
        pair.device.on_frame(replace(end, reason=EndReason.SHUTDOWN))
    text = BeamTokens(
        session=7,
        pos=5,
        rank=0,
        num_texts=2,
        score=-1.0,
        log_prob=-1.0,
        tokens=np.array([STOP]),
        base_tokens=np.array([STOP]),
        consulted=np.array([True]),
    )
    with pytest.raises(FrameError, match="a text from position 6"):
        pair.device.on_frame(replace(text, pos=6))
    pair.device.on_frame(text)
    with pytest.raises(WireError, match="before the text was complete"):  # one of two
        pair.device.on_frame(end)
    pair.device.on_frame(replace(text, rank=1))
    pair.device.on_frame(end)
    assert pair.device.is_done and pair.device.token_ids == [STOP]


def test_a_device_may_close() -> None:
    pair = Pair()
    pair.step()
    (end,) = pair.cloud.on_frame(Close(session=7), 0.0)
    assert isinstance(end, End) and end.reason is EndReason.CANCELLED
    assert pair.cloud.on_frame(Close(session=7), 0.0) == [] and not pair.cloud.wants_step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "ladder"}, "mode is ladder with beams, expected integration or spa"),
        ({"sampling": Sampling(temperature=0.5)}, "temperature is 0.5 with beams, expected 0"),
        ({"max_new_tokens": 70_000}, "max_new_tokens is 70000 with beams"),
    ],
)
def test_what_beams_cannot_serve_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        device_of(request_of(1, **changes), toy_personal(), BeamOptions(num_beams=2))


@pytest.mark.parametrize("schedule", ["optimistic", "drafted", "auto"])
def test_schedules_that_do_not_wait_are_refused(schedule: str) -> None:
    with pytest.raises(InputError, match="nothing to run ahead with"):
        device_of(request_of(1), toy_personal(), BeamOptions(num_beams=2), schedule=schedule)
