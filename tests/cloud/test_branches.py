"""Branching instead of waiting: the same text, sooner, in rows that nobody else wants."""

from __future__ import annotations

import numpy as np
import pytest
from toy import STOP, ToyBackbone, toy_basis, toy_personal
from virtual_network import VirtualRun, Weather, toy_prompt

from cotune.cloud.branches import BranchingStream, BranchPlaces, BranchPlan, extra_tokens, may_branch
from cotune.cloud.stream import CloudStream, StreamConfig
from cotune.generation.controller import branches_pay
from cotune.generation.gate import Gate
from cotune.generation.protocols import StepAbandonedError
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.wire.frames import Correct, Frame, Step, Tokens

STEP_S, TRIP_S = 0.01, 0.05


def virtual(
    strength: float, max_branches: int, *, mode: str = "integration", seed: int = 3, **changes: object
) -> VirtualRun:
    request = GenerationRequest(prompt_ids=toy_prompt(seed), mode=mode, max_new_tokens=60, stop_token_ids=())
    weather = Weather(step_s=STEP_S, delay_s=TRIP_S / 2)
    options = {"schedule": "gated", "answer": "correction", "stop_token_ids": (), "max_branches": max_branches}
    return VirtualRun(toy_personal(strength), request, weather=weather, **(options | changes)).run()  # type: ignore[arg-type]


def counters(run: VirtualRun) -> dict[str, float]:
    return {name: float(str(value)) for name, value in (run.device.cloud_counters or {}).items()}


@pytest.mark.parametrize("mode", ["integration", "spa"])
@pytest.mark.parametrize("strength", [0.05, 0.3])
def test_the_text_is_the_same_and_comes_sooner(mode: str, strength: float) -> None:
    waiting, branching = virtual(strength, 1, mode=mode), virtual(strength, 4, mode=mode)
    request = GenerationRequest(prompt_ids=toy_prompt(3), mode=mode, max_new_tokens=60, stop_token_ids=())
    expected = generate(ToyBackbone(), toy_personal(strength), request)
    assert branching.device.decisions == waiting.device.decisions == expected.decisions
    before, after = counters(waiting), counters(branching)
    assert before["num_branchings"] == 0 and after["num_branches_kept"] > 3
    assert branching.now_s < 0.85 * waiting.now_s
    assert after["stall_ms"] < 0.5 * before["stall_ms"]
    assert after["num_delayed"] < before["num_delayed"]
    assert after["num_wasted_steps"] > before["num_wasted_steps"]


def test_a_wait_costs_a_trip_only_where_no_branch_is_right() -> None:
    waiting, branching = virtual(0.05, 1), virtual(0.05, 4)
    kept = counters(branching)["num_branches_kept"]
    # Every branch that is right saves what was computed in the meantime: at least one step, at most the whole trip.
    saved_s = waiting.now_s - branching.now_s
    assert kept * STEP_S <= saved_s <= kept * TRIP_S


def test_without_free_rows_there_is_one_branch_at_most() -> None:
    run = virtual(0.05, 4, free_rows=1)
    assert run.device.token_ids == virtual(0.05, 1).device.token_ids
    assert all(plan.num_rows == 1 for plan in run.plans)


def test_strong_side_networks_make_it_stop_branching() -> None:
    weak, strong = ([counters(virtual(strength, 8, seed=seed)) for seed in range(6)] for strength in (0.05, 1.0))

    def total(runs: list[dict[str, float]], name: str) -> float:
        return sum(run[name] for run in runs)

    assert total(weak, "num_branches_kept") > 0.7 * total(weak, "num_branchings")
    # Every one of its positions would have been worth a try, but for what the tries brought.
    assert total(strong, "num_branchings") < 0.6 * 6 * 60


def test_branches_pay_by_hand() -> None:
    assert branches_pay(kept=0.41, num_branches=4) and not branches_pay(kept=0.4, num_branches=4)
    assert branches_pay(kept=0.0, num_branches=2, row_cost=-0.1)


