"""What the cloud tells a device about one sequence so that the device can train on it: NumPy only.

A device trains its side network from these features, never from the backbone's weights. One `SequenceFeatures`
holds, for each target position of one sequence (the positions that enter the loss), the taps from which the
side network predicts that token, and enough of the base distribution to compute the loss of the corrected one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class SequenceFeatures:
    """Features of the `targets` positions of one sequence; all arrays share the first dimension.

    Attributes:
        target_ids: int64 (targets,), the token that each position has to predict.
        tap_codes: int8 (targets, taps, tap_dim), RMS-normalised, projected and quantised backbone states.
        tap_scales: float16 (targets, taps), one scale for each tap; tap = code * scale.
        log_normalizer: float32 (targets,), log sum exp of all base logits.
        target_logits: float32 (targets,), base logit of the target.
        top_ids: int64 (targets, top_k), ids of the largest base logits, ascending by id.
        top_logits: float32 (targets, top_k), their logits.
        hidden: float16 (targets, hidden), final hidden state after the last norm; the gate reads it.
    """

    target_ids: NDArray[np.int64]
    tap_codes: NDArray[np.int8]
    tap_scales: NDArray[np.float16]
    log_normalizer: NDArray[np.float32]
    target_logits: NDArray[np.float32]
    top_ids: NDArray[np.int64]
    top_logits: NDArray[np.float32]
    hidden: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.target_ids)


class FeatureSource(Protocol):
    """Where features come from: a backbone in this process, or a cloud over the network."""

    def features(self, input_ids: NDArray[np.int64], first_target: int, top_k: int) -> SequenceFeatures:
        """Teacher-force `input_ids` (seq,) once; features to predict positions first_target .. seq-1.

        Args:
            input_ids: int64 (seq,), prompt and target tokens together.
            first_target: index of the first target token, at least 1.
            top_k: how many base logits to keep for each position; vocab_size or more keeps all.
        """
        ...
