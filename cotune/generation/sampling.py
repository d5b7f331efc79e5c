"""From logits to one token: greedy, temperature, top-p, all as a pure function of (logits, seed, position).

The device often knows the base logits of only the k likeliest tokens. `choose_certified` then either proves
which token the full vocabulary would give, or says that it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.generation.noise import gumbel

# Sums of probabilities in another order differ in the last bits. A certificate keeps this far from the edge.
_MASS_MARGIN = 1e-9


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from logits.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the smallest set of likeliest tokens whose probabilities add up to at least this.
        seed: key of the noise, 0 <= seed < 2^64; not used when greedy.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise InputError(f"temperature is {self.temperature}, expected a number from 0 (greedy) to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p is {self.top_p}, expected a number above 0 and at most 1")
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed is {self.seed}, expected an integer from 0 to 2^64 - 1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_mass(self) -> bool:
        """Whether the choice depends on the total probability, and not on the largest scores alone."""
        return not self.is_greedy and self.top_p < 1.0


def choose(logits: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """Choose the token at `position` from the logits of the whole vocabulary, float32 (vocab,).

    Ties go to the lowest id.

    Example:
        >>> choose(np.array([0.0, 2.0, 1.0], np.float32), Sampling(), position=0)
        1
    """
    if sampling.is_greedy:
        return int(logits.argmax())
    ids, scores = _scored(logits, sampling, position)
    return int(ids[scores.argmax()])


def likeliest(logits: NDArray[np.float32], sampling: Sampling, position: int, num: int) -> list[int]:
    """The `num` tokens with the best scores, the one of `choose` first.

    Example:
        >>> likeliest(np.array([0.0, 2.0, 1.0], np.float32), Sampling(), position=0, num=2)
        [1, 2]
    """
    ids, scores = _scored(logits, sampling, position)
    # Stable, so that equal scores keep the order of their ids.
    order = np.argsort(-scores, kind="stable")[:num]
    return [int(token) for token in ids[order]]


def _scored(
    logits: NDArray[np.float32], sampling: Sampling, position: int
) -> tuple[NDArray[np.int64], NDArray[np.floating[Any]]]:
    """The tokens that may be chosen, and what they are chosen by: the largest wins."""
    ids = np.arange(len(logits), dtype=np.int64)
    if sampling.is_greedy:
        return ids, logits
    scaled = logits.astype(np.float64) / sampling.temperature
    if sampling.needs_mass:
        order = np.argsort(-scaled, kind="stable")
        weights = np.exp(scaled[order] - scaled[order[0]])
        # A token is kept while the tokens before it hold less than top_p of the mass.
        before = np.cumsum(weights) - weights
        ids = np.sort(order[before < sampling.top_p * weights.sum()])
    return ids, scaled[ids] + gumbel(sampling.seed, position, ids)


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of softmax(logits), float64 (vocab,), at temperature 1.

    Example:
        >>> log_probabilities(np.zeros(4, np.float32)).round(3)
        array([-1.386, -1.386, -1.386, -1.386])
    """
    wide = logits.astype(np.float64)
    return np.asarray(wide - (wide.max() + np.log(np.exp(wide - wide.max()).sum())))


def most_probable(logprobs: NDArray[np.float64], num: int) -> tuple[tuple[int, float], ...]:
    """The `num` likeliest tokens and the logarithms of their probabilities, the likeliest first.

    Example:
        >>> most_probable(np.array([-2.0, -1.0, -3.0]), num=2)
        ((1, -1.0), (0, -2.0))
    """
    best = np.argsort(-logprobs, kind="stable")[:num]
    return tuple((int(token), float(logprobs[token])) for token in best)


