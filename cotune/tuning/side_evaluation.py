"""What a trained side network does at each position: probabilities and choices, with and without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.generation.output_basis import OutputBasis
from cotune.models.side_network import SideNetwork, fake_quantise
from cotune.tuning.corrected_loss import KnownBase, corrected_nats
from cotune.tuning.feature_set import FeatureSet
from cotune.tuning.side import side_batches

NUM_BATCH_POSITIONS = 256


@dataclass(frozen=True, kw_only=True)
class SideEvaluation:
    """Teacher-forced, position by position; all arrays (positions,).

    Attributes:
        base_nats: float32, -log p0(target), exact: the base model's own normaliser is known.
        side_nats: float32, -log p1(target) with the device consulted, see `corrected_loss` for the tail.
        base_argmax: int64, the base model's first choice.
        side_argmax: int64, the first choice with the device consulted: among the top k for the parallel family,
            of the whole vocabulary for the serial one.
        is_certified: bool, the known base logits prove `side_argmax` for the whole vocabulary.
        target_ids: int64, what the text says.
    """

    base_nats: NDArray[np.float32]
    side_nats: NDArray[np.float32]
    base_argmax: NDArray[np.int64]
    side_argmax: NDArray[np.int64]
    is_certified: NDArray[np.bool_]
    target_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.target_ids)

    @cached_property
    def base_probability(self) -> NDArray[np.float32]:
        """p0 of the target."""
        return np.exp(-self.base_nats)

    @cached_property
    def side_probability(self) -> NDArray[np.float32]:
        """p1 of the target."""
        return np.exp(-self.side_nats)

    @cached_property
    def disagrees(self) -> NDArray[np.bool_]:
        """Where the first choices differ."""
        differs: NDArray[np.bool_] = self.base_argmax != self.side_argmax
        return differs

    @classmethod
    def joined(cls, parts: Sequence[SideEvaluation]) -> SideEvaluation:
        """All positions of the parts, in their order."""
        names = [one.name for one in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def summary(self) -> dict[str, float]:
        """Means over all positions: nats per token, q (share of differing choices), accuracies, certificates."""
        return {
            "base_nats_per_token": float(self.base_nats.mean(dtype=np.float64)),
            "side_nats_per_token": float(self.side_nats.mean(dtype=np.float64)),
            "disagree_rate": float(self.disagrees.mean()),
            "base_accuracy": float((self.base_argmax == self.target_ids).mean()),
            "side_accuracy": float((self.side_argmax == self.target_ids).mean()),
            "certificate_rate": float(self.is_certified.mean()),
        }


@torch.no_grad()
def evaluate_side(features: FeatureSet, network: SideNetwork, output_basis: OutputBasis, family: str) -> SideEvaluation:
    """Consult the side network at every position.

    Args:
        features: of the texts to judge by.
        network: put into evaluation mode.
        output_basis: the shared basis.
        family: `parallel` (z + delta) or `serial` (delta alone).
    """
    network.eval()
    basis = torch.from_numpy(output_basis.matrix())
    batches = side_batches(features, network, output_basis.vocab_size, family, NUM_BATCH_POSITIONS, seed=None)
    choose = _choose_parallel if family == "parallel" else _choose_serial
    nats, choices, certificates = [], [], []
    for batch in batches.epoch(0):
        correction = fake_quantise(batch.at_targets(network(*batch.inputs)))
        nats.append(corrected_nats(correction, basis, batch.base))
        choice, is_certified = choose(correction @ basis.T, batch.base)
        choices.append(choice)
        certificates.append(is_certified)
    return SideEvaluation(
        base_nats=features.log_normalizer - features.target_logits,
        side_nats=torch.cat(nats).numpy(),
        base_argmax=_base_argmax(features),
        side_argmax=torch.cat(choices).numpy(),
        is_certified=torch.cat(certificates).numpy(),
        target_ids=features.target_ids,
    )


def nats_per_token(features: FeatureSet, network: SideNetwork, output_basis: OutputBasis, family: str) -> float:
    """Mean -log p(target) with the device consulted everywhere; the base model's is in `SideEvaluation`."""
    return evaluate_side(features, network, output_basis, family).summary()["side_nats_per_token"]


def _base_argmax(features: FeatureSet) -> NDArray[np.int64]:
    best = features.top_logits.argmax(axis=1)
    return np.take_along_axis(features.top_ids, best[:, None], axis=1)[:, 0].astype(np.int64)


def _choose_parallel(delta: Tensor, base: KnownBase) -> tuple[Tensor, Tensor]:
    """Best of the top k, and whether no other token can be better: theirs is at most the top's least z."""
    top_ids, top_logits = base.token_ids[:, :-1], base.logits[:, :-1]
    combined = top_logits + delta.gather(1, top_ids)
    best, place = combined.max(dim=1)
    others = delta.scatter(1, top_ids, -torch.inf).amax(dim=1)
    is_certified = best >= top_logits.amin(dim=1) + others
    return top_ids.gather(1, place[:, None])[:, 0], is_certified


def _choose_serial(delta: Tensor, base: KnownBase) -> tuple[Tensor, Tensor]:
    return delta.argmax(dim=1), torch.ones(len(delta), dtype=torch.bool)
