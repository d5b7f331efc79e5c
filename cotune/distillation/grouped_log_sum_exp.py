"""log sum exp over groups of a vocabulary, without ever holding a float32 copy of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PIECE = 2**22
"""Numbers in a piece of the vocabulary: 16 MiB in float32."""


def grouped_log_sum_exp(logits: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """For each position i and group g,  log sum over v in g of exp(z_iv).

    Each group is shifted by its own largest logit, so that an unlikely group is as exact as a likely one. Forward and
    backward pass go over the vocabulary in pieces and compute in float32; what is kept for the gradient is the logits
    as they came.

    Args:
        logits: z, float (positions, vocab); -inf where a token cannot come.
        groups: int64 (vocab,), 0 to num_groups - 1.
        num_groups: groups in all; an empty one has -inf.

    Returns:
        float32 (positions, num_groups), or float64 for float64 logits.

    Example:
        >>> z = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
        >>> grouped_log_sum_exp(z, torch.tensor([0, 1, 0, 1]), 2).exp()
        tensor([[0.4000, 0.6000]])
    """
    result: Tensor = _GroupedLogSumExp.apply(logits, groups, num_groups)  # type: ignore[no-untyped-call]
    return result


class _GroupedLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, groups: Tensor, num_groups: int) -> Tensor:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # -inf itself would make nan of a group that is empty so far.
        largest = logits.new_full((len(logits), num_groups), torch.finfo(dtype).min, dtype=dtype)
        total = torch.zeros_like(largest)
        for piece in _pieces(logits):
            part = logits[:, piece].to(dtype)
            index = groups[piece].expand_as(part)
            before, largest = largest, largest.scatter_reduce(1, index, part, "amax")
            part = (part - largest.gather(1, index)).exp_()
            total = (total * (before - largest).exp_()).scatter_add_(1, index, part)
        result = largest + total.log()
        ctx.save_for_backward(logits, groups, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """d result_g / d z_v = exp(z_v - result_g) for v in g."""
        logits, groups, result = ctx.saved_tensors
        result = result.clamp(min=torch.finfo(result.dtype).min)
        grad = torch.empty_like(logits)
        for piece in _pieces(logits):
            part = logits[:, piece].to(result.dtype)
            index = groups[piece].expand_as(part)
            share = (part - result.gather(1, index)).exp_()
            grad[:, piece] = (share * grads[0].gather(1, index)).to(logits.dtype)
        return grad, None, None


def _pieces(logits: Tensor) -> list[slice]:
    columns = max(256, _PIECE // max(len(logits), 1))
    return [slice(start, start + columns) for start in range(0, logits.shape[1], columns)]
