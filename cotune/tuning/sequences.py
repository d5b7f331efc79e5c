"""Batches of whole sequences: what side networks that remember earlier positions train on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.errors import InputError
from cotune.tuning.corrected_loss import BaseTable, KnownBase
from cotune.tuning.feature_set import FeatureSet


@dataclass(frozen=True)
class SequenceBatch:
    """Some sequences, padded on the right.

    Attributes:
        taps: float32 (sequences, seq, taps, tap_dim), dequantised.
        positions: int64 (sequences, seq), absolute; padding goes on counting, so that no token looks at it.
        targets: int64 (targets,), places of the target positions in (sequences * seq), in order.
        base: what is known of the base logits at the targets.
    """

    taps: Tensor
    positions: Tensor
    targets: Tensor
    base: KnownBase

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the network takes."""
        return self.taps, self.positions

    def at_targets(self, corrections: Tensor) -> Tensor:
        """c of the target positions, (targets, basis_dim), from (sequences, seq, basis_dim)."""
        return corrections.flatten(0, 1)[self.targets]


class SequenceData:
    """A feature set, ready to be cut into batches of sequences.

    Args:
        features: with the taps of the positions before the targets, as far as the network reads them.
        vocab_size: of the backbone.
        family: decides which loss the batches are for.
    """

    def __init__(self, features: FeatureSet, vocab_size: int, family: str) -> None:
        self._features = features
        parallel = family == "parallel"
        self._table = BaseTable.parallel(features, vocab_size) if parallel else BaseTable.serial(features)

    def take(self, sequences: NDArray[np.int64]) -> SequenceBatch:
        """The batch of these sequences, int64 (sequences,)."""
        features = self._features
        leads = np.diff(features.lead_offsets)[sequences]
        lengths = leads + np.diff(features.offsets)[sequences]
        seq = int(lengths.max())
        taps = np.zeros((len(sequences), seq, *features.tap_codes.shape[1:]), np.float32)
        rows, places = [], []
        for row, s in enumerate(sequences.tolist()):
            lead = slice(features.lead_offsets[s], features.lead_offsets[s + 1])
            own = slice(features.offsets[s], features.offsets[s + 1])
            num_lead, length = int(leads[row]), int(lengths[row])
            taps[row, :num_lead] = _dequantised(features.lead_codes[lead], features.lead_scales[lead])
            taps[row, num_lead:length] = _dequantised(features.tap_codes[own], features.tap_scales[own])
            rows.append(np.arange(own.start, own.stop))
            places.append(row * seq + np.arange(num_lead, length))
        firsts = features.first_targets[sequences] - leads
        return SequenceBatch(
            taps=torch.from_numpy(taps),
            positions=torch.from_numpy(firsts[:, None] + np.arange(seq)),
            targets=torch.from_numpy(np.concatenate(places)),
            base=self._table.rows(torch.from_numpy(np.concatenate(rows))),
        )

    def batches(self, num_batch_positions: int, *, seed: int | None) -> SequenceBatches:
        """All sequences; shuffled by `seed`, or in order if it is None."""
        return SequenceBatches(self, np.diff(self._features.offsets), num_batch_positions, seed=seed)


class SequenceBatches:
    """All sequences once per epoch, in an order that depends on seed and epoch only.

    Args:
        data: takes batches out of a feature set.
        lengths: int64 (sequences,), target positions of each.
        num_batch_positions: target positions in one batch, on average at most.
        seed: of the order; None keeps it, as for held-out data.

    Raises:
        InputError: there are no target positions.
    """

    def __init__(
        self, data: SequenceData, lengths: NDArray[np.int64], num_batch_positions: int, *, seed: int | None
    ) -> None:
        if not lengths.sum():
            raise InputError("there are no target positions, expected at least one")
        self._data = data
        self._num_sequences = len(lengths)
        self._num_batches = min(len(lengths), -(-int(lengths.sum()) // num_batch_positions))
        self._seed = seed

    def __len__(self) -> int:
        return self._num_batches

    def epoch(self, epoch: int) -> Iterator[SequenceBatch]:
        if self._seed is None:
            order = np.arange(self._num_sequences)
        else:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._num_sequences)
        for sequences in np.array_split(order, self._num_batches):
            yield self._data.take(sequences)


def _dequantised(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.float32]:
    return codes.astype(np.float32) * scales.astype(np.float32)[..., None]
