"""Privacy for forward-only tuning: the scalar that a step takes from the data is clipped per example and made noisy.

DP-ZO (Tang et al., arXiv 2401.04343), for one direction:

    g = (sum_i clip(g_i, -C, C) + N(0, (sigma C)^2)) / B,   g_i = (L_i(theta + eps z) - L_i(theta - eps z)) / (2 eps)

Symbols: C is `clip`, sigma `noise_multiplier`, B `num_examples`. The direction is random and public; all that an
update tells of the data is g. Adding or removing one example changes the sum by at most C, so a step with one direction
is a Gaussian mechanism with noise multiplier sigma, subsampled as the batches are; q directions are q of them.

What it does not cover: the losses that the loop reports are of the data, without noise. The noise comes from a seeded
generator, so that a run can be resumed: the seed must be drawn at random and stay secret like the data, and the
generator, Philox, is not a cryptographic one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from cotune.errors import InputError


class ScalarNoise(Protocol):
    """Makes one scalar of the examples' own slopes."""

    def __call__(self, slopes: Tensor, *, step: int, index: int) -> float:
        """The scalar that the update uses.

        Args:
            slopes: g_i of each example, float64 (examples,).
            step, index: which direction of which step, counted from 0; the same ones get the same noise.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class GaussianScalarNoise:
    """Clipping and Gaussian noise; see this module's head.

    Example:
        >>> import torch
        >>> noise = GaussianScalarNoise(clip=1.0, noise_multiplier=0.0, num_examples=4, seed=0)
        >>> noise(torch.tensor([0.5, 30.0, -2.0, -0.25]), step=0, index=0)
        0.0625
    """

    clip: float
    """Largest size of one example's slope, nats per token and unit step along z."""
    noise_multiplier: float
    """Standard deviation of the noise, in units of `clip`."""
    num_examples: float
    """What the sum is divided by: the expected batch size, never the size that came, which is private under Poisson
    sampling."""
    seed: int = field(repr=False)
    """Of the noise, 0 or more; a secret."""

    def __post_init__(self) -> None:
        for name, value in (("clip", self.clip), ("num_examples", self.num_examples)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}, expected a positive number")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise InputError(f"noise_multiplier is {self.noise_multiplier}, expected 0 or more")
        if self.seed < 0:
            raise InputError("seed is negative, expected 0 or more; draw one with secrets.randbits(128)")

    def __call__(self, slopes: Tensor, *, step: int, index: int) -> float:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, step, index))))
        noise = self.noise_multiplier * self.clip * float(generator.standard_normal())
        return (float(slopes.double().clamp(-self.clip, self.clip).sum()) + noise) / self.num_examples
