from __future__ import annotations

import pytest
import torch

from cotune.errors import InputError
from cotune.evaluation.measured_flops import measure_flops_per_s
from cotune.evaluation.model_shape import ModelShape
from cotune.evaluation.workload import Workload

SHAPE = ModelShape(hidden=64, inner=128, layers=1, heads=2, kv_heads=2, head_dim=32, vocab=10)


def test_a_rate_is_found_and_the_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    rate = measure_flops_per_s(SHAPE, Workload(length=32), num_threads=before + 1, seconds=0.01)
    assert 1e6 < rate < 1e15
    assert torch.get_num_threads() == before


def test_a_missing_device_is_refused() -> None:
    with pytest.raises(InputError, match="device is 'warp:1', which cannot be used here"):
        measure_flops_per_s(SHAPE, Workload(), device="warp:1")
