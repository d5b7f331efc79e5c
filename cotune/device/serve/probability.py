"""How likely a token was, from what a device knows: its own delta, and the largest base logits.

    p = exp(z_t + delta_t) / sum_j exp(z_j + delta_j)

The k listed tokens are known exactly. An unlisted token has z_j between minus infinity and the smallest listed logit,
so that its share lies between 0 and exp(z_min + delta_j). Where the cloud sent the base model's normaliser, the
mass of the unlisted tokens is known too, and only delta's spread over them is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.generation.sampling import PartialLogits, Sampling

# A probability is told as one number where its bounds are no further apart.
_CLEAR = 0.02


@dataclass(frozen=True)
class Bounds:
    """A probability lies between `low` and `high`, at temperature 1."""

    low: float
    high: float

    @property
    def middle(self) -> float | None:
        """One number for it; None where it is not known well enough."""
        return (self.low + self.high) / 2 if self.high - self.low <= _CLEAR else None


def probability_bounds(
    base: PartialLogits, delta: NDArray[np.float32], token_id: int, sampling: Sampling, *, adds_base: bool
) -> Bounds | None:
    """Bounds for the probability of `token_id` before temperature and top-p, or None where nothing is known.

    Args:
        base: what is known of z.
        delta: float32 (vocab,).
        token_id: the token that was chosen.
        sampling: what a normaliser in `base` was computed for.
        adds_base: False where delta alone is the output.
    """
    shift = delta.astype(np.float64)
    if not adds_base:
        return Bounds(*2 * (float(np.exp(shift[token_id] - _log_sum_exp(shift))),))
    place = int(np.searchsorted(base.ids, token_id))
    if place == len(base.ids) or base.ids[place] != token_id:
        return None
    scores = base.logits.astype(np.float64) + shift[base.ids]
    largest = scores.max()
    own, listed = np.exp(scores[place] - largest), np.exp(scores - largest).sum()
    is_outside = np.ones(len(shift), bool)
    is_outside[base.ids] = False
    outside = shift[is_outside]
    if len(outside) == 0:
        return Bounds(float(own / listed), float(own / listed))
    least, most = 0.0, float(np.exp(float(base.logits.min()) + _log_sum_exp(outside) - largest))
    if base.log_normalizer is not None and sampling.temperature in (0.0, 1.0) and sampling.needs_mass:
        tail = np.exp(base.log_normalizer) - np.exp(base.logits.astype(np.float64)).sum()
        tail = max(0.0, float(tail))
        least = tail * float(np.exp(outside.min() - largest))
        most = min(most, tail * float(np.exp(outside.max() - largest)))
    return Bounds(float(own / (listed + most)), float(own / (listed + min(least, most))))


def _log_sum_exp(values: NDArray[np.float64]) -> float:
    largest = values.max()
    return float(largest + np.log(np.exp(values - largest).sum()))
