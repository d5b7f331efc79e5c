"""How likely a text is under each mode, computed on the device from the cloud's features: exact, no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.generation.modes import mode_named
from cotune.generation.reference import Personal
from cotune.wire.features import SequenceFeatures


def token_nats(features: SequenceFeatures, personal: Personal, mode: str) -> NDArray[np.float64]:
    """-log p(target) of each target position, teacher-forced, through the very code that generates.

    Args:
        features: with the base logits of the whole vocabulary (`top_k` of at least its size).
        personal: the side network, the basis, and the gate for a gated mode.
        mode: what the output is.

    Returns:
        float64 (targets,), nats.

    Raises:
        InputError: base logits are missing, or a gated mode has no gate.
    """
    combination = mode_named(mode)
    vocab_size = personal.output_basis.vocab_size
    if features.top_ids.shape[1] != vocab_size:
        raise InputError(
            f"the features hold {features.top_ids.shape[1]} base logits a position, expected all {vocab_size}; "
            "ask for them with top_k"
        )
    if combination.is_gated and personal.gate is None:
        raise InputError(f"mode {mode} needs a gate, and the plugin has none; tune it again with a gate")
    nats = np.empty(len(features))
    for t in range(len(features)):
        delta = None
        if not combination.is_gated or (
            personal.gate is not None and personal.gate.consults(features.hidden[t].astype(np.float32))
        ):
            correction = personal.corrector.correct(features.tap_codes[t], features.tap_scales[t])
            delta = personal.output_basis.delta(correction)
        logits = combination.combine(features.top_logits[t], delta).astype(np.float64)
        largest = logits.max()
        nats[t] = largest + np.log(np.exp(logits - largest).sum()) - logits[features.target_ids[t]]
    return nats


def base_nats(features: SequenceFeatures) -> NDArray[np.float64]:
    """-log p(target) of each target position under the base model alone, nats."""
    return features.log_normalizer.astype(np.float64) - features.target_logits.astype(np.float64)
