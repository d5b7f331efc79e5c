"""The sizes of a language model, read from its config.json alone: what costs are predicted from.

    numbers of a layer = D Q + 2 D K + Q D + 3 D F + norms + biases
    numbers of a model = L (numbers of a layer) + D + V D (2 V D where the head is not tied)

Symbols: D hidden, Q = heads x head_dim, K = kv_heads x head_dim, F inner, V vocab, L layers. The layers are Llama's:
RMSNorm before attention and before a gated feed-forward half, rotary positions, grouped keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cotune.errors import InputError

# Whose layers are Llama's; another one would be predicted wrongly, so it is refused.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
_TIED_BY_DEFAULT = ("gemma",)
# Of the others peft's IA3 scales keys.
_QUERIES_ARE_SCALED = ("qwen2", "qwen3", "gemma")
# What transformers takes where a config.json of that kind does not say.
_HEAD_DIM_BY_DEFAULT = {"qwen3": 128, "gemma": 256}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama-like model.

    Example:
        >>> shape = ModelShape(hidden=64, inner=160, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=500)
        >>> shape.num_parameters
        150336
    """

    hidden: int
    """D, width of the residual stream."""
    inner: int
    """F, width of the feed-forward half."""
    layers: int
    """L."""
    heads: int
    """Heads of the queries."""
    kv_heads: int
    """Heads of keys and values."""
    head_dim: int
    """Width of a head."""
    vocab: int
    """V."""
    context: int = 2048
    """The most tokens of one text."""
    is_tied: bool = False
    """The head is the embedding."""
    has_qkv_bias: bool = False
    """Biases in the three projections into attention."""
    has_output_bias: bool = False
    """A bias in the projection out of attention."""
    has_mlp_bias: bool = False
    """Biases in the feed-forward half."""
    has_head_norms: bool = False
    """Queries and keys are normalised in each head (Qwen3)."""
    kind: str = "llama"
    """Its `model_type`."""

    def __post_init__(self) -> None:
        for name in ("hidden", "inner", "layers", "heads", "kv_heads", "head_dim", "vocab", "context"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**32:
                raise InputError(f"{name} is {value!r}, expected a whole number from 1 to {2**32}")
        if self.heads % self.kv_heads:
            raise InputError(f"kv_heads is {self.kv_heads}, expected a divisor of the {self.heads} heads")

    @property
    def q_width(self) -> int:
        """Q."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """K."""
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linear layers of one decoder layer, by their names in transformers."""
        return {
            "q_proj": (self.hidden, self.q_width),
            "k_proj": (self.hidden, self.kv_width),
            "v_proj": (self.hidden, self.kv_width),
            "o_proj": (self.q_width, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @property
    def scaled_widths(self) -> tuple[int, int, int]:
        """What IA3 scales: two of queries, keys and values, as peft names them for each kind, and the inner width."""
        return (self.q_width if self.kind in _QUERIES_ARE_SCALED else self.kv_width), self.kv_width, self.inner

    @property
    def num_linear(self) -> int:
        """Numbers in the matrices of one layer, D Q + 2 D K + Q D + 3 D F."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def num_norm(self) -> int:
        """Numbers in the norms of one layer."""
        return 2 * self.hidden + (2 * self.head_dim if self.has_head_norms else 0)

    @property
    def num_bias(self) -> int:
        """Numbers in the biases of one layer."""
        return (
            (self.q_width + 2 * self.kv_width) * self.has_qkv_bias
            + self.hidden * self.has_output_bias
            + (2 * self.inner + self.hidden) * self.has_mlp_bias
        )

    @property
    def num_layer(self) -> int:
        """Numbers in one layer."""
        return self.num_linear + self.num_norm + self.num_bias

    @property
    def num_embedding(self) -> int:
        """Numbers in the embedding and the head, V D once or twice."""
        return self.vocab * self.hidden * (1 if self.is_tied else 2)

    @property
    def num_parameters(self) -> int:
        """Numbers in the model, tied ones once."""
        return self.layers * self.num_layer + self.hidden + self.num_embedding

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From the content of a transformers config.json.

        Raises:
            InputError: no language model, one whose layers are not known here, or a size that cannot be.
        """
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise InputError(
                f"the config's model_type is {kind!r}, expected a language model of type {', '.join(MODEL_TYPES)}"
            )
        try:
            hidden, heads = config["hidden_size"], config["num_attention_heads"]
            head_dim = config.get("head_dim") or _HEAD_DIM_BY_DEFAULT.get(kind) or hidden // heads
            bias = bool(config.get("attention_bias", False))
            return cls(
                hidden=hidden,
                inner=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=head_dim,
                vocab=config["vocab_size"],
                context=config.get("max_position_embeddings") or 2048,
                is_tied=bool(config.get("tie_word_embeddings", kind in _TIED_BY_DEFAULT)),
                has_qkv_bias=bias or kind == "qwen2",
                has_output_bias=bias,
                has_mlp_bias=bool(config.get("mlp_bias", False)),
                has_head_norms=kind == "qwen3",
                kind=kind,
            )
        except KeyError as error:
            raise InputError(f"the config has no {error.args[0]}, expected a config.json of transformers") from error
        except (TypeError, ZeroDivisionError) as error:
            raise InputError(f"the config's sizes are no whole numbers above 0 ({error}); copy it again") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """From a config.json.

        Raises:
            InputError: it cannot be read, or is the config of something else.
        """
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); give the config.json of a model") from error
        except ValueError as error:
            raise InputError(f"{path} cannot be read as JSON ({error}); give the config.json of a model") from error
        if not isinstance(config, dict):
            raise InputError(f"{path} holds a {type(config).__name__}, expected the JSON object of a config.json")
        return cls.from_config(config)


def plain_config(
    kind: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int, **more: object
) -> dict[str, object]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        **more,
    }


KNOWN_CONFIGS: dict[str, dict[str, object]] = {
    "llama-7b": plain_config("llama", 4096, 11_008, 32, 32, 32, 32_000, 2048),
    "llama-13b": plain_config("llama", 5120, 13_824, 40, 40, 40, 32_000, 2048),
    "llama-3-8b": plain_config("llama", 4096, 14_336, 32, 32, 8, 128_256, 8192),
    "mistral-7b": plain_config("mistral", 4096, 14_336, 32, 32, 8, 32_000, 32_768, sliding_window=None),
    "qwen2.5-0.5b": plain_config("qwen2", 896, 4864, 24, 14, 2, 151_936, 32_768, tie_word_embeddings=True),
    "qwen2.5-1.5b": plain_config("qwen2", 1536, 8960, 28, 12, 2, 151_936, 32_768, tie_word_embeddings=True),
    "qwen2.5-7b": plain_config("qwen2", 3584, 18_944, 28, 28, 4, 152_064, 32_768),
    "tinyllama-1.1b": plain_config("llama", 2048, 5632, 22, 32, 4, 32_000, 2048),
}
"""Configs of published models, as far as they decide times and bytes, so that they can be planned for without files."""
KNOWN_SHAPES = {name: ModelShape.from_config(config) for name, config in KNOWN_CONFIGS.items()}
