from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from cotune.errors import InputError
from cotune.tuning.scalar_noise import GaussianScalarNoise


def test_slopes_are_clipped_one_by_one_and_averaged() -> None:
    noise = GaussianScalarNoise(clip=2.0, noise_multiplier=0.0, num_examples=8, seed=1)
    assert noise(torch.tensor([1.0, 5.0, -9.0, 0.25]), step=0, index=0) == (1 + 2 - 2 + 0.25) / 8


def test_the_noise_has_the_stated_scale() -> None:
    """Standard deviation sigma C / B = 1.5 * 0.4 / 10; n draws tell it to 1 / sqrt(2 n)."""
    noise = GaussianScalarNoise(clip=0.4, noise_multiplier=1.5, num_examples=10, seed=2)
    num = 4000
    draws = np.array([noise(torch.tensor([0.1, 0.3]), step=step, index=0) for step in range(num)])
    scale = 1.5 * 0.4 / 10
    assert abs(draws.std() / scale - 1) < 4 / math.sqrt(2 * num)
    assert abs(draws.mean() - 0.04) < 4 * scale / math.sqrt(num)
    within = np.mean(np.abs(draws - 0.04) < scale)
    assert abs(within - 0.6827) < 0.03, "a Gaussian has 68 % within one standard deviation"
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / math.sqrt(num)


def test_the_noise_is_the_same_for_the_same_step_and_no_other() -> None:
    noise = GaussianScalarNoise(clip=1.0, noise_multiplier=1.0, num_examples=1, seed=2**127)
    slopes = torch.zeros(3)
    draws = {noise(slopes, step=step, index=index) for step in range(5) for index in range(3)}
    assert len(draws) == 15
    assert noise(slopes, step=4, index=2) in draws
    other = GaussianScalarNoise(clip=1.0, noise_multiplier=1.0, num_examples=1, seed=3)
    assert other(slopes, step=0, index=0) not in draws


def test_the_seed_is_not_printed() -> None:
    assert "987" not in repr(GaussianScalarNoise(clip=1.0, noise_multiplier=1.0, num_examples=1, seed=987))


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": 0.0},
        {"clip": math.inf},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"num_examples": 0},
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        GaussianScalarNoise(**{"clip": 1.0, "noise_multiplier": 1.0, "num_examples": 1, "seed": 0, **changes})
    with pytest.raises(InputError, match="seed is negative"):
        GaussianScalarNoise(clip=1.0, noise_multiplier=1.0, num_examples=1, seed=-1)
