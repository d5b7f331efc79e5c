"""The batch: who is in it, in which order, and how much room there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import pytest
from toy import ToyBackbone, layered_gate, toy_gate, toy_model

from cotune.cloud.engine import Engine, EngineConfig
from cotune.cloud.row import Place
from cotune.cloud.stream import StepPlan
from cotune.errors import CotuneError, InputError
from cotune.generation.gate import Gate
from cotune.generation.protocols import RowWork, StepAbandonedError, StepFeatures


class Script:
    """Steps of a row: reads a prompt in pieces, then a number of tokens."""

    def __init__(self, num_prompt: int, num_steps: int, chance: float = 1.0) -> None:
        self.num_prompt = num_prompt
        self.chance = chance
        self.gate: Gate | None = None
        self.num_cached = 0
        self.num_steps = num_steps
        self.is_paused = False
        self.is_dropped = False

    @property
    def is_in_prompt(self) -> bool:
        return self.num_cached < self.num_prompt

    def wants_step(self) -> bool:
        return not self.is_paused and self.num_cached < self.num_prompt + self.num_steps

    def plan(self, prompt_chunk: int) -> StepPlan:
        first = self.num_cached
        last = first + 1
        if self.is_in_prompt:
            last = min(self.num_prompt, (first // prompt_chunk + 1) * prompt_chunk)
        return StepPlan(epoch=0, truncate_to=first, token_ids=np.arange(first, last), num_outputs=1)

    def is_current(self, plan: StepPlan) -> bool:
        return not self.is_dropped

    def forget_cache(self) -> None:
        self.num_cached = 0


class ScriptRow:
    def __init__(self, name: str, steps: Script) -> None:
        self.name = name
        self.steps = steps
        self.place = Place()
        self.is_blocked = False
        self.due_s: float | None = None
        self.shares: list[float] = []
        self.fired: list[bool | None] = []
        self.calls: list[str] = []
        self.done = asyncio.Event()

    def on_step(
        self, plan: StepPlan, features: Sequence[StepFeatures] | None, seconds: float, now_s: float, share: float
    ) -> None:
        self.shares.append(share)
        self.fired += [one.fires for one in features or ()]
        self.steps.num_cached = plan.truncate_to + len(plan.token_ids)
        if not self.steps.wants_step():
            self.done.set()

    def on_time(self, now_s: float) -> None:
        self.due_s = None
        self.calls.append("time")

    def on_idle(self, now_s: float) -> None:
        self.calls.append("idle")

    def on_failure(self, error: CotuneError) -> None:
        self.calls.append(str(error))
        self.done.set()


class WatchedBackbone(ToyBackbone):
    def __init__(self) -> None:
        self.passes: list[list[int]] = []
        self.gives_up = False

    def extend(self, work: Sequence[RowWork], is_wanted: Callable[[], bool] | None = None) -> list[list[StepFeatures]]:
        self.passes.append([len(item.token_ids) for item in work])
        if self.gives_up:
            raise StepAbandonedError
        return super().extend(work)


@pytest.fixture
def backbone() -> WatchedBackbone:
    return WatchedBackbone()


Maker = Callable[..., Engine]


@pytest.fixture
async def make(backbone: WatchedBackbone) -> AsyncIterator[Maker]:
    engines: list[Engine] = []

    def build(**limits: int) -> Engine:
        model = toy_model()
        object.__setattr__(model, "backbone", backbone)
        engines.append(Engine(model, EngineConfig(**limits)))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


async def finish(*rows: ScriptRow) -> None:
    for row in rows:
        await asyncio.wait_for(row.done.wait(), 5)


async def test_rows_share_passes_join_and_leave(make: Maker, backbone: WatchedBackbone) -> None:
    engine = make()
    short, long = ScriptRow("short", Script(3, 2)), ScriptRow("long", Script(3, 6))
    engine.start(short)
    engine.start(long)
    await finish(short)
    late = ScriptRow("late", Script(2, 1))
    engine.start(late)
    await finish(long, late)
    assert backbone.passes[0] == [3, 3]
    assert [len(one) for one in backbone.passes[:3]] == [2, 2, 2]
    assert sorted(backbone.passes[3]) in ([1], [1, 2])
    assert short.shares == [0.5, 0.5, 0.5]
    assert engine.counters.num_row_steps == sum(len(one) for one in backbone.passes)
    assert engine.counters.queue_s >= 0


async def test_long_prompts_are_read_in_pieces_beside_others(make: Maker, backbone: WatchedBackbone) -> None:
    engine = make(max_prompt_tokens=5)
    talker, reader, other = (
        ScriptRow("talker", Script(1, 9)),
        ScriptRow("reader", Script(23, 1)),
        ScriptRow("other", Script(7, 1)),
    )
    for row in (talker, reader, other):
        engine.start(row)
    await finish(talker, reader, other)
    # At most one piece of 5 tokens in a pass, and never one alone while the talker had something to say.
    assert all(sum(n for n in one if n > 1) <= 5 for one in backbone.passes)
    assert all(1 in one for one in backbone.passes[1:9])


@pytest.mark.parametrize("gate", [toy_gate(), layered_gate(0.3)], ids=["linear", "layer"])
async def test_gates_of_a_pass_are_asked_at_once(make: Maker, gate: Gate) -> None:
    engine = make()
    plain, gated = ScriptRow("plain", Script(1, 6)), ScriptRow("gated", Script(1, 6))
    gated.steps.gate = gate
    engine.start(plain)
    engine.start(gated)
    await finish(plain, gated)
    assert plain.fired == [None] * 7
    cursor = ToyBackbone().cursor()
    expected = [gate.consults(cursor.extend(np.array([token])).hidden) for token in range(7)]
    assert gated.fired == expected
    assert len(set(expected)) == 2


async def test_waiting_rows_cost_nothing(make: Maker, backbone: WatchedBackbone) -> None:
    engine = make()
    busy, waiting, deaf = (
        ScriptRow("busy", Script(1, 5)),
        ScriptRow("waiting", Script(1, 5)),
        ScriptRow("deaf", Script(1, 5)),
    )
    waiting.steps.is_paused = True
    deaf.is_blocked = True
    for row in (busy, waiting, deaf):
        engine.start(row)
    await finish(busy)
    assert all(len(one) == 1 for one in backbone.passes)
    assert "idle" in waiting.calls
    waiting.steps.is_paused = False
    engine.wake()
    await finish(waiting)
    assert deaf.shares == []


async def test_who_runs_furthest_ahead_waits_when_the_batch_is_full(make: Maker, backbone: WatchedBackbone) -> None:
    engine = make(max_batch_rows=2)
    ahead = ScriptRow("ahead", Script(1, 4, chance=0.2))
    others = [ScriptRow(str(i), Script(1, 4)) for i in range(2)]
    engine.start(ahead)
    for row in others:
        engine.start(row)
    await finish(*others, ahead)
    # Five passes for the others, then it had the batch to itself.
    assert [len(one) for one in backbone.passes] == [2] * 5 + [1] * 5
    assert ahead.shares == [1.0] * 5


@pytest.mark.parametrize(("row_s", "num_rows"), [(1.0, 2), (0.0, 3)])
async def test_running_ahead_is_for_room_that_costs_little(
    make: Maker, backbone: WatchedBackbone, row_s: float, num_rows: int
) -> None:
    """Two rows that are sure of their step, one that is not: with a pass that is slower with every row it waits."""
    engine = make()
    for rows in range(1, 20):
        engine._pass_time.add(rows, 0.5 + row_s * rows)
    sure = [ScriptRow(str(i), Script(1, 4)) for i in range(2)]
    ahead = ScriptRow("ahead", Script(1, 4, chance=0.5))
    for row in (ahead, *sure):
        engine.start(row)
    await finish(*sure, ahead)
    assert {len(one) for one in backbone.passes[:5]} == {num_rows}
    assert len(ahead.shares) == 5


async def test_equal_rows_take_turns(make: Maker, backbone: WatchedBackbone) -> None:
    engine = make(max_batch_rows=2)
    rows = [ScriptRow(str(i), Script(1, 5)) for i in range(4)]
    for row in rows:
        engine.start(row)
    while len(backbone.passes) < 6:
        await asyncio.sleep(0.001)
    counts = [len(row.shares) for row in rows]
    assert max(counts) - min(counts) <= 1
    await finish(*rows)


async def test_blocks_are_set_aside_and_come_back(make: Maker) -> None:
    engine = make(max_blocks=5)
    first, second = ScriptRow("first", Script(3, 1)), ScriptRow("second", Script(3, 1))
    assert engine.reserve(first, 9)  # three blocks of 4 tokens
    assert engine.num_free_blocks == 2
    assert not engine.reserve(second, 12)
    assert engine.num_free_blocks == 2
    assert engine.reserve(first, 10)  # nothing more is needed
    engine.start(first)
    await finish(first)
    engine.put_out(first)
    assert (engine.num_free_blocks, first.place.cursor, first.steps.num_cached) == (5, None, 0)
    assert engine.reserve(second, 12)


async def test_a_pass_that_nobody_wants_is_not_begun(make: Maker, backbone: WatchedBackbone) -> None:
    engine = make()
    row = ScriptRow("row", Script(2, 0))
    row.steps.is_dropped = True
    engine.start(row)
    await finish(row)
    assert backbone.passes == []
    assert engine.counters.num_abandoned == 1


async def test_a_pass_may_give_up_in_the_middle(make: Maker, backbone: WatchedBackbone) -> None:
    engine = make()
    backbone.gives_up = True
    row = ScriptRow("row", Script(2, 0))
    engine.start(row)
    await finish(row)
    assert set(row.calls) <= {"idle"}
    assert engine.counters.num_abandoned == 1


async def test_rows_are_told_the_time(make: Maker) -> None:
    engine = make()
    row = ScriptRow("row", Script(1, 1))
    row.steps.is_paused = True
    row.due_s = 0.0
    engine.start(row)
    while "time" not in row.calls:
        await asyncio.sleep(0.001)
    engine.stop(row)
    assert engine.num_rows == 0


@pytest.mark.parametrize("name", ["max_batch_rows", "max_prompt_tokens", "max_blocks"])
def test_limits_are_checked(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 0"):
        EngineConfig(**{name: 0})
