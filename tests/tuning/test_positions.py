from __future__ import annotations

import pytest
import torch

from cotune.errors import InputError
from cotune.tuning.positions import PositionBatches


def epoch_of(batches: PositionBatches[torch.Tensor], epoch: int) -> list[list[int]]:
    return [batch.tolist() for batch in batches.epoch(epoch)]


def test_every_position_comes_once_in_batches_of_nearly_equal_size() -> None:
    batches = PositionBatches(10, 4, seed=3, take=lambda positions: positions)
    found = epoch_of(batches, 0)
    assert len(batches) == len(found) == 3
    assert sorted(position for batch in found for position in batch) == list(range(10))
    assert [len(batch) for batch in found] == [4, 3, 3]


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    batches = PositionBatches(50, 7, seed=3, take=lambda positions: positions)
    assert epoch_of(batches, 1) == epoch_of(batches, 1)
    assert epoch_of(batches, 1) != epoch_of(batches, 2)
    assert epoch_of(batches, 1) != epoch_of(PositionBatches(50, 7, seed=4, take=lambda p: p), 1)


def test_without_a_seed_positions_stay_in_order() -> None:
    assert epoch_of(PositionBatches(5, 3, seed=None, take=lambda p: p), 7) == [[0, 1, 2], [3, 4]]


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(InputError, match="no target positions"):
        PositionBatches(0, 3, seed=None, take=lambda p: p)
