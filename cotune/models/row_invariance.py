"""How many rows a matrix product must have so that each row's result is the same however many there are.

Kernels choose by shape: a product with one row is another algorithm than one with a hundred, and adds in another
order. Above some small number most stay with one order for each element, whatever the number of rows; then tokens
that share a pass do not disturb each other, to the last bit. That number is measured here, on the machine and in the
number type of the model. See "Defeating Nondeterminism in LLM Inference" (Thinking Machines, 2025).

Functions of single elements, such as SiLU, do most of a tensor with vector instructions and the last few elements
without, which gives other last bits. So the last rows of a pass are always padding.

Intel's MKL, behind PyTorch's products on most processors, also looks at the alignment of memory and at threads, unless
it is told not to: MKL_CBWR=AUTO,STRICT in the environment, before PyTorch is loaded. `cotune` the command sets that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CANDIDATES = (1, 2, 4, 8, 16, 32)
_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 130, 160)


# The longest tail that vector loops leave over: two vectors of 64 bytes, in two-byte numbers, less one.
_TAIL = 63
# PyTorch hands out larger tensors to several threads, in parts that should end with whole vectors.
_THREAD_ROWS = 16


def padded_rows(num_rows: int, *, floor: int, narrowest: int) -> int:
    """How many rows a pass with `num_rows` rows of tokens should have.

    Args:
        num_rows: tokens.
        floor: what `min_invariant_rows` measured.
        narrowest: the smallest width of a row in any function of single elements, such as the head dimension.

    Example:
        >>> padded_rows(1, floor=4, narrowest=64), padded_rows(4, floor=4, narrowest=16)  # on one thread
        (4, 8)
    """
    padded = max(floor, num_rows + -(-_TAIL // narrowest))
    if torch.get_num_threads() == 1:
        return few_sizes(padded)
    return few_sizes(-(-padded // _THREAD_ROWS) * _THREAD_ROWS)


def few_sizes(num_rows: int) -> int:
    """The next of a few numbers: oneDNN makes code for every shape that it meets, and keeps it.

    With all numbers up to 256 that comes to hundreds of megabytes, and to milliseconds at each first meeting.

    Example:
        >>> [few_sizes(n) for n in (3, 5, 13, 17, 100, 130)]
        [3, 8, 16, 24, 104, 144]
    """
    if num_rows <= 4:
        return num_rows
    step = 4 if num_rows <= 16 else max(8, 2 ** ((num_rows - 1).bit_length() - 4))
    return -(-num_rows // step) * step


def min_invariant_rows(functions: Iterable[tuple[Callable[[Tensor], Tensor], int]], like: Tensor) -> int | None:
    """The fewest rows from which on no product depends on their number; None where there is no such number.

    Args:
        functions: each maps (rows, width) to (rows, ...) or to (..., rows, out), with its width.
        like: a tensor of the type and device to test with.

    Example:
        >>> weight = torch.eye(8)
        >>> min_invariant_rows([(lambda rows: rows @ weight, 8)], weight)
        1
    """
    generator = torch.Generator().manual_seed(0)
    smallest: int | None = _CANDIDATES[0]
    # All are measured, come what may: the ranks of a shared model must do the same.
    for function, width in functions:
        inputs = torch.randn(_COUNTS[-1], width, generator=generator).to(like)
        with torch.inference_mode():
            full = function(inputs)
            differing = [n for n in _COUNTS[:-1] if not _is_prefix(function(inputs[:n]), full, n)]
        largest = max(differing, default=0)
        fitting = [n for n in _CANDIDATES if n > largest]
        smallest = max(smallest, fitting[0]) if fitting and smallest is not None else None
    return smallest


def _is_prefix(part: Tensor, full: Tensor, num_rows: int) -> bool:
    return torch.equal(part, full.narrow(-2, 0, num_rows))


def products(model: nn.Module) -> list[tuple[Callable[[Tensor], Tensor], int]]:
    """One of each kind and shape of the matrix products in a model."""
    from transformers.pytorch_utils import Conv1D

    found: dict[tuple[object, ...], tuple[Callable[[Tensor], Tensor], int]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            width = module.in_features
        elif isinstance(module, Conv1D):
            width = module.weight.shape[0]
        else:
            continue
        found.setdefault((type(module), tuple(module.weight.shape), module.bias is None), (module, width))
    return list(found.values())


def attention_is_invariant(heads: int, kv_heads: int, head_dim: int, like: Tensor) -> bool:
    """Whether single queries attend the same, to the last bit, whoever else is in the call and however long they are.

    Args:
        heads, kv_heads, head_dim: of a layer.
        like: a tensor of the type and device to test with.
    """
    generator = torch.Generator().manual_seed(0)
    rows, longest = 16, 256

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    queries, keys, values = (
        random(rows, heads, 1, head_dim),
        random(rows, kv_heads, longest, head_dim),
        random(rows, kv_heads, longest, head_dim),
    )
    lengths = torch.randint(1, 65, (rows,), generator=generator)
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None].to(like.device)

    def attend(num_rows: int, num_keys: int) -> Tensor:
        return F.scaled_dot_product_attention(
            queries[:num_rows],
            keys[:num_rows, :, :num_keys],
            values[:num_rows, :, :num_keys],
            attn_mask=mask[:num_rows, ..., :num_keys],
            enable_gqa=heads > kv_heads,
        )

    with torch.inference_mode():
        full = attend(rows, longest)
        return all(
            torch.equal(attend(num_rows, num_keys), full[:num_rows])
            for num_rows in (1, 2, 3, 5, 8, 15)
            for num_keys in (64, 128, 256)
        )