def _config(schedule: str = "gated", answer: str = "correction", taps_from: int = 0) -> StreamConfig:
    # This gate always fires: blocking, under another name.
    gate = Gate(weight=np.zeros(12, np.float32), bias=1.0)
    return StreamConfig(
        mode="integration",
        schedule=schedule,
        answer=answer,
        top_k=8,
        window=16,
        max_new_tokens=9,
        sampling=Sampling(),
        stop_token_ids=(STOP,),
        gate=gate,
        taps_from=taps_from,
    )


def test_which_streams_may_branch() -> None:
    assert may_branch(_config())
    assert not may_branch(_config(schedule="blocking"))
    assert not may_branch(_config(schedule="auto"))
    assert not may_branch(_config(answer="token"))
    assert not may_branch(_config(taps_from=3))


def test_room_for_a_branch_is_whole_blocks() -> None:
    assert extra_tokens(64) == 128 and extra_tokens(16) == 48 and extra_tokens(4) == 36


class Desk:
    """Does the engine's and the device's work by hand."""

    def __init__(self, max_branches: int = 3) -> None:
        self.personal = toy_personal(0.0)
        self.cloud = BranchingStream(CloudStream(7, toy_prompt(1), [], _config(), toy_basis()), max_branches)
        self.backbone = ToyBackbone()
        self.places: BranchPlaces | None = None
        self.now_s = 0.0

    def plan(self, num_rows: int = 8) -> BranchPlan:
        plan = self.cloud.plan(self.backbone.prompt_chunk).within(num_rows)
        assert plan is not None
        return plan

    def step(self, plan: BranchPlan | None = None) -> list[Frame]:
        plan = plan or self.plan()
        self.places = self.places or plan.begin(self.backbone, 5)
        outputs = self.backbone.extend(plan.prepare(self.places))
        return self.cloud.on_step(plan, [one for row in outputs for one in row], STEP_S, self.now_s)

    def answer(self, step: Step, *, lift: int | None = None) -> list[Frame]:
        """Of a device that agrees, or that lifts another token far above all others."""
        codes = np.zeros(6, np.int8)
        if lift is not None:
            codes = (127 * np.sign(toy_basis().codes[lift])).astype(np.int8)
        frame = Correct(epoch=step.epoch, session=7, pos=step.pos, codes=codes, scale=np.float16(2.0 if lift else 0.0))
        return self.cloud.on_frame(frame, self.now_s)


def _steps(frames: list[Frame]) -> list[Step]:
    return [frame for frame in frames if isinstance(frame, Step)]


def _tokens(frames: list[Frame]) -> list[int]:
    return [int(token) for frame in frames if isinstance(frame, Tokens) for token in frame.tokens]


def test_one_wait_by_hand() -> None:
    desk = Desk()
    (asked,) = _steps(desk.step())
    assert asked.pos == 5 and desk.cloud.num_branches == 3
    # All three go on at once, each under its own epoch, and nobody else's row would come after them.
    ahead = _steps(desk.step())
    assert [step.pos for step in ahead] == [6, 6, 6] and len({asked.epoch, *(step.epoch for step in ahead)}) == 4
    assert desk.cloud.chance < 0.5
    assert desk.places is not None and len(desk.places.cursors) == 4
    # Each waits in its turn: its gate fires too, and a branch has no branches.
    assert not desk.cloud.wants_step()
    # The second branch's answer comes first, and decides nothing yet.
    assert desk.answer(ahead[1]) == []
    assert desk.cloud.num_confirmed == 5
    # The device agrees at the open position: the first branch, that of the base token, is the text.
    frames = desk.answer(asked)
    assert _tokens(frames) == [asked.base_token]
    assert desk.cloud.epoch == ahead[0].epoch and desk.cloud.num_confirmed == 6
    assert desk.cloud.counters.num_branches_kept == 1 and desk.cloud.counters.num_delayed == 0
    assert desk.cloud.counters.num_wasted_steps == 2
    # Its own wait is the next one that is bridged; the places of the others are given back in the next pass.
    assert desk.cloud.num_branches == 3
    desk.step()
    assert len(desk.places.cursors) == 4


