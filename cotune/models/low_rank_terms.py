"""Several low-rank terms beside the same frozen layers at once, of any ranks: y = W x + s sum_j B_j A_j x.

What `cotune.models.adapters` attaches is one adapter, through peft. Here each term is a mapping of plain tensors, so
that one of them learns while the others are frozen, each of its own rank, and a term can become a part of W for good.
Nothing is wrapped: hooks add the terms, and go with the `with` block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cotune.errors import InputError
from cotune.models.adapters import has_transposed_weights, linear_sizes
from cotune.models.low_bit import is_low_bit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class LowRankTerm:
    """B A of one layer.

    Attributes:
        a: float (rank, in).
        b: float (out, rank).
    """

    a: Tensor
    b: Tensor


Term = Mapping[str, LowRankTerm]
"""By the layers' names in the model, such as `model.layers.0.self_attn.q_proj`."""


@contextmanager
def low_rank_terms(model: PreTrainedModel, terms: Sequence[Term], *, scale: float) -> Iterator[None]:
    """Inside, the model computes with these terms too; gradients reach those whose tensors require one.

    Args:
        model: frozen or not; it is not changed.
        terms: any number.
        scale: s, of all of them.

    Raises:
        InputError: a layer is no linear one of the model, or has other sizes.

    Example:
        >>> with low_rank_terms(proxy, [shared, private], scale=2.0):  # doctest: +SKIP
        ...     logits = proxy(input_ids=input_ids).logits
    """
    by_layer: dict[str, list[LowRankTerm]] = {}
    for term in terms:
        _check(model, term)
        for layer, one in term.items():
            by_layer.setdefault(layer, []).append(one)
    with ExitStack() as hooks:
        for layer, own in by_layer.items():
            handle = model.get_submodule(layer).register_forward_hook(_adding(own, scale))
            hooks.callback(handle.remove)
        yield


@torch.no_grad()
def fold_low_rank(model: PreTrainedModel, term: Term, *, scale: float) -> None:
    """W <- W + s B A for good, summed in float32.

    Raises:
        InputError: as for `low_rank_terms`, or the weights have few bits.
    """
    if is_low_bit(model):
        raise InputError("the model has low-bit weights, expected whole ones to fold a term into")
    _check(model, term)
    is_transposed = has_transposed_weights(model)
    for layer, one in term.items():
        module = model.get_submodule(layer)
        weight = module.get_parameter("weight")
        product = scale * (one.b.to(weight.device).float() @ one.a.to(weight.device).float())
        is_turned = is_transposed and not isinstance(module, nn.Linear)
        weight.copy_(weight.float() + (product.T if is_turned else product))


def _adding(terms: Sequence[LowRankTerm], scale: float) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for one in terms:
            change = (args[0].to(one.a.dtype) @ one.a.T) @ one.b.T
            output = output + (scale * change).to(output.dtype)
        return output

    return add


def _check(model: PreTrainedModel, term: Term) -> None:
    sizes = linear_sizes(model)
    for layer, one in term.items():
        own = (one.a.shape[1], one.b.shape[0])
        if sizes.get(layer) != own:
            raise InputError(
                f"a term has (in, out) {own} for {layer}, of which this {type(model).__name__} has "
                f"{sizes.get(layer, 'none')}; take the model that it was made for"
            )
