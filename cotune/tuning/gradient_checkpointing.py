"""Gradient checkpointing (Chen et al., arXiv 1604.06174): each decoder layer is computed again in the backward pass.

Of each layer only its input is kept, for one more forward pass of time. Gradients are the same, bit for bit.

transformers' own switch needs the model in training mode, which turns dropout on, and computes again with the model's
own parameters, where the loops here put others in by `torch.func.functional_call`. So this is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from cotune.models.anatomy import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def gradient_checkpointing(model: PreTrainedModel, *, enabled: bool = True) -> Iterator[None]:
    """Inside, passes with gradients keep the inputs of the decoder layers and nothing else of them.

    Args:
        model: the plain model; an adapter may already be in it.
        enabled: False changes nothing.

    Raises:
        InputError: an architecture without a list of decoder layers.

    Example:
        >>> with gradient_checkpointing(model):  # doctest: +SKIP
        ...     loss = answer_nats(model, head, params, batch).mean()
        >>> loss.backward()  # doctest: +SKIP
    """
    layers = list(decoder_layers(model)) if enabled else []
    for layer in layers:
        layer.__dict__["forward"] = _recomputed(layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


class _Call(nn.Module):
    """A layer whose forward is the original one."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.original = layer, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


def _recomputed(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    call = _Call(layer, forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # The parameters of this very call: by the time of the backward pass the module has its own again.
        params: dict[str, Tensor] = dict(call.named_parameters())
        kept_args = tuple(_snapshot(arg) for arg in args)
        kept_kwargs = {name: _snapshot(arg) for name, arg in kwargs.items()}

        def again(*args: Any) -> Any:
            # A cache grows as it is read; the second time it must be as it was before the first.
            past = {name: _snapshot(arg) for name, arg in kept_kwargs.items()}
            return functional_call(call, params, tuple(_snapshot(arg) for arg in args), past, tie_weights=False)

        return checkpoint(again, *kept_args, use_reentrant=False)

    return run


def _snapshot(value: Any) -> Any:
    """A cache as it is now, such that reading on from it leaves the original alone; anything else itself."""
    from transformers import Cache

    if not isinstance(value, Cache):
        return value
    same = copy.copy(value)
    same.layers = [copy.copy(layer) for layer in value.layers]
    return same
