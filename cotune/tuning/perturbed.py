"""A parameter moved along a random direction that is never written down: theta + eps z, made where a layer reads it.

The usual way is +eps, -2 eps, +eps in place. It does not restore: after a rounding the lost bits are gone (MeZO's
issue 42 saw float16 models drift to a loss of 0). No bit trick can help: in float32 half of all numbers are below
1e-3 in size, and theta + eps z must squeeze them into the few that float32 has around eps. So either the lost bits are
kept, which is a second copy, or theta is left alone. Here it is left alone: nothing writes to the weights, so they are
the same to the last bit after any number of perturbed passes, after an error and after a power cut. It is cheaper too:
a step sweeps over the weights three times (two passes, one update) instead of four.

    y = x (theta + eps z)^T   for linear layers, in blocks of rows of theta
    y = theta[i] + eps z[i]   for embeddings, in the rows that the batch asks for

One block at a time is in memory. Other operations get the whole moved tensor for as long as they run; in a language
model those are norms and biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from cotune.errors import InputError
from cotune.tuning.directions import SIGNS_PER_BLOCK, Direction

BLOCK_ELEMENTS = {"cpu": 2**20}
"""Numbers of a parameter that are moved at a time, by device: 4 MiB of float32."""
BLOCK_ELEMENTS_ELSEWHERE = 2**24


def block_elements(device: torch.device) -> int:
    """How many numbers to treat at a time on this device."""
    return BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS_ELSEWHERE)


def representable(zo_eps: float) -> float:
    """eps with 8 significant bits: the nearest that bfloat16, and so every usual type, has exactly.

    PyTorch rounds a factor to the tensor's own type on a CPU, and not on a GPU; this one stays as it is on both.

    Example:
        >>> representable(1e-3)
        0.00099945068359375
    """
    return float(torch.tensor(zo_eps, dtype=torch.bfloat16))


class PerturbedTensor(Tensor):
    """Stands for theta + eps z in any function of PyTorch; holds theta's memory and nothing more.

    Example:
        >>> theta = torch.zeros(2, 3)
        >>> moved = PerturbedTensor.of(theta, Direction(0), place=0, zo_eps=0.5)
        >>> bool((moved.abs() == 0.5).all()), float(theta.sum())
        (True, 0.0)
    """

    theta: Tensor
    direction: Direction
    place: int
    zo_eps: float

    @staticmethod
    def of(theta: Tensor, direction: Direction, *, place: int, zo_eps: float) -> PerturbedTensor:
        """Move a parameter.

        Args:
            theta: contiguous, of a floating-point type; stays as it is.
            direction: z.
            place: the sign of theta's first number.
            zo_eps: eps, `representable`; negative goes the other way.
        """
        moved: PerturbedTensor = Tensor._make_subclass(PerturbedTensor, theta.detach())
        moved.theta, moved.direction, moved.place, moved.zo_eps = theta.detach(), direction, place, zo_eps
        return moved

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _READS_NO_VALUE:
                return func(*args, **kwargs)
            if func in _READS_MEMORY:
                raise InputError(
                    f"{func.__name__} asks for the memory of a perturbed parameter, which is made only where PyTorch "
                    "reads it; turn custom kernels off, or tune a mask's numbers, which are written"
                )
            special = _BLOCKWISE.get(func)
            if special is not None:
                result = special(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return func(*tree_map(_whole, tuple(args)), **tree_map(_whole, dict(kwargs)))

    def elements(self, start: int, stop: int) -> Tensor:
        """Numbers `start` to `stop` of the moved tensor, counted row by row; a new tensor."""
        signs = self.direction.signs(self.place + start, stop - start, self.theta.dtype)
        return torch.add(self.theta.view(-1)[start:stop], signs, alpha=self.zo_eps, out=signs)

    def whole(self) -> Tensor:
        """All of it; a new tensor."""
        return self.elements(0, self.theta.numel()).view(self.theta.shape)

    def columns(self, start: int, stop: int) -> Tensor:
        """Columns `start` to `stop` of a moved matrix (rows, columns)."""
        num_rows, width = self.theta.shape
        starts = self.place + start + width * torch.arange(num_rows, device=self.theta.device)
        aligned = (self.place + start) % SIGNS_PER_BLOCK == 0 and width % SIGNS_PER_BLOCK == 0
        signs = self.direction.rows(starts, stop - start, self.theta.dtype, aligned=aligned)
        return torch.add(self.theta[:, start:stop], signs, alpha=self.zo_eps)

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows of a moved matrix (rows, columns): (n, columns)."""
        width = self.theta.shape[1]
        aligned = self.place % SIGNS_PER_BLOCK == 0 and width % SIGNS_PER_BLOCK == 0
        signs = self.direction.rows(self.place + width * indices, width, self.theta.dtype, aligned=aligned)
        return torch.add(self.theta[indices], signs, alpha=self.zo_eps)


