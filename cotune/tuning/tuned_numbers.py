"""The numbers that a forward-only method changes, in the model's own tensors, a block at a time.

All of the given tensors are tuned, or those that a `SparseMask` chooses. Signs count the tuned numbers alone: name by
name in alphabetical order, each name from a multiple of 128 on. So the same names and shapes give the same direction on
every device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cotune.errors import InputError
from cotune.tuning.directions import Direction, place_parameters
from cotune.tuning.perturbed import PerturbedTensor, block_elements
from cotune.tuning.sparse_mask import SparseMask


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some numbers of one parameter.

    Attributes:
        name: of the parameter.
        flat: the model's own numbers: a view, with a mask all of the parameter's.
        chosen: with a mask, which of them, int64.
        place: sign of the first number.
        num: how many.
        decays: weight decay is for it: matrices, not norms and biases, as in MeZO.
    """

    name: str
    flat: Tensor
    chosen: Tensor | None
    place: int
    num: int
    decays: bool

    @property
    def exact_dtype(self) -> torch.dtype:
        """What updates are computed in: float32, or float64 for parameters of that type."""
        return torch.float64 if self.flat.dtype == torch.float64 else torch.float32

    def read(self) -> Tensor:
        """A copy, (num,)."""
        return self.flat.clone() if self.chosen is None else self.flat[self.chosen]

    def write(self, values: Tensor) -> None:
        """Replace them, rounding to the parameter's type."""
        if self.chosen is None:
            self.flat.copy_(values)
        else:
            self.flat[self.chosen] = values.to(self.flat.dtype)

    def signs(self, direction: Direction, dtype: torch.dtype) -> Tensor:
        """This block's part of z, (num,)."""
        return direction.signs(self.place, self.num, dtype)

    def combine(self, directions: Sequence[Direction], weights: Sequence[float]) -> Tensor:
        """sum_j weight_j z_j, float32 (num,), or float64 for parameters of that type."""
        total = torch.zeros(self.num, dtype=self.exact_dtype, device=self.flat.device)
        for direction, weight in zip(directions, weights, strict=True):
            if weight:
                total.add_(self.signs(direction, self.exact_dtype), alpha=weight)
        return total

    def change(self, change: Tensor, *, keep: float = 1.0) -> None:
        """theta <- keep theta + change, each number rounded once; `keep` is for blocks that decay only."""
        values = self.read().to(change.dtype)
        if self.decays and keep != 1:
            values.mul_(keep)
        self.write(values.add_(change))


class TunedNumbers:
    """Some tensors of a model, or a mask's numbers in them.

    Args:
        params: the model's own tensors by name; floating-point, contiguous. They are changed in place.
        mask: None tunes all numbers.

    Raises:
        InputError: there is nothing to tune, or a tensor or the mask does not fit.
    """

    def __init__(self, params: Mapping[str, Tensor], mask: SparseMask | None = None) -> None:
        self.params = {name: tensor.detach() for name, tensor in params.items()}
        for name, tensor in self.params.items():
            if not tensor.is_floating_point() or not tensor.is_contiguous():
                raise InputError(
                    f"{name} is {tensor.dtype} with strides {tensor.stride()}, expected a contiguous tensor of a "
                    "floating-point type; tune another part, such as a LoRA adapter"
                )
        if mask is not None:
            mask.check(self.params)
        sizes = (
            {name: len(p) for name, p in mask.indices.items()} if mask else {n: p.numel() for n, p in params.items()}
        )
        self.sizes = {name: sizes[name] for name in sorted(sizes) if sizes[name]}
        if not self.sizes:
            raise InputError("there is nothing to tune, expected at least one parameter")
        self.mask = mask
        self.places = place_parameters(self.sizes)
        self.device = self.params[next(iter(self.sizes))].device

    @property
    def num_numbers(self) -> int:
        """How many numbers are tuned."""
        return sum(self.sizes.values())

    def direction(self, seed: int, *, num_pages: int = 4) -> Direction:
        """The direction of a seed, where these numbers are."""
        last = next(reversed(self.sizes))
        return Direction(seed, self.device, num_pages=num_pages, num_signs=self.places[last] + self.sizes[last])

    def blocks(self) -> Iterator[Block]:
        """All of them, in the order of their signs."""
        for name, size in self.sizes.items():
            flat, step = self.params[name].view(-1), block_elements(self.device)
            for start in range(0, size, step):
                stop = min(start + step, size)
                chosen = None
                if self.mask is not None:
                    chosen = self.mask.indices[name][start:stop].to(flat.device, torch.int64)
                yield Block(
                    name=name,
                    flat=flat[start:stop] if chosen is None else flat,
                    chosen=chosen,
                    place=self.places[name] + start,
                    num=stop - start,
                    decays=self.params[name].ndim > 1,
                )

    @contextmanager
    def moved(self, direction: Direction, zo_eps: float) -> Iterator[dict[str, Tensor]]:
        """Inside, the parameters at theta + eps z, to be read in the parameters' place; theta is exact afterwards.

        Whole tensors are never written, see `cotune.tuning.perturbed`. A mask's few numbers are written, after they
        have been put aside, and put back at the end, also on error: no arithmetic is undone.

        Args:
            direction: z.
            zo_eps: eps, `representable`; negative goes the other way.
        """
        if self.mask is None:
            # An empty tensor has no numbers to move.
            yield {
                name: PerturbedTensor.of(tensor, direction, place=self.places[name], zo_eps=zo_eps)
                if name in self.places
                else tensor
                for name, tensor in self.params.items()
            }
            return
        aside = [block.read() for block in self.blocks()]
        try:
            for block, values in zip(self.blocks(), aside, strict=True):
                block.write(torch.add(values, block.signs(direction, values.dtype), alpha=zo_eps))
            yield dict(self.params)
        finally:
            for block, values in zip(self.blocks(), aside, strict=True):
                block.write(values)

    def add(self, directions: Sequence[Direction], weights: Sequence[float], *, keep: float = 1.0) -> None:
        """theta <- keep theta + sum_j weight_j z_j, in place, each number rounded once.

        This replays a run from its seeds and scalars. `keep` is for tensors of two and more dimensions only.
        """
        if not any(weights) and keep == 1:
            return  # Adding +0 would turn -0 into +0.
        for block in self.blocks():
            simple = block.chosen is None and block.flat.dtype == block.exact_dtype and not (block.decays and keep != 1)
            if simple and len(directions) == 1:
                # The same numbers as below, without a copy; 16-bit types would round the weight on a CPU.
                block.flat.add_(block.signs(directions[0], block.flat.dtype), alpha=weights[0])
            else:
                block.change(block.combine(directions, weights), keep=keep)
