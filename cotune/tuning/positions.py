"""Shuffled batches of target positions: what methods on cached features train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from cotune.errors import InputError
from cotune.tuning.tuner import BatchT


class PositionBatches(Generic[BatchT]):
    """All positions once per epoch, in an order that depends on seed and epoch only, in batches of nearly equal size.

    Args:
        num_positions: positions there are.
        num_batch_positions: the most in one batch.
        seed: of the order; None keeps positions in their order, as for held-out data.
        take: from int64 (positions,) indices to a batch.
    """

    def __init__(
        self,
        num_positions: int,
        num_batch_positions: int,
        *,
        seed: int | None,
        take: Callable[[Tensor], BatchT],
    ) -> None:
        if num_positions < 1:
            raise InputError("there are no target positions, expected at least one")
        self._num_positions = num_positions
        self._num_batches = -(-num_positions // num_batch_positions)
        self._seed = seed
        self._take = take

    def __len__(self) -> int:
        return self._num_batches

    def epoch(self, epoch: int) -> Iterator[BatchT]:
        if self._seed is None:
            order = np.arange(self._num_positions)
        else:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._num_positions)
        for positions in np.array_split(order, self._num_batches):
            yield self._take(torch.from_numpy(positions))
