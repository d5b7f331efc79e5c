"""Costs while a text grows, by hand."""

from __future__ import annotations

import pytest

from cotune.device.serve.costs import RunningCosts
from cotune.generation.request import Decision

AGREED = Decision(token_id=1, base_token_id=1, consulted=True)
CHANGED = Decision(token_id=2, base_token_id=1, consulted=True)
ALONE = Decision(token_id=1, base_token_id=1, consulted=False)


@pytest.mark.parametrize(("waits", "trips"), [(True, 0.75), (False, 0.25)])
def test_trips_are_those_that_the_schedule_waits_for(waits: bool, trips: float) -> None:
    costs = RunningCosts(waits_for_device=waits)
    for decision in (AGREED, CHANGED, ALONE, AGREED):
        costs.add(decision)
    assert costs.so_far(bytes_down=9, bytes_up=5, seconds=0.1) == {
        "M": trips,
        "consult_rate": 0.75,
        "disagree_rate": 0.25,
        "bytes_down": 9,
        "bytes_up": 5,
        "ms_per_token": 25.0,
    }