@dataclass(frozen=True, kw_only=True)
class PartialLogits:
    """The largest base logits of one position, as a device knows them.

    Attributes:
        ids: int64 (k,), ascending.
        logits: float32 (k,); every token not listed has a base logit of at most their minimum.
        log_normalizer: log sum exp of logits / temperature over the whole vocabulary; needed when top_p < 1.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    log_normalizer: float | None = None


def top_logits(logits: NDArray[np.float32], k: int, sampling: Sampling) -> PartialLogits:
    """The k largest of float32 (vocab,) logits, and the normaliser where the certificate will need it."""
    if k >= len(logits):
        ids = np.arange(len(logits), dtype=np.int64)
    else:
        ids = np.sort(np.argpartition(logits, len(logits) - k)[len(logits) - k :]).astype(np.int64)
    log_normalizer = None
    if sampling.needs_mass:
        scaled = logits.astype(np.float64) / sampling.temperature
        largest = scaled.max()
        log_normalizer = float(largest + np.log(np.exp(scaled - largest).sum()))
    return PartialLogits(ids=ids, logits=logits[ids], log_normalizer=log_normalizer)


def choose_certified(
    base: PartialLogits,
    delta: NDArray[np.float32],
    sampling: Sampling,
    position: int,
    *,
    adds_base: bool = True,
) -> int | None:
    """The token that `choose` would give on the full z + delta, or None where that cannot be proved.

    Args:
        base: what is known of z.
        delta: float32 (vocab,), known for all tokens.
        sampling, position: as for `choose`.
        adds_base: False where delta alone is the output (ladder, separation); then nothing of z is needed.

    The proof: a token j outside the list has z_j <= z_min, so its score is at most z_min + delta_j (plus its
    noise). If the best listed score is above the best such bound, the listed token wins. For top-p the mass of
    the unlisted tokens lies between two bounds, from the normaliser and the extremes of delta there; the proof
    holds when both bounds keep the same tokens and none unlisted can be among them.
    """
    if not adds_base:
        return choose(delta, sampling, position)
    if len(base.ids) == len(delta):
        return choose(base.logits + delta, sampling, position)
    # float32 addition rounds monotonically, so this bound on z_j + delta_j holds after rounding too.
    bound = base.logits.min() + delta
    bound[base.ids] = -np.inf
    integrated = base.logits + delta[base.ids]
    if sampling.is_greedy:
        best = int(integrated.argmax())
        return int(base.ids[best]) if integrated[best] > bound.max() else None
    if sampling.needs_mass:
        return _choose_certified_top_p(base, delta, integrated, bound, sampling, position)
    noise = gumbel(sampling.seed, position, np.arange(len(delta), dtype=np.int64))
    scores = integrated.astype(np.float64) / sampling.temperature + noise[base.ids]
    best = int(scores.argmax())
    outside = (bound.astype(np.float64) / sampling.temperature + noise).max()
    return int(base.ids[best]) if scores[best] > outside else None


def _choose_certified_top_p(
    base: PartialLogits,
    delta: NDArray[np.float32],
    integrated: NDArray[np.float32],
    bound: NDArray[np.float32],
    sampling: Sampling,
    position: int,
) -> int | None:
    if base.log_normalizer is None:
        return None
    temperature = sampling.temperature
    scaled = integrated.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    largest = scaled[order[0]]
    weights = np.exp(scaled[order] - largest)
    before = np.cumsum(weights) - weights
    listed = weights.sum()

    base_scaled = base.logits.astype(np.float64) / temperature
    base_mass = np.exp(base_scaled - base.log_normalizer).sum()
    # The cloud's normaliser carries rounding of its own: keep the tail's upper bound safely above it.
    tail_high = max(0.0, 1.0 - base_mass) + _MASS_MARGIN
    tail_low = max(0.0, 1.0 - base_mass - _MASS_MARGIN)
    is_outside = np.isfinite(bound)
    outside_delta = delta[is_outside].astype(np.float64) / temperature
    rescale = base.log_normalizer - largest
    high = listed + tail_high * np.exp(rescale + outside_delta.max())
    low = listed + tail_low * np.exp(rescale + outside_delta.min())

    margin = _MASS_MARGIN * high
    num_kept = int((before < sampling.top_p * low - margin).sum())
    if num_kept != int((before < sampling.top_p * high + margin).sum()) or num_kept == 0:
        return None
    kept = order[:num_kept]
    if num_kept == len(order) or integrated[kept].min() <= bound.max():
        return None
    ids = base.ids[kept]
    ascending = np.argsort(ids)
    ids = ids[ascending]
    scores = scaled[kept][ascending] + gumbel(sampling.seed, position, ids)
    return int(ids[scores.argmax()])
