"""The numbers that a quantised weight can have: how many bits, in which groups, with which scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cotune.errors import InputError
from cotune.models.packed_weights import BITS, GROUP_SIZES, PackedWeight, num_groups

_SMALLEST_SCALE = 2.0**-24
"""The smallest positive float16."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How weights are quantised.

    The scale of a group spans its weights and zero: (max - min) / (2**bits - 1), and is rounded to float16 before codes
    are chosen, so that file and memory hold the same numbers. The zero point is the code of zero.

    Raises:
        InputError: other bits or group sizes.

    Example:
        >>> grid = Grid(bits=3, group_size=None)
        >>> scales, zeros = grid.fit(torch.tensor([[-1.0, 0.5, 2.5]]))
        >>> scales, zeros
        (tensor([[0.5000]], dtype=torch.float64), tensor([[2.]], dtype=torch.float64))
        >>> grid.codes(torch.tensor([-1.0, 0.6, 2.5]), scales[0], zeros[0])
        tensor([0., 3., 7.], dtype=torch.float64)
    """

    bits: int = 4
    """8, 4 or 3."""
    group_size: int | None = 32
    """Weights that share a scale: 32, 64 or 128 along a row, or None for the whole row. A shorter row is one group."""
    is_symmetric: bool = False
    """Whether the zero point is the middle code, 2**(bits - 1), and the scale spans -max to max of the sizes."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InputError(f"bits are {self.bits!r}, expected one of {', '.join(map(str, BITS))}")
        if self.group_size is not None and self.group_size not in GROUP_SIZES:
            raise InputError(
                f"group_size is {self.group_size!r}, expected {', '.join(map(str, GROUP_SIZES))}, or None for whole rows"
            )

    def group_size_of(self, num_in: int) -> int:
        """Weights in a group of a row of `num_in`."""
        return num_in if self.group_size is None else min(self.group_size, num_in)

    def grouped(self, weight: Tensor) -> Tensor:
        """Weights (out, in) by their groups, (out, num_groups, group_size), with zeros behind the last."""
        num_in = weight.shape[1]
        size = self.group_size_of(num_in)
        groups = num_groups(num_in, size)
        return torch.nn.functional.pad(weight, (0, groups * size - num_in)).unflatten(1, (groups, size))

    def fit(self, weight: Tensor, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
        """Scales and zero points of the groups of a weight (out, in).

        Args:
            shrink: the share of the range that is spanned; weights beyond it get the last code.

        Returns:
            Two of float64 (out, num_groups), numbers that float16 and the codes hold.

        Raises:
            InputError: a weight is not finite, or too large for a float16 scale.
        """
        groups = self.grouped(weight.double())
        low = groups.amin(2).clamp(max=0) * shrink  # (out, num_groups)
        high = groups.amax(2).clamp(min=0) * shrink
        if self.is_symmetric:
            high = torch.maximum(high, -low)
            low = -high
        top = 2**self.bits - 1
        # A group of zeros has a scale too, and so has one whose scale float16 would round to zero.
        scales = ((high - low) / top).half().double().clamp(min=_SMALLEST_SCALE)
        if not bool(scales.isfinite().all()):
            raise InputError(
                f"a weight goes from {float(low.min()):.3g} to {float(high.max()):.3g}, expected finite numbers with "
                "steps that float16 holds; look at the model's weights"
            )
        if self.is_symmetric:
            return scales, torch.full_like(scales, 2 ** (self.bits - 1))
        return scales, (-low / scales).round().clamp(0, top)

    def codes(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The nearest codes, of scales and zero points that broadcast with the weights."""
        return (weight.double() / scales).round().add(zeros).clamp(0, 2**self.bits - 1)

    def spread(self, of_groups: Tensor, num_in: int) -> Tensor:
        """What each group has, (out, num_groups), for each weight, (out, in)."""
        return of_groups.repeat_interleave(self.group_size_of(num_in), dim=1)[:, :num_in]

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> PackedWeight:
        """Codes (out, in) with scales and zero points (out, num_groups)."""
        return PackedWeight(
            codes=codes.to(torch.uint8).cpu().numpy(),
            scales=scales.float().cpu().numpy(),
            zeros=zeros.to(torch.uint8).cpu().numpy(),
            bits=self.bits,
            group_size=self.group_size_of(codes.shape[1]),
        )
