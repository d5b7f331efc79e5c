"""Linear layers on a CPU, float32, with their weights in oneDNN's own order.

PyTorch's own product rearranges the weight in every call with more than one row; done once, a product of four rows
is two to three times as fast, and its results stop depending on the number of rows, even for a single one (see
`cotune.models.row_invariance`). It costs a second copy of the weights in memory. Small weights gain nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

MIN_ELEMENTS = 2**16
"""Smaller weights stay as they are: the call itself costs more than it saves."""

# The weight's order is chosen for this many rows; any number may come.
_ROWS = 16


class PackedLinears:
    """A model's large linear layers, packed; the model itself is as before outside of `active`.

    Args:
        model: frozen; weights that change later are not seen.

    Example:
        >>> model = nn.Sequential(nn.Linear(256, 256)).requires_grad_(False)
        >>> packed = PackedLinears(model)
        >>> with packed.active(), torch.inference_mode():
        ...     model(torch.ones(1, 256)).shape
        torch.Size([1, 256])
    """

    def __init__(self, model: nn.Module) -> None:
        self._forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        if not _is_available():
            return
        for module in model.modules():
            # Adapters of peft are subclasses' neighbours, not subclasses: only plain layers are packed.
            if type(module) is not nn.Linear or module.weight.numel() < MIN_ELEMENTS:
                continue
            if module.weight.device.type != "cpu" or module.weight.dtype != torch.float32:
                continue
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), _ROWS)
            bias = None if module.bias is None else module.bias.detach()
            self._forwards.append((module, partial(_product, packed, bias)))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it the layers compute with the packed weights."""
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            for module, _ in self._forwards:
                del module.__dict__["forward"]


def _product(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


def _is_available() -> bool:
    # The operations that PyTorch's compiler uses for frozen models. Where a version lacks them, plain products serve.
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    operations = torch.ops.mkldnn
    return hasattr(operations, "_reorder_linear_weight") and hasattr(operations, "_linear_pointwise")
