"""Which weights of a layer become zero, given a score of each: patterns of sparsity with exact counts.

The weights with the lowest scores go; of equal scores the one that comes first in the matrix, so that a choice can be
repeated anywhere. A share of n weights is round(share * n) of them, half a weight rounded up.

Zeros in such patterns make no file smaller and no CPU runtime that cotune exports to faster: matrices stay dense. They
are for study, and for hardware with kernels of its own (2:4 on some GPUs).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cotune.errors import InputError


class Sparsity(Protocol):
    """A pattern of zeros.

    Attributes:
        share: part of the weights that become zero.
        group: columns that are decided together; 1 where any number of columns can be.
    """

    @property
    def share(self) -> float: ...

    @property
    def group(self) -> int: ...

    def pruned(self, scores: Tensor, *, first: int = 0) -> Tensor:
        """Where weights become zero, bool, of the shape of `scores`.

        Args:
            scores: (out, columns), of all columns of a layer or of some that lie together. Cut into such pieces, a
                layer loses as many weights in all as in one piece.
            first: index of their first column in the layer.
        """
        ...

    def check(self, num_inputs: int) -> None:
        """Raise `InputError` where a layer of this width cannot have the pattern."""
        ...


@dataclass(frozen=True)
class RowSparsity:
    """The same share of every row, that is of the weights of every output, as in Wanda.

    Example:
        >>> RowSparsity(0.5).pruned(torch.tensor([[1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 8.0, 9.0]])).int().tolist()
        [[1, 1, 0, 0], [0, 1, 1, 0]]
    """

    share: float
    """0 to 1."""

    def __post_init__(self) -> None:
        _check_share(self.share)

    @property
    def group(self) -> int:
        return 1

    def pruned(self, scores: Tensor, *, first: int = 0) -> Tensor:
        num = _rounded(self.share * (first + scores.shape[1])) - _rounded(self.share * first)
        return _lowest(scores, num)

    def check(self, num_inputs: int) -> None:
        """Any width will do."""


@dataclass(frozen=True)
class LayerSparsity:
    """A share of the whole layer, wherever its lowest scores are.

    Example:
        >>> LayerSparsity(0.5).pruned(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).int().tolist()
        [[1, 1], [0, 0]]
    """

    share: float
    """0 to 1."""

    def __post_init__(self) -> None:
        _check_share(self.share)

    @property
    def group(self) -> int:
        return 1

    def pruned(self, scores: Tensor, *, first: int = 0) -> Tensor:
        rows, columns = scores.shape
        num = _rounded(self.share * rows * (first + columns)) - _rounded(self.share * rows * first)
        return _lowest(scores.reshape(1, -1), num).reshape(rows, columns)

    def check(self, num_inputs: int) -> None:
        """Any width will do."""


@dataclass(frozen=True)
class GroupSparsity:
    """`kept` of every `group` neighbours in a row stay: 2 of 4 is the pattern 2:4 (Mishra et al., arXiv 2104.08378).

    Example:
        >>> GroupSparsity(2, 4).pruned(torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0, 0.0, 0.0, 5.0]])).int().tolist()
        [[0, 1, 0, 1, 1, 1, 0, 0]]
    """

    kept: int
    """At least 1, less than `group`."""
    group: int
    """Neighbouring inputs."""

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.group:
            raise InputError(f"the pattern is {self.kept}:{self.group}, expected fewer kept than there are, as in 2:4")

    @property
    def share(self) -> float:
        return 1 - self.kept / self.group

    def pruned(self, scores: Tensor, *, first: int = 0) -> Tensor:
        rows, columns = scores.shape
        assert first % self.group == 0
        self.check(columns)
        groups = scores.reshape(-1, self.group)  # (rows * groups in a row, group)
        return _lowest(groups, self.group - self.kept).reshape(rows, columns)

    def check(self, num_inputs: int) -> None:
        if num_inputs % self.group:
            raise InputError(
                f"a layer has {num_inputs} inputs, expected a multiple of {self.group} for the pattern "
                f"{self.kept}:{self.group}; take a share such as 0.5"
            )


def parse_group(text: str) -> GroupSparsity:
    """The pattern that a text such as `2:4` names.

    Raises:
        InputError: it is no such text.

    Example:
        >>> parse_group("2:4")
        GroupSparsity(kept=2, group=4)
    """
    found = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
    if found is None:
        raise InputError(f"the pattern is {text!r}, expected kept and all weights of a group, such as 2:4")
    return GroupSparsity(int(found[1]), int(found[2]))


def share_of_zeros(weight: Tensor) -> float:
    """How sparse a matrix is, 0 to 1."""
    return (weight.numel() - int(weight.count_nonzero())) / weight.numel()


def _lowest(scores: Tensor, num: int) -> Tensor:
    """Where the `num` lowest scores of each row are; of equal ones the first."""
    order = torch.sort(scores, dim=1, stable=True).indices[:, :num]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def _rounded(number: float) -> int:
    # Python's own rounding goes to even numbers; shares such as 0.7 are a little more or less than they say.
    return int(number + 0.5 + 1e-9)


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise InputError(f"the share of zeros is {share}, expected 0 to 1, such as 0.5")
