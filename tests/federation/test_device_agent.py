"""What a device measures of itself, also where the system does not tell."""

from __future__ import annotations

import sys

import pytest
from federated import ToyFederation

from cotune.federation.coordinator import RoundRules
from cotune.federation.device_agent import peak_of_process


def test_a_round_tells_the_memory_of_the_largest_process() -> None:
    record = ToyFederation(num_devices=2, rules=RoundRules(num_rounds=1)).run().records[0]
    # Six digits of it are sent.
    assert record.device_peak_bytes == pytest.approx(peak_of_process()["peak_bytes"], rel=0.05)


def test_without_the_module_resource_the_memory_is_unknown_and_the_round_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_of_process() == {}
    record = ToyFederation(num_devices=2, rules=RoundRules(num_rounds=1)).run().records[0]
    assert (record.verdict, record.counted, record.device_peak_bytes) == ("accepted", ["d0", "d1"], None)
