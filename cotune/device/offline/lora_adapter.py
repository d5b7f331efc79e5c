"""A LoRA adapter as peft writes it, read in NumPy for a model without PyTorch.

LoRA (Hu et al., arXiv 2106.09685): y = W x + (alpha / r) B A x, with alpha / sqrt(r) in its rank-stabilised form
(Kalajdzievski, arXiv 2312.03732). Here products are written for rows, y = x W' + (x A') B', and B' holds the factor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from cotune.device.offline.folder import ModuleShape, read_bounded
from cotune.errors import InputError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 2**20
MAX_WEIGHT_BYTES = 512 * 2**20

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_PLAIN_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]+")
# Fields that make more of an adapter than two factors for each module, or count from other weights than the model's.
_REFUSED = (
    "use_dora",
    "bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "megatron_config",
    "alora_invocation_tokens",
    "use_qalora",
    "lora_bias",
)
_MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True, kw_only=True)
class LoraFactors:
    """The factors of one module.

    Attributes:
        a: float32 (in, rank).
        b: float32 (rank, out), multiplied by alpha / rank.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LoraAdapter:
    """The factors of all modules that an adapter changes. Fits `Adapter`.

    Attributes:
        name: of its folder.
        modules: by the dotted names of the model.
    """

    name: str
    modules: Mapping[str, LoraFactors]

    @classmethod
    def read(cls, folder: Path | str, shapes: Mapping[str, ModuleShape]) -> LoraAdapter:
        """Read a peft folder.

        Args:
            folder: with `adapter_config.json` and `adapter_model.safetensors`.
            shapes: of the modules that take an adapter.

        Raises:
            InputError: a file is missing, too large or damaged, the adapter is more than LoRA, or it is made for other
                modules or shapes than these.

        Example:
            >>> adapter = LoraAdapter.read("my-lora", model.description.adapter_modules)   # doctest: +SKIP
        """
        folder = Path(folder)
        config = _config(folder / CONFIG_FILE)
        found: dict[str, dict[str, NDArray[np.float32]]] = {}
        for name, tensor in _tensors(folder / WEIGHTS_FILE).items():
            match = _TENSOR.fullmatch(name.removeprefix(_PREFIX))
            if match is None or tensor.ndim != 2:
                raise InputError(f"{folder} has the tensor {name!r:.120}, expected factors of linear layers alone")
            found.setdefault(match["module"], {})[match["factor"]] = tensor
        if not found:
            raise InputError(f"{folder} has no factors in {WEIGHTS_FILE}; train the adapter again")
        modules = {
            module: _factors(folder, config, module, pair, _shape(folder, module, shapes))
            for module, pair in sorted(found.items())
        }
        return cls(name=folder.name, modules=modules)

    @property
    def rank(self) -> int:
        """The largest of its modules."""
        return max(len(factors.b) for factors in self.modules.values())

    def filled(self, shapes: Mapping[str, ModuleShape]) -> LoraAdapter:
        """The same with factors for all of these modules, and of one rank: what is missing is zeros."""
        return replace(self, modules={name: self._filled(name, shape) for name, shape in shapes.items()})

    def _filled(self, name: str, shape: ModuleShape) -> LoraFactors:
        a = np.zeros((shape.in_dim, self.rank), np.float32)
        b = np.zeros((self.rank, shape.out_dim), np.float32)
        if name in self.modules:
            factors = self.modules[name]
            a[:, : factors.a.shape[1]] = factors.a
            b[: factors.b.shape[0]] = factors.b
        return LoraFactors(a=a, b=b)


def _shape(folder: Path, module: str, shapes: Mapping[str, ModuleShape]) -> ModuleShape:
    if module not in shapes:
        known = f"of {len(shapes)} modules, such as {next(iter(shapes))}" if shapes else "which takes no adapters"
        raise InputError(
            f"{folder} changes {module!r:.120}, which this offline model cannot swap ({known}); use the adapter of "
            "this model, or export the model for it"
        )
    return shapes[module]


def _factors(
    folder: Path, config: dict[str, Any], module: str, pair: Mapping[str, NDArray[np.float32]], shape: ModuleShape
) -> LoraFactors:
    if set(pair) != {"A", "B"}:
        raise InputError(f"{folder} has only lora_{next(iter(pair))} of {module}, expected lora_A and lora_B")
    a, b = pair["A"], pair["B"]
    rank = a.shape[0]
    if rank < 1 or a.shape != (rank, shape.in_dim) or b.shape != (shape.out_dim, rank):
        raise InputError(
            f"{folder} has lora_A {a.shape} and lora_B {b.shape} for {module}, expected (rank, {shape.in_dim}) and "
            f"({shape.out_dim}, rank); use the adapter of this model"
        )
    alpha = _alpha(config, module)
    factor = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    scaled = np.ascontiguousarray(b.T) * np.float32(factor)
    if not (np.isfinite(a).all() and np.isfinite(scaled).all()):
        raise InputError(f"{folder} holds nan or inf for {module}, expected finite numbers; train the adapter again")
    return LoraFactors(a=np.ascontiguousarray(a.T), b=scaled)


def _alpha(config: dict[str, Any], module: str) -> float:
    """Of this module: its own where the pattern names it, else that of all."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        plain = pattern.removeprefix("^")
        if module == plain or (plain == pattern and module.endswith(f".{plain}")):
            return float(alpha)
    return float(config["lora_alpha"])


def _config(path: Path) -> dict[str, Any]:
    try:
        config: Any = json.loads(_read(path, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no JSON ({error}); copy the adapter again") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise InputError(f"{path} is of kind {kind!r:.80}, expected LORA, which is what an offline model can swap")
    asked = [name for name in _REFUSED if config.get(name) not in (None, "none", False, [])]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_MUTATING_INITS):
        asked.append(f"init_lora_weights {init!r:.40}")
    if asked:
        raise InputError(f"{path} sets {asked[0]}, which an offline model cannot take; train a plain LoRA adapter")
    patterns = config.get("alpha_pattern") or {}
    numbers = [config.get("lora_alpha"), *(patterns.values() if isinstance(patterns, dict) else [None])]
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one) for one in numbers):
        raise InputError(
            f"{path} has lora_alpha {numbers[0]!r:.40} and alpha_pattern {patterns!r:.80}, expected finite numbers"
        )
    unclear = [name for name in patterns if not _PLAIN_PATTERN.fullmatch(name)]
    if unclear:
        raise InputError(f"{path} has the alpha_pattern {unclear[0]!r:.80}, expected plain names of modules")
    return dict(config)


def _read(path: Path, most: int) -> bytes:
    if not path.is_file():
        raise InputError(f"{path} is missing, expected a LoRA adapter as peft or `cotune tune --method lora` writes it")
    return read_bounded(path, most)


def _tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    data = _read(path, MAX_WEIGHT_BYTES)
    try:
        entries: list[tuple[str, dict[str, Any]]] = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise InputError(f"{path} is no safetensors file ({error}); copy the adapter again") from error
    return {name: _as_float32(name, entry) for name, entry in entries}


def _as_float32(name: str, entry: Mapping[str, Any]) -> NDArray[np.float32]:
    kind, shape, data = entry["dtype"], entry["shape"], entry["data"]
    if kind == "BF16":
        # The upper half of a float32.
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32).reshape(shape)
    plain = {"F32": "<f4", "F16": "<f2"}
    if kind not in plain:
        raise InputError(f"the adapter's tensor {name!r:.120} is {kind}, expected F32, F16 or BF16")
    return np.frombuffer(data, plain[kind]).astype(np.float32).reshape(shape)
