"""The gate: for each token, is the device worth asking? NumPy, so that device and cloud share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A linear gate on the final hidden state: SPA (arXiv 2403.07088), section 3, equation 1.

        sigma = 1[w . f + b > threshold]

    SPA writes argmax softmax(f M_c) with M_c (hidden, 2); w is the difference of its two columns.

    Attributes:
        weight: w, float32 (hidden,).
        bias: b.
        threshold: the score above which the device is asked; lower asks more often.

    Example:
        >>> gate = Gate(weight=np.array([1.0, -1.0], np.float32), bias=0.5)
        >>> gate.consults(np.array([0.2, 0.1], np.float32)), gate.consults(np.array([0.0, 1.0], np.float32))
        (True, False)
    """

    weight: NDArray[np.float32]
    bias: float = 0.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.weight.ndim != 1 or self.weight.dtype != np.float32:
            raise InputError(f"gate weight is {self.weight.dtype} {self.weight.shape}, expected float32 (hidden,)")
        if not np.isfinite(self.weight).all() or not np.isfinite([self.bias, self.threshold]).all():
            raise InputError("the gate holds nan or inf, expected finite numbers; tune it again")

    def score(self, hidden: NDArray[np.float32]) -> float:
        """w . f + b for one position, summed in float64 so that the order of summation hardly matters.

        Args:
            hidden: float32 (hidden,).

        Raises:
            InputError: `hidden` has another length than the weight.
        """
        if hidden.shape != self.weight.shape:
            raise InputError(
                f"the hidden state has shape {hidden.shape}, expected {self.weight.shape} for this gate; "
                "tune the gate on this backbone"
            )
        return float(_dots(self.weight, hidden) + self.bias)

    def consults(self, hidden: NDArray[np.float32]) -> bool:
        """Whether the device is asked at this position (sigma = 1)."""
        return self.score(hidden) > self.threshold


def consult_many(gates: Sequence[Gate | None], hidden: NDArray[np.float32]) -> list[bool]:
    """`consults` of many gates at once, each on its own row of `hidden`, as one gathered product.

    Args:
        gates: one for each row; None always asks.
        hidden: float32 (rows, hidden).
    """
    gated = [i for i, gate in enumerate(gates) if gate is not None]
    answers = [True] * len(gates)
    if gated:
        rows = [gate for gate in gates if gate is not None]
        scores = _dots(np.stack([gate.weight for gate in rows]), hidden[gated])
        for i, gate, score in zip(gated, rows, scores.tolist(), strict=True):
            answers[i] = score + gate.bias > gate.threshold
    return answers


def _dots(weights: NDArray[np.float32], hidden: NDArray[np.float32]) -> NDArray[np.float64]:
    # Not a matrix product: this one adds each row in the same order, however many there are.
    sums: NDArray[np.float64] = (weights.astype(np.float64) * hidden).sum(axis=-1)
    return sums
