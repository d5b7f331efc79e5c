"""Update rules over seeds and scalars: momentum and Adam whose moments are never stored.

A step's gradient is G_t = 1/q sum_j g_tj z_tj, and z_tj comes back from its seed. So a moment is computed where it is
needed, a block of numbers at a time, from the slopes of the last K steps (the idea of AdaMeZO, arXiv 2605.00650):

    PlainDescent   theta <- (1 - lr wd) theta - lr G_t
    Momentum       theta <- (1 - lr wd) theta - lr m_t,                      m_t = sum_k b1^k G_{t-k} / sum_k b1^k
    Adam           theta <- (1 - lr wd) theta - lr m_t / (sqrt(v_t) + e),    v_t = sum_k b2^k G_{t-k}^2 / sum_k b2^k

with k from 0 to K - 1. Within the first K steps these are the bias-corrected moments of Adam (Kingma and Ba,
arXiv 1412.6980); later the tail is cut, b^K of the weight. It costs K q directions for each step, and nothing in
memory. With q = 1, z^2 = 1 makes v_t one number for all parameters: Adam then only rescales the step by the size of
recent slopes. Weight decay is decoupled, for matrices only, as in MeZO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cotune.errors import InputError
from cotune.tuning.in_place import Slope, by_step
from cotune.tuning.tuned_numbers import TunedNumbers


class UpdateRule(Protocol):
    """From slopes to an update."""

    @property
    def window(self) -> int:
        """Steps whose slopes are needed, the newest included."""
        ...

    def apply(
        self, numbers: TunedNumbers, slopes: Sequence[Slope], *, learning_rate: float, weight_decay: float
    ) -> None:
        """Change the numbers in place; with learning rate 0 they stay as they are to the last bit.

        Args:
            numbers: theta.
            slopes: of at most the last `window` steps, in order.
            learning_rate: lr.
            weight_decay: wd.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PlainDescent:
    """ZO-SGD, the rule of MeZO."""

    @property
    def window(self) -> int:
        return 1

    def apply(
        self, numbers: TunedNumbers, slopes: Sequence[Slope], *, learning_rate: float, weight_decay: float
    ) -> None:
        newest = by_step(slopes)[-1]
        numbers.add(
            [numbers.direction(slope.seed) for slope in newest],
            [-learning_rate * slope.value / len(newest) for slope in newest],
            keep=1 - learning_rate * weight_decay,
        )


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """A running mean of the gradients."""

    beta: float = 0.9
    """b1, how much of the mean stays at each step."""
    window: int = 20
    """K, steps that the mean looks back."""

    def __post_init__(self) -> None:
        _check_memory(self.window, beta=self.beta)

    def apply(
        self, numbers: TunedNumbers, slopes: Sequence[Slope], *, learning_rate: float, weight_decay: float
    ) -> None:
        steps = by_step(slopes)
        weights = _fading(len(steps), self.beta)
        each = [
            (slope.seed, w * slope.value / len(step)) for step, w in zip(steps, weights, strict=True) for slope in step
        ]
        numbers.add(
            [numbers.direction(seed, num_pages=1) for seed, _ in each],
            [-learning_rate * weight for _, weight in each],
            keep=1 - learning_rate * weight_decay,
        )


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Running means of the gradients and of their squares."""

    betas: tuple[float, float] = (0.9, 0.99)
    """b1 and b2, how much of each mean stays at each step."""
    window: int = 20
    """K, steps that the means look back."""
    epsilon: float = 1e-8
    """e, keeps the divisor from 0."""

    def __post_init__(self) -> None:
        _check_memory(self.window, **{f"betas[{i}]": beta for i, beta in enumerate(self.betas)})
        if not self.epsilon > 0:
            raise InputError(f"epsilon is {self.epsilon}, expected a positive number")

    def apply(
        self, numbers: TunedNumbers, slopes: Sequence[Slope], *, learning_rate: float, weight_decay: float
    ) -> None:
        if learning_rate == 0:
            return
        steps = by_step(slopes)
        directions = [[numbers.direction(slope.seed, num_pages=1) for slope in step] for step in steps]
        shares = [[slope.value / len(step) for slope in step] for step in steps]
        weights = [_fading(len(steps), beta) for beta in self.betas]
        for block in numbers.blocks():
            first = torch.zeros(block.num, dtype=block.exact_dtype, device=block.flat.device)
            second = torch.zeros_like(first)
            for step, share, weight_1, weight_2 in zip(directions, shares, *weights, strict=True):
                gradient = block.combine(step, share)
                first.add_(gradient, alpha=weight_1)
                second.addcmul_(gradient, gradient, value=weight_2)
            change = first.div_(second.sqrt_().add_(self.epsilon)).mul_(-learning_rate)
            block.change(change, keep=1 - learning_rate * weight_decay)


def _fading(num: int, beta: float) -> list[float]:
    """Weights of `num` steps, the oldest first; they sum to 1.

    Example:
        >>> _fading(2, 0.5)
        [0.3333333333333333, 0.6666666666666666]
    """
    weights = [beta ** (num - 1 - k) for k in range(num)]
    return [weight / sum(weights) for weight in weights]


def _check_memory(window: int, **betas: float) -> None:
    if window < 1:
        raise InputError(f"window is {window}, expected at least 1")
    for name, beta in betas.items():
        if not (math.isfinite(beta) and 0 <= beta < 1):
            raise InputError(f"{name} is {beta}, expected 0 <= {name} < 1")
