"""Which entries of each row are the largest: the tokens that a distribution is remembered by.

PyTorch's `topk` keeps a heap on the CPU, which for a few hundred tokens costs a twentieth of a whole forward pass.
Here a row is cut into interleaved groups first: the k largest entries lie in the k groups with the largest maxima, so
that only those groups are searched.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Rows that are searched at once: what that takes stays small beside the values, whatever the number of rows.
_ROWS_AT_ONCE = 32


def largest_ids(values: Tensor, k: int) -> Tensor:
    """Columns of the k largest entries of each row.

    Where equal entries compete for the last places, which of them win depends on the row alone.

    Args:
        values: float (rows, columns).
        k: 1 to columns.

    Returns:
        int64 (rows, k), ascending in each row, on the device of `values`.

    Example:
        >>> largest_ids(torch.tensor([[0.5, 2.0, -1.0, 3.0]]), k=2).tolist()
        [[1, 3]]
    """
    values = values.detach()
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return values.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    rows = values.numpy()
    found = np.empty((len(rows), k), np.int64)
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        found[start : start + _ROWS_AT_ONCE] = _largest(rows[start : start + _ROWS_AT_ONCE], k)
    return torch.from_numpy(found)


def _largest(rows: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    num_columns = rows.shape[1]
    # With n columns in groups of s, n / s maxima and s k candidates are searched: least of all with s = sqrt(n / k).
    size = max(1, isqrt(num_columns // k))
    num_groups = num_columns // size
    if size == 1:
        return np.sort(_partition(rows, k), axis=1)
    # Group g has the columns g, g + num_groups, g + 2 num_groups, ...; the few columns left over compete in any case.
    grouped = rows[:, : size * num_groups].reshape(len(rows), size, num_groups)
    groups = _partition(grouped.max(axis=1), k)
    members = groups[:, :, None] + num_groups * np.arange(size)
    rest = np.broadcast_to(np.arange(size * num_groups, num_columns), (len(rows), num_columns - size * num_groups))
    candidates = np.concatenate([members.reshape(len(rows), -1), rest], axis=1)
    best = _partition(np.take_along_axis(rows, candidates, axis=1), k)
    return np.sort(np.take_along_axis(candidates, best, axis=1), axis=1)


def _partition(rows: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Columns of the k largest of each row, in no order; a NaN counts as the largest."""
    return np.argpartition(rows, rows.shape[1] - k, axis=1)[:, rows.shape[1] - k :]
