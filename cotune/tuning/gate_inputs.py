"""What a gate looks at: the hidden state, as in SPA, or with what the base model's logits say about its own doubt.

SPA's gate (arXiv 2403.07088, section 3) is linear in f. Token routers also read the logits (R2R, arXiv 2505.21600:
hidden state, token and top-100 logits; its baseline is entropy alone). With log p = z - log Z, largest first:

    entropy   - sum_K p log p - t log(t / (V - K)) ,  t = 1 - sum_K p
    margin    log p_1 - log p_2
    top_k     log p_1 .. log p_8

K are the known logits; entropy takes the tail as even and is exact where K is the vocabulary V. A study: serving gates
read the hidden state alone, and a cloud refuses a session whose gate is longer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.tuning.feature_set import FeatureSet

NUM_TOP = 8
"""Log probabilities that `top_k` gives."""


def base_entropy(features: FeatureSet, vocab_size: int) -> NDArray[np.float64]:
    """Entropy of the base distribution, nats, float64 (positions, 1); see this module's head."""
    log_p = _log_probabilities(features)
    known = -(np.exp(log_p) * log_p).sum(axis=1)
    tail = np.maximum(1.0 - np.exp(log_p).sum(axis=1), 0.0)
    num_tail = max(vocab_size - log_p.shape[1], 1)
    # t log t is 0 at t = 0.
    spread = np.where(tail > 0, tail * (np.log(np.where(tail > 0, tail, 1.0)) - np.log(num_tail)), 0.0)
    entropy: NDArray[np.float64] = (known - spread)[:, None]
    return entropy


def base_margin(features: FeatureSet, vocab_size: int) -> NDArray[np.float64]:
    """log p of the first choice less that of the second, float64 (positions, 1)."""
    log_p = _largest(features, 2)
    return log_p[:, :1] - log_p[:, 1:]


def base_top(features: FeatureSet, vocab_size: int) -> NDArray[np.float64]:
    """log p of the `NUM_TOP` largest, float64 (positions, NUM_TOP)."""
    return _largest(features, NUM_TOP)


_Columns = Callable[[FeatureSet, int], NDArray[np.float64]]

GATE_INPUTS: dict[str, tuple[_Columns, ...]] = {
    "hidden": (),
    "hidden+entropy": (base_entropy,),
    "hidden+margin": (base_margin,),
    "hidden+top_k": (base_top,),
    "hidden+all": (base_entropy, base_margin, base_top),
}
"""What is put behind the hidden state, by the name of the choice."""


def gate_inputs(features: FeatureSet, choice: str, vocab_size: int) -> NDArray[np.float16]:
    """What a gate of that choice reads, float16 (positions, inputs), for `GateData.hidden`.

    Args:
        features: of the positions, with at least `NUM_TOP` base logits for `top_k`, two for `margin`.
        choice: a key of `GATE_INPUTS`.
        vocab_size: of the backbone.

    Raises:
        InputError: an unknown choice, or too few base logits.
    """
    if choice not in GATE_INPUTS:
        raise InputError(f"gate inputs are {choice!r}, expected one of {', '.join(GATE_INPUTS)}")
    columns = [make(features, vocab_size).astype(np.float16) for make in GATE_INPUTS[choice]]
    return np.concatenate([features.hidden, *columns], axis=1)


def _log_probabilities(features: FeatureSet) -> NDArray[np.float64]:
    """Of the known tokens, float64 (positions, top_k)."""
    return features.top_logits.astype(np.float64) - features.log_normalizer.astype(np.float64)[:, None]


def _largest(features: FeatureSet, count: int) -> NDArray[np.float64]:
    """The largest log probabilities, descending, float64 (positions, count)."""
    if features.top_logits.shape[1] < count:
        raise InputError(
            f"there are {features.top_logits.shape[1]} base logits for each position, expected at least {count} for "
            "these gate inputs; collect features with a larger top_k"
        )
    log_p = _log_probabilities(features)
    # A probability of zero would leave float16's range, and says no more than one of e^-50.
    ordered: NDArray[np.float64] = np.maximum(-np.sort(-log_p, axis=1)[:, :count], -50.0)
    return ordered
