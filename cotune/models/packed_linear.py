"""Linear layers on a CPU, float32, with their weights in oneDNN's own order.

PyTorch's own product rearranges the weight in every call with more than one row; done once, a product of four rows
is two to three times as fast, and its results stop depending on the number of rows, even for a single one (see
`cotune.models.row_invariance`). It costs a second copy of the weights in memory. Small weights gain nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MIN_ELEMENTS = 2**16
"""Smaller weights stay as they are: the call itself costs more than it saves."""

# The weight's order is chosen for this many rows; any number may come.
_ROWS = 16


class PackedProduct:
    """x W^T + b with a packed copy of W, for x float32 (rows, in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        self._bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return product


class PackedLinears:
    """A model's large linear layers, packed; the model itself is as before outside of `active`.

    Args:
        model: frozen; a layer that has another weight later computes with that one, unpacked.

    Example:
        >>> model = nn.Sequential(nn.Linear(256, 256)).requires_grad_(False)
        >>> packed = PackedLinears(model)
        >>> with packed.active(), torch.inference_mode():
        ...     model(torch.ones(1, 256)).shape
        torch.Size([1, 256])
    """

    def __init__(self, model: nn.Module) -> None:
        # Adapters of peft are neighbours of plain layers, not subclasses: only plain layers are packed.
        self._products = [
            (module, module.weight, module.bias, PackedProduct(module.weight, module.bias))
            for module in model.modules()
            # Where somebody else has changed what a layer does, such as accelerate, it stays so.
            if type(module) is nn.Linear and "forward" not in module.__dict__ and is_packable(module.weight)
        ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it the layers compute with the packed weights."""
        packed = [
            (module, product)
            for module, weight, bias, product in self._products
            if module.weight is weight and module.bias is bias
        ]
        for module, product in packed:
            module.__dict__["forward"] = product
        try:
            yield
        finally:
            for module, _ in packed:
                del module.__dict__["forward"]


def is_packable(weight: Tensor) -> bool:
    """Whether packing this weight is possible and worth it."""
    # The operations that PyTorch's compiler uses for frozen models. Where a version lacks them, plain products serve.
    operations = torch.ops.mkldnn
    return (
        weight.numel() >= MIN_ELEMENTS
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(operations, "_reorder_linear_weight")
        and hasattr(operations, "_linear_pointwise")
    )
