"""A LoRA adapter of peft as a GGUF file, which llama.cpp puts on a model of `gguf_export` and takes off again.

llama.cpp adds (alpha / rank) B A x with one alpha for the file, so that a module with another scale gets it inside its
B. Rows of B of queries and keys are in the order of the weight's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from cotune.compression.gguf_export import check_gguf
from cotune.compression.gguf_names import ARCHITECTURES, gguf_name, row_order
from cotune.compression.llama_folder import LlamaFolder
from cotune.durable import replacing
from cotune.errors import InputError
from cotune.models.peft_adapter import WEIGHTS_FILE, read_config

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraFactors:
    """One module's part: y = W x + scale B A x.

    Attributes:
        a: float32 (rank, in).
        b: float32 (out, rank).
        scale: alpha / rank, or alpha / sqrt(rank) in rsLoRA.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scale: float


def export_gguf_adapter(adapter: Path, model: str | Path, out: Path) -> None:
    """Write a peft adapter folder as one GGUF file.

    Args:
        adapter: the folder, with a plain or rank-stabilised LoRA.
        model: that it was tuned on: a Hugging Face folder of the Llama family, a hub name, or `starter`.
        out: the file to make; an older one is replaced at the end.

    Raises:
        InputError: the adapter is more than LoRA on linear layers or does not fit the model, or the file cannot be
            written; what was at `out` is as before.

    Example:
        >>> export_gguf_adapter(Path("my-lora"), "starter", Path("my-lora.gguf"))  # doctest: +SKIP
    """
    check_gguf()
    source = LlamaFolder(model)
    factors = read_lora(adapter, source.shape.module_shapes())
    try:
        with replacing(out) as unfinished:
            _write(unfinished, factors, source)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error


def read_lora(adapter: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, LoraFactors]:
    """The factors in a peft adapter folder, by the dotted names of their modules.

    Args:
        adapter: the folder.
        shapes: outputs and inputs of the modules that may have some.

    Raises:
        InputError: it is no LoRA, or more than that, or made for another model.
    """
    config = read_config(adapter)
    if config.peft_type != "LORA" or getattr(config, "use_dora", False):
        kind = "DORA" if getattr(config, "use_dora", False) else str(config.peft_type.value)
        raise InputError(f"{adapter} is a {kind} adapter, expected LORA, which is what llama.cpp adds; tune one")
    path = adapter / WEIGHTS_FILE
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 safetensors' file is no mapping
                place = _TENSOR.fullmatch(name)
                if place is None or place["module"] not in shapes:
                    raise InputError(
                        f"{path} has {name}, expected lora_A and lora_B of linear layers of the model; name the model "
                        "that the adapter was tuned on"
                    )
                found.setdefault(place["module"], {})[place["factor"]] = file.get_tensor(name).float().numpy()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy the adapter again") from error
    if not found:
        raise InputError(f"{path} holds no adapter, expected lora_A and lora_B of at least one layer")
    return {module: _factors(adapter, module, pair, shapes[module], config) for module, pair in sorted(found.items())}


def _factors(
    adapter: Path, module: str, pair: Mapping[str, NDArray[np.float32]], shape: tuple[int, int], config: Any
) -> LoraFactors:
    from peft.utils.other import get_pattern_key

    num_out, num_in = shape
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None or a.shape != (len(a), num_in) or b.shape != (num_out, len(a)):
        shapes = tuple(None if factor is None else factor.shape for factor in (a, b))
        raise InputError(
            f"{adapter} has lora_A and lora_B of shapes {shapes} for {module}, expected (rank, {num_in}) and "
            f"({num_out}, rank); name the model that the adapter was tuned on"
        )
    rank = len(a)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    return LoraFactors(a=a, b=b, scale=alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _write(path: Path, factors: Mapping[str, LoraFactors], source: LlamaFolder) -> None:
    import gguf

    alpha = next((one.scale * len(one.a) for one in factors.values() if one.scale), 1.0)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[source.shape.architecture])
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_string("cotune.source_digest", source.digest)
        for module, one in factors.items():
            order = row_order(module, source.shape)
            own = one.scale * len(one.a) / alpha
            b = one.b if own == 1.0 else (one.b * np.float32(own)).astype(np.float32)
            name = f"{gguf_name(module)}.weight"
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(one.a))
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b if order is None else b[order]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
