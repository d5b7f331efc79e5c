"""From the shards that transformers' tensor parallel plan loads to plain layers on each rank.

The plan (Megatron-LM, Shoeybi et al., 2019) cuts the layers in pairs: the first of a pair by outputs, the second by
inputs, whose products each rank has in part and all ranks sum up. transformers cuts and loads the weights; its own
wrappers around each layer are for training too and cost more than a small layer's product, and its sums are in
an order that depends on the place in the tensor. So each layer becomes a plain one over this rank's part, and the
few exchanges are hooks: sums go over the ranks in ascending order, for each element alone, in float32, so that rows
which share a pass do not disturb each other here either.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from cotune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# All ranks' tensors of one shape, (ranks, ...), in the order of ranks.
Gather = Callable[[Tensor], Tensor]

# Styles of transformers' plans, by what they do.
_BY_OUTPUTS = ("colwise",)
_BY_OUTPUTS_GATHERED = ("colwise_gather_output", "colwise_rep")
_BY_INPUTS = ("rowwise", "rowwise_rep")
_BY_TOKENS = ("embedding_rowwise",)
# Nothing to do where there are no gradients.
_WHOLE = ("replicated_with_grad_allreduce", "replicate")


def check_ranks(config: Any, num_ranks: int) -> None:
    """Refuse a number of ranks among which the heads cannot be shared out.

    Args:
        config: transformers' config of the model.
        num_ranks: how many processes share it.

    Raises:
        InputError: it does not divide the heads, or the model has no plan.

    Example:
        >>> from transformers import LlamaConfig
        >>> check_ranks(LlamaConfig(num_attention_heads=6, num_key_value_heads=2), 4)
        Traceback (most recent call last):
        cotune.errors.InputError: 4 ranks came, expected a number that divides 6 heads and 2 key-value heads: 1 or 2
    """
    config = config.get_text_config()
    if not getattr(config, "base_model_tp_plan", None):
        raise InputError(
            f"the model type {config.model_type} has no tensor parallel plan in transformers; "
            "use --device-map auto, or take a model such as Llama, Qwen or Mistral"
        )
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    fitting = [n for n in range(1, min(heads, kv_heads) + 1) if heads % n == 0 and kv_heads % n == 0]
    if num_ranks not in fitting:
        *others, last = map(str, fitting)
        known = f"{', '.join(others)} or {last}" if others else last
        raise InputError(
            f"{num_ranks} ranks came, expected a number that divides {heads} heads and {kv_heads} key-value heads: "
            f"{known}"
        )


def whole_weight(layer: nn.Linear) -> Tensor:
    """The weight of a layer as if it were not cut, on a CPU. All ranks must call it together."""
    weight = layer.weight.detach()
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).cpu()


def use_own_shards(model: PreTrainedModel, rank: int, gather: Gather) -> None:
    """Make each cut layer of `model` a plain one over this rank's part, with the exchange that it needs.

    Args:
        model: loaded by transformers with a tensor parallel plan.
        rank: of this process.
        gather: brings the ranks' tensors together.

    Raises:
        InputError: the plan cuts layers in a way that is not known here.
    """
    plan: dict[str, str] = model.tp_plan
    own: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        cut = {key: value for key, value in module.named_parameters(recurse=False) if isinstance(value, DTensor)}
        style = plan.get(re.sub(r"\d+", "*", name))
        if not cut:
            if style is not None and style not in _WHOLE:
                raise _unknown(model, name, style)
            continue
        if type(module) is nn.Linear and style in (*_BY_OUTPUTS, *_BY_OUTPUTS_GATHERED):
            size = module.out_features
            _take_own(module, cut, own)
            if style in _BY_OUTPUTS_GATHERED:
                module.register_forward_hook(_Joined(gather, size))
        elif type(module) is nn.Linear and style in _BY_INPUTS:
            _take_own(module, cut, own)
            # The bias comes once, after the sum.
            bias = module.bias
            module.register_parameter("bias", None)
            module.in_features = module.weight.shape[1]
            module.register_forward_hook(_Summed(gather, bias))
        elif isinstance(module, nn.Embedding) and style in _BY_TOKENS:
            first = rank * -(-module.num_embeddings // _num_ranks(cut["weight"]))
            _take_own(module, cut, own)
            module.__dict__["forward"] = _OwnTokens(module.forward, module, first)
            module.register_forward_hook(_Summed(gather, None))
        else:
            raise _unknown(model, name, style)


def _unknown(model: PreTrainedModel, name: str, style: str | None) -> InputError:
    return InputError(
        f"{type(model).__name__} cannot be shared among ranks: the plan of transformers treats {name} as {style}, "
        "expected column-wise and row-wise linear layers; use --device-map auto"
    )


def _take_own(module: nn.Module, cut: dict[str, DTensor], own: dict[int, nn.Parameter]) -> None:
    # transformers' wrapper; the class's own forward is below it.
    module.__dict__.pop("forward", None)
    for key, parameter in cut.items():
        # Tied weights stay one.
        if id(parameter) not in own:
            own[id(parameter)] = nn.Parameter(_own_part(parameter), requires_grad=False)
        setattr(module, key, own[id(parameter)])


def _own_part(parameter: DTensor) -> Tensor:
    """A copy in PyTorch's own memory, of the same shape on each rank: the last ones' are filled up with zeros."""
    part: Tensor = parameter.to_local()
    for dim in range(part.ndim):
        if any(placement.is_shard(dim) for placement in parameter.placements):
            missing = -(-parameter.shape[dim] // _num_ranks(parameter)) - part.shape[dim]
            part = F.pad(part, [0, 0] * (part.ndim - 1 - dim) + [0, missing])
    return part.clone(memory_format=torch.contiguous_format)


def _num_ranks(parameter: DTensor) -> int:
    return int(parameter.device_mesh.size())


class _Joined:
    """The ranks' outputs side by side."""

    def __init__(self, gather: Gather, size: int) -> None:
        self._gather = gather
        self._size = size

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        parts = self._gather(output.contiguous())
        return torch.cat(tuple(parts), dim=-1)[..., : self._size]


class _Summed:
    """The sum of the ranks' outputs."""

    def __init__(self, gather: Gather, bias: Tensor | None) -> None:
        self._gather = gather
        self._bias = bias

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        first, *others = self._gather(output.contiguous())
        total = first.float()  # of the gathered copy, which nobody else reads
        for other in others:
            total += other.float()
        result: Tensor = total.to(output.dtype)
        return result if self._bias is None else result + self._bias


class _OwnTokens:
    """Looks up those tokens that are this rank's; zeros for the others."""

    def __init__(self, look_up: Callable[[Tensor], Tensor], embedding: nn.Embedding, first: int) -> None:
        self._look_up = look_up
        self._embedding = embedding
        self._first = first

    def __call__(self, input_ids: Tensor) -> Tensor:
        index = input_ids - self._first
        is_own = (index >= 0) & (index < len(self._embedding.weight))
        vectors = self._look_up(index.where(is_own, 0))
        return vectors.masked_fill(~is_own[..., None], 0.0)
