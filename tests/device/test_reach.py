"""Whether a cloud is within reach: the waits between tries, by hand, and what counts as an answer."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from toy import toy_model

from cotune.device.reach import CloudReach, ReachConfig
from cotune.errors import ConnectionLostError, CotuneError, InputError, MismatchError, WireTimeoutError
from cotune.wire.inprocess import connection_pair

DESCRIPTION = toy_model().description


class Cloud:
    """Answers what it is told to, in turn; the last for ever."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)
        self.num_tries = 0

    async def greet(self) -> Any:
        self.num_tries += 1
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, CotuneError):
            raise outcome
        if outcome == "silent":
            await asyncio.sleep(60)
        return DESCRIPTION, outcome


class Clock:
    """Sleeps in no time and remembers for how long; the loop runs between."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        await asyncio.sleep(0)


AWAY = ConnectionLostError("no cloud answers")


async def test_a_cloud_that_answers_is_there() -> None:
    cloud = Cloud(None)
    reach = CloudReach(cloud.greet)
    assert not reach.is_away and reach.description is None
    assert await reach.greet() == DESCRIPTION == reach.description
    assert await reach.answers(1.0) and cloud.num_tries == 2
    await reach.close()


async def test_it_is_tried_at_once_and_then_with_longer_and_longer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    cloud, clock = Cloud(*[AWAY] * 6, None), Clock()
    reach = CloudReach(cloud.greet, ReachConfig(first_wait_s=1, max_wait_s=5), sleep=clock.sleep)
    reach.note_away(ConnectionLostError("cut"))
    assert reach.is_away and reach.why == "cut" and reach.num_outages == 1
    async with asyncio.timeout(10):
        await reach.wait_until_back()
    assert clock.waits == [0, 1, 2, 4, 5, 5, 5] and cloud.num_tries == 7
    assert not reach.is_away and reach.why == "" and reach.description == DESCRIPTION
    # Away again before it did anything: the waits go on where they were; afterwards they begin anew.
    reach.note_away(AWAY)
    await reach.wait_until_back()
    assert clock.waits[7:] == [5] and reach.num_outages == 2
    reach.note_progress()
    reach.note_away(AWAY)
    await reach.wait_until_back()
    assert clock.waits[8:] == [0]
    await reach.close()


async def test_the_reason_is_that_of_the_last_try_and_another_model_is_no_answer() -> None:
    cloud, clock = Cloud(MismatchError("another model"), AWAY, None), Clock()
    reach = CloudReach(cloud.greet, sleep=clock.sleep)
    reach.note_away(ConnectionLostError("cut"))
    reasons = set()
    while reach.is_away:
        reasons.add(reach.why)
        await asyncio.sleep(0)
    assert {"cut", "another model", "no cloud answers"} <= reasons
    await reach.close()


async def test_one_probe_is_enough_for_all_who_found_it_away() -> None:
    cloud, clock = Cloud("silent"), Clock()
    reach = CloudReach(cloud.greet, sleep=clock.sleep)
    for _ in range(3):
        reach.note_away(AWAY)
        await asyncio.sleep(0.01)
    assert cloud.num_tries == 1 and reach.num_outages == 1
    await reach.close()
    assert reach.is_away


async def test_silence_is_no_answer() -> None:
    reach = CloudReach(Cloud("silent").greet)
    assert not await reach.answers(0.01)
    with pytest.raises(WireTimeoutError, match=r"does not answer within 0\.01 s; is the network there"):
        await reach.greet(0.01)


async def test_connections_of_probes_are_closed() -> None:
    device, _ = connection_pair()
    reach = CloudReach(Cloud(device).greet)
    await reach.greet()
    assert not device.closed
    await reach.close()
    assert device.closed


async def test_a_slow_network_is_given_more_time() -> None:
    times = iter([10.0, 11.5, 20.0, 30.0, 40.0, 40.1])
    reach = CloudReach(Cloud(None).greet, ReachConfig(patience_s=0.8), clock=lambda: next(times))
    assert reach.patience_s == 0.8
    await reach.greet()
    assert reach.patience_s == 4.5
    await reach.greet()
    assert reach.patience_s == 10.0
    await reach.greet()
    assert reach.patience_s == 0.8


@pytest.mark.parametrize("name", ["patience_s", "probe_timeout_s", "first_wait_s", "max_wait_s"])
def test_impossible_waits_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 0, expected a number above 0"):
        ReachConfig(**{name: 0})