def test_the_second_branch_is_right() -> None:
    desk = Desk()
    (asked,) = _steps(desk.step())
    second = desk.cloud._text.candidates(3)[1]
    ahead = _steps(desk.step())
    desk.answer(ahead[1])
    # What was asked of that branch comes out with the answer that makes it the text.
    personal = _lifted_into_second_place(desk, asked, second)
    frames = personal
    assert _tokens(frames)[0] == second and len(_tokens(frames)) == 2
    assert desk.cloud.tokens[5] == second and desk.cloud.counters.num_rollbacks == 1
    assert desk.cloud.counters.num_branches_kept == 1 and desk.cloud.counters.num_delayed == 0


def _lifted_into_second_place(desk: Desk, asked: Step, second: int) -> list[Frame]:
    """A correction that makes `second` the first choice."""
    pending = desk.cloud._text._pending[5]
    for scale in np.linspace(0.05, 8.0, 160):
        codes = (127 * np.sign(toy_basis().codes[second])).astype(np.int8)
        correction = Correct(epoch=asked.epoch, session=7, pos=5, codes=codes, scale=np.float16(scale))
        delta = toy_basis().delta(correction)  # type: ignore[arg-type]
        if int((pending.logits + delta).argmax()) == second:
            return desk.cloud.on_frame(correction, desk.now_s)
    raise AssertionError("no correction lifts it")


def test_where_no_branch_is_right_the_text_goes_on_as_if_nobody_had_branched() -> None:
    desk = Desk(max_branches=2)
    (asked,) = _steps(desk.step())
    desk.step()
    pending = desk.cloud._text._pending[5]
    third = int(np.argsort(-pending.logits, kind="stable")[2])
    frames = _lifted_into_second_place(desk, asked, third)
    assert _tokens(frames) == [third] and desk.cloud.num_branches == 0
    found = desk.cloud.counters
    assert (found.num_branchings, found.num_branches_kept, found.num_delayed) == (1, 0, 1)
    (after,) = _steps(desk.step())
    assert after.pos == 6 and desk.cloud.tokens[5] == third


def test_a_branch_that_had_no_row_yet_is_forked_when_it_is_the_text() -> None:
    desk = Desk()
    (asked,) = _steps(desk.step())
    assert _tokens(desk.answer(asked)) == [asked.base_token]
    (after,) = _steps(desk.step())
    assert after.pos == 6 and desk.places is not None
    expected = ToyBackbone().cursor().extend(np.array([*toy_prompt(1), asked.base_token]))
    assert after.base_token == int(expected.logits.argmax())


def test_a_plan_for_other_places_is_given_up() -> None:
    desk = Desk()
    desk.step()
    plan = desk.plan()
    lost = BranchPlaces(99, desk.backbone.cursor())
    with pytest.raises(StepAbandonedError):
        plan.prepare(lost)


def test_a_lost_cache_ends_all_branches_and_the_text_is_read_again() -> None:
    desk = Desk()
    (asked,) = _steps(desk.step())
    plan = desk.plan()
    desk.cloud.forget_cache()
    assert desk.cloud.num_branches == 0 and not desk.cloud.is_current(plan) and not desk.cloud.wants_step()
    desk.places = None
    assert _tokens(desk.answer(asked)) == [asked.base_token]
    frames: list[Frame] = []
    while not frames:
        frames = desk.step()
    assert [step.pos for step in _steps(frames)] == [6]


def test_a_device_that_comes_back_finds_the_text_and_no_branches() -> None:
    desk = Desk()
    (asked,) = _steps(desk.step())
    ahead = _steps(desk.step())
    desk.cloud.resume([], 0, 0.0)
    assert desk.cloud.num_branches == 0
    assert desk.answer(ahead[0]) == []
    again = []
    while not again:
        again = _steps(desk.step())
    assert (again[0].pos, again[0].base_token) == (5, asked.base_token) and again[0].epoch != asked.epoch


def test_tokens_that_end_the_text_are_no_branches() -> None:
    stream = CloudStream(7, toy_prompt(1), [], _config(), toy_basis())
    desk = Desk()
    desk.cloud = BranchingStream(stream, 5)
    desk.step()
    stream._pending[5].logits[STOP] = 1e3
    assert STOP not in stream.candidates(5) and len(stream.candidates(5)) == 4
