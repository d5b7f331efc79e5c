"""A frozen base in 4 or 8 bits (QLoRA, Dettmers et al., arXiv 2305.14314; LLM.int8, arXiv 2208.07339), by bitsandbytes.

The linear layers but the output embedding are stored in NF4 blocks of 64 with one scale each, or in int8 with one scale
for each row, and are computed in the model's number type. Only adapters can be tuned on them. It works on CPU and CUDA.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cotune.errors import InputError
from cotune.models.packed_folder import is_packed, read_packed
from cotune.models.weights import DTYPES, find_model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BITS = (4, 8)


def low_bit_placement(bits: int, *, dtype: str, device: str) -> dict[str, Any]:
    """Options of transformers' `from_pretrained` that load a model with `bits` per weight.

    Args:
        bits: 4 or 8.
        dtype: that products are computed in.
        device: where to.

    Raises:
        InputError: other bits, an unknown dtype, or bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if bits not in BITS:
        raise InputError(f"base bits are {bits}, expected 4 or 8, or none for whole weights")
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"base bits are {bits}, which needs bitsandbytes; install cotune[lowbit]")
    # It says in every int8 product that it computes in float16, and at import which optional kernels it lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # int8 outliers stay in whole numbers by bitsandbytes' own threshold.
    quantisation = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype])
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    return {"quantization_config": quantisation, "device_map": {"": device}}


def keep_differentiable(model: PreTrainedModel) -> None:
    """Make 4-bit layers on a CPU compute such that gradients flow through them.

    In evaluation mode bitsandbytes 0.50 rearranges the weights for a kernel that has no backward pass and answers in
    bfloat16, for good; training after an evaluation would then learn from wrong gradients without a word.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def is_low_bit(model: PreTrainedModel) -> bool:
    """Whether its weights are stored in fewer bits than they are computed in."""
    return getattr(model, "quantization_method", None) is not None


def is_eight_bit(model: PreTrainedModel) -> bool:
    """Whether its weights are stored in int8."""
    return is_low_bit(model) and any(type(parameter).__name__ == "Int8Params" for parameter in model.parameters())


def dequantised(layer: nn.Module) -> Tensor:
    """The weight (out, in) that a low-bit linear layer computes with.

    Raises:
        InputError: it is of a kind that is not known here.
    """
    import bitsandbytes as bnb

    weight: Any = layer.weight
    if isinstance(weight, bnb.nn.Params4bit):
        whole: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return whole
    if isinstance(weight, bnb.nn.Int8Params):
        # The first pass moves the scales from the weight to the layer.
        state: Any = layer.state
        scales: Tensor = state.SCB if weight.SCB is None else weight.SCB
        scaled: Tensor = weight.data.float() * scales[:, None] / 127
        return scaled
    raise InputError(f"a layer holds a {type(weight).__name__}, expected low-bit weights of bitsandbytes")


def original_weights(model: str, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The whole weights from a model's folder, one after another; quantised ones as the numbers they stand for.

    Args:
        model: folder, hub name or `starter`.
        names: of tensors in its safetensors files.

    Raises:
        InputError: a file cannot be read, or holds other names.
    """
    folder = find_model_folder(model)
    index = folder / "model.safetensors.index.json"
    wanted = set(names)
    packed = {name: w for name, w in read_packed(folder) if name in wanted} if is_packed(folder) else {}
    try:
        files = json.loads(index.read_bytes())["weight_map"] if index.is_file() else {}
        for name in names:
            if name in packed:
                yield name, torch.from_numpy(packed[name].dequantised())
                continue
            with safe_open(folder / files.get(name, "model.safetensors"), framework="pt") as file:
                yield name, file.get_tensor(name).to(torch.float32)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"the whole weights of {model} cannot be read ({error}); take another init") from error
