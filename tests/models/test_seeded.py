from __future__ import annotations

import pytest
import torch

from cotune.models.seeded import seeded


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    draws = []
    for seed in ((1, 2), (1, 2), (1, 3), (2,)):
        with seeded(*seed):
            draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[1]
    assert draws[0] != draws[2] != draws[3]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_generator_comes_back_on_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(1):
        torch.rand(4)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)