def _whole(value: Any) -> Any:
    return value.whole() if isinstance(value, PerturbedTensor) else value


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """`F.linear` with a moved weight (out, in), some rows at a time."""
    if not isinstance(weight, PerturbedTensor) or weight.theta.ndim != 2:
        return NotImplemented
    x, bias = _whole(x), _whole(bias)
    num_rows, width = weight.theta.shape
    step = max(1, block_elements(weight.theta.device) // width)
    if step >= num_rows:
        return F.linear(x, weight.whole(), bias)
    y = torch.empty(*x.shape[:-1], num_rows, dtype=weight.theta.dtype, device=x.device)
    flat_x, flat_y = x.reshape(-1, width), y.view(-1, num_rows)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        block = weight.elements(start * width, stop * width).view(-1, width)
        if bias is None:
            torch.mm(flat_x, block.T, out=flat_y[:, start:stop])
        else:
            torch.addmm(bias[start:stop], flat_x, block.T, out=flat_y[:, start:stop])
    return y


def _addmm(bias: Any, x: Any, weight: Any, **scales: Any) -> Any:
    """`torch.addmm` with a moved weight (in, out), as GPT-2 has it, some columns at a time."""
    if not isinstance(weight, PerturbedTensor) or scales:
        return NotImplemented
    bias, x = _whole(bias), _whole(x)
    num_rows, width = weight.theta.shape
    step = max(SIGNS_PER_BLOCK, block_elements(weight.theta.device) // num_rows // SIGNS_PER_BLOCK * SIGNS_PER_BLOCK)
    if step >= width or bias.ndim != 1:
        return torch.addmm(bias, x, weight.whole())
    y = torch.empty(x.shape[0], width, dtype=weight.theta.dtype, device=x.device)
    for start in range(0, width, step):
        stop = min(start + step, width)
        torch.addmm(bias[start:stop], x, weight.columns(start, stop), out=y[:, start:stop])
    return y


def _embedding(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
    """`F.embedding` from a moved table: only the rows that are asked for are moved, some at a time."""
    options = dict(zip(("padding_idx", "max_norm"), args, strict=False)) | kwargs
    if not isinstance(weight, PerturbedTensor) or options.get("max_norm") is not None:
        return NotImplemented
    width = weight.theta.shape[1]
    # A row's words and signs take up to twice the room of its numbers.
    step = max(1, block_elements(weight.theta.device) // (2 * width))
    y = torch.empty(*input.shape, width, dtype=weight.theta.dtype, device=weight.theta.device)
    flat = y.view(-1, width)
    for start, indices in enumerate(input.reshape(-1).split(step)):
        flat[start * step : start * step + len(indices)] = weight.rows(indices)
    return y


_BLOCKWISE: dict[Any, Callable[..., Any]] = {F.linear: _linear, torch.addmm: _addmm, F.embedding: _embedding}
_READS_MEMORY: frozenset[Any] = frozenset([Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.__dlpack__])
# Answered by theta itself, which has the same shape and type.
_READS_NO_VALUE: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in ("device", "dtype", "shape", "ndim", "layout", "is_cuda")]
    + [getattr(Tensor, name).__get__ for name in ("requires_grad", "is_quantized", "is_meta", "is_leaf", "grad")]
    + [getattr(Tensor, name) for name in ("size", "dim", "numel", "stride", "is_floating_point", "is_complex")]
    + [getattr(Tensor, name) for name in ("is_contiguous", "__len__", "get_device", "element_size", "nelement")]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)
