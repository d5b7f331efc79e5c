"""How likely a text is under each mode, computed on the device from the cloud's features: exact, no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.generation.modes import mode_named
from cotune.generation.reference import Personal
from cotune.generation.side_state import first_position
from cotune.wire.features import SequenceFeatures


def token_nats(
    features: SequenceFeatures, personal: Personal, mode: str, *, start: int = 1, num_lead: int = 0
) -> NDArray[np.float64]:
    """-log p(target) of each target position, float64 (targets,), nats; see `score_tokens`."""
    return score_tokens(features, personal, mode, start=start, num_lead=num_lead)[0]


def score_tokens(
    features: SequenceFeatures, personal: Personal, mode: str, *, start: int = 1, num_lead: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """-log p(target) of each target position, teacher-forced, through the very code that generates.

    Args:
        features: with the base logits of the whole vocabulary (`top_k` of at least its size).
        personal: the side network, the basis, and the gate for a gated mode.
        mode: what the output is.
        start: place of the first of these positions in the whole text.
        num_lead: so many of the first are no targets; a side network that remembers reads as many as it generates with.

    Returns:
        float64 (targets,), nats; and bool (targets,), whether the target is the likeliest token. Both are `num_lead`
        shorter than there are positions.

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
    side = personal.corrector.open()
    skipped = first_position(start + num_lead, personal.corrector.prompt_window) - start
    nats = np.empty(len(features) - num_lead)
    is_likeliest = np.empty(len(nats), np.bool_)
    for t in range(max(0, skipped), len(features)):
        taps = features.tap_codes[t], features.tap_scales[t]
        delta = None
        if t >= num_lead and (
            not combination.is_gated
            or (personal.gate is not None and personal.gate.consults(features.hidden[t].astype(np.float32)))
        ):
            delta = personal.output_basis.delta(side.correct(start + t, *taps))
        else:
            side.read(start + t, *taps)
        if t < num_lead:
            continue
        logits = combination.combine(features.top_logits[t], delta).astype(np.float64)
        largest = logits.max()
        nats[t - num_lead] = largest + np.log(np.exp(logits - largest).sum()) - logits[features.target_ids[t]]
        is_likeliest[t - num_lead] = logits.argmax() == features.target_ids[t]
    return nats, is_likeliest


def base_nats(features: SequenceFeatures, *, num_lead: int = 0) -> NDArray[np.float64]:
    """-log p(target) of each target position under the base model alone, nats; the first `num_lead` are none."""
    nats: NDArray[np.float64] = features.log_normalizer.astype(np.float64) - features.target_logits.astype(np.float64)
    return nats[num_lead:]
