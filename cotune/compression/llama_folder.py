"""A model folder of the Llama family, looked through and read tensor by tensor, for the exporters.

Exporters write graphs of their own, so they must know the architecture to the last operation. What is not known here
is refused by name, before anything is written: another architecture, a tensor without a place in it, a rotary
embedding that changes with the length of the text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from cotune.errors import InputError, first_line
from cotune.models.packed_folder import is_packed, read_packed
from cotune.models.packed_weights import PackedWeight
from cotune.models.weights import digest_folder, find_model_folder

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
LAYER_MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The linear modules of a decoder layer."""
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"

_INDEX_FILE = "model.safetensors.index.json"
_WEIGHT_FILE = "model.safetensors"
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """What a graph of the model needs to know besides its weights.

    Attributes:
        architecture: its class in transformers.
        hidden_size, mlp_width: widths of the residual stream and inside the MLP.
        num_layers, num_heads, num_kv_heads, head_dim: of the decoder.
        vocab_size: rows of the embedding.
        context: the most tokens that one text may have.
        rms_eps: inside the root of the norms.
        is_tied: whether the head is the embedding.
        end_ids: tokens that end a text.
        bos_id, pad_id: the token that begins one, and one that fills; None where the model has none.
        rope_type, rope_theta: of the rotary embedding, for formats that name it.
        rope_frequencies: float32 (head_dim / 2,), radians per position.
        rope_scale: factor of its cosines and sines.
    """

    architecture: str
    hidden_size: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    rms_eps: float
    is_tied: bool
    end_ids: tuple[int, ...]
    bos_id: int | None
    pad_id: int | None
    rope_type: str
    rope_theta: float
    rope_frequencies: NDArray[np.float32]
    rope_scale: float

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of every linear module of the decoder layers, by dotted name."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes = {
            "self_attn.q_proj": (query, self.hidden_size),
            "self_attn.k_proj": (kv, self.hidden_size),
            "self_attn.v_proj": (kv, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, query),
            "mlp.gate_proj": (self.mlp_width, self.hidden_size),
            "mlp.up_proj": (self.mlp_width, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.mlp_width),
        }
        return {f"model.layers.{i}.{name}": shapes[name] for i in range(self.num_layers) for name in LAYER_MODULES}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the model must have, by name; biases come on top where a folder has them."""
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in self.module_shapes().items()}
        for i in range(self.num_layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"model.layers.{i}.{norm}.weight"] = (self.hidden_size,)
        shapes[f"{FINAL_NORM}.weight"] = (self.hidden_size,)
        shapes[f"{EMBEDDING}.weight"] = (self.vocab_size, self.hidden_size)
        if not self.is_tied:
            shapes[f"{HEAD}.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


class LlamaFolder:
    """A checked folder; tensors are read when they are asked for.

    Attributes:
        path: of the folder.
        shape: what the model is.

    Example:
        >>> folder = LlamaFolder("starter")
        >>> folder.shape.num_layers, folder.whole("model.norm.weight").shape
        (6, (192,))
    """

    def __init__(self, model: str | Path, *, context: int | None = None) -> None:
        """Look through a model folder, a hub name or `starter`.

        Args:
            model: as `find_model_folder` takes it.
            context: the most tokens of a text, if less than the model's.

        Raises:
            InputError: there is no such model, it is of another architecture, or its tensors do not fit its config.
        """
        self.path = find_model_folder(str(model))
        self.shape = _read_shape(self.path, context)
        self._files = _tensor_files(self.path)
        self._check_names()

    @cached_property
    def packed(self) -> dict[str, PackedWeight]:
        """The quantised weights by name; empty where the folder has none."""
        return dict(read_packed(self.path)) if is_packed(self.path) else {}

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, of its weights; see `digest_folder`."""
        return digest_folder(self.path)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name, quantised or whole."""
        return name in self._files or name in self.packed

    def whole(self, name: str) -> NDArray[np.float32]:
        """A tensor in float32; of a quantised one, what its codes stand for.

        Raises:
            InputError: the file is damaged, or the tensor has another shape than the config says.
        """
        if name in self.packed:
            array = self.packed[name].dequantised()
        else:
            path = self._files[name]
            try:
                with safe_open(path, framework="pt") as file:
                    array = file.get_tensor(name).float().numpy()
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path} cannot be read ({error}); copy the model again") from error
        expected = self.shape.tensor_shapes().get(name) or self._bias_shapes()[name]
        if array.shape != expected:
            raise InputError(
                f"{name} in {self.path} has shape {array.shape}, expected {expected} by its config.json; "
                "copy the model again"
            )
        return array

    def _bias_shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{name}.bias": shape[:1] for name, shape in self.shape.module_shapes().items()}

    def _check_names(self) -> None:
        stored = self._files.keys() | self.packed.keys()
        expected = self.shape.tensor_shapes().keys()
        if missing := sorted(expected - stored):
            raise InputError(f"{self.path} lacks the tensor {missing[0]}; copy the whole model again")
        # Old files hold the frequencies too, and a tied model may hold its head twice.
        ignored = {f"{HEAD}.weight"} | {name for name in stored if name.endswith("rotary_emb.inv_freq")}
        if foreign := sorted(stored - expected - self._bias_shapes().keys() - ignored):
            raise InputError(
                f"{self.path} has the tensor {foreign[0]}, which a {self.shape.architecture} as it is exported here "
                f"has no place for; expected a plain model of {', '.join(ARCHITECTURES)}"
            )


def _read_shape(folder: Path, context: int | None) -> LlamaShape:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"config.json in {folder} cannot be read: {first_line(error)}") from error
    architecture = (config.architectures or [type(config).__name__])[0]
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{folder} is a {architecture}, which cannot be exported; expected one of {', '.join(ARCHITECTURES)}: "
            "distil it into a Llama, or run it with torch"
        )
    if config.hidden_act != "silu":
        raise InputError(f"{folder} has hidden_act {config.hidden_act!r}, expected 'silu', the Llama family's")
    chosen = config.max_position_embeddings if context is None else context
    if not 1 <= chosen <= config.max_position_embeddings:
        raise InputError(f"context is {chosen}, expected 1 to {config.max_position_embeddings}, the model's own")
    _check_window(folder, config, chosen)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in _STATIC_ROPE:
        raise InputError(
            f"{folder} has a rotary embedding of type {rope_type!r}, which changes with the length of the text; "
            f"expected one of {', '.join(_STATIC_ROPE)}"
        )
    rotary = LlamaRotaryEmbedding(config)
    frequencies: NDArray[np.float32] = rotary.inv_freq.float().numpy()
    if len(frequencies) * 2 != head_dim:
        raise InputError(f"{folder} rotates {len(frequencies) * 2} of {head_dim} dimensions of a head, expected all")
    return LlamaShape(
        architecture=architecture,
        hidden_size=config.hidden_size,
        mlp_width=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        context=chosen,
        rms_eps=config.rms_norm_eps,
        is_tied=bool(config.tie_word_embeddings),
        end_ids=_end_ids(folder, config),
        bos_id=config.bos_token_id,
        pad_id=config.pad_token_id,
        rope_type=rope_type,
        rope_theta=float(config.rope_parameters["rope_theta"]),
        rope_frequencies=frequencies,
        rope_scale=float(rotary.attention_scaling),
    )


def _check_window(folder: Path, config: Any, context: int) -> None:
    """Within a window as long as the text, attention over a sliding window is the usual attention."""
    window = getattr(config, "sliding_window", None)
    is_used = config.model_type == "mistral" or getattr(config, "use_sliding_window", False)
    if window is not None and is_used and context > window:
        raise InputError(
            f"{folder} sees {window} tokens at a time and context is {context}, expected at most {window}; "
            f"export with context {window}"
        )


def _end_ids(folder: Path, config: Any) -> tuple[int, ...]:
    """As `cotune.models.anatomy.describe` reads them."""
    ends = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        chosen = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        ends = ends if chosen is None else chosen
    return tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)


def _tensor_files(folder: Path) -> Mapping[str, Path]:
    """The file of each whole tensor."""
    index = folder / _INDEX_FILE
    if index.is_file() and not is_packed(folder):
        try:
            placed: Mapping[str, str] = json.loads(index.read_bytes())["weight_map"]
            return {name: folder / Path(file).name for name, file in placed.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is no index of weight files ({error}); copy the model again") from error
    return dict.fromkeys(_names_in(folder / _WEIGHT_FILE), folder / _WEIGHT_FILE)


def _names_in(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, framework="pt") as file:
            yield from file.keys()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is no safetensors file ({error}); copy the model again") from error
