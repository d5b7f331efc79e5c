"""A made-up model of any size, in NumPy: for bytes, times and memory that depend on sizes and not on weights.

Its base distribution is peaked like that of a language model, and its plugin's corrections change some of the
tokens, so that a generation with it takes every way through the protocol.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cotune.errors import InputError
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import StepFeatures
from cotune.plugin import GateParameters, Plugin
from cotune.wire.description import CloudDescription
from cotune.wire.features import SequenceFeatures

NUM_LIKELY = 64


@dataclass(frozen=True, kw_only=True)
class SyntheticShape:
    """Sizes of a model and its plugin; the defaults are those of a Llama of 7 B parameters.

    Attributes:
        step_ms: how long a forward pass takes at least, as if an accelerator did it.
    """

    num_taps: int = 33
    tap_dim: int = 32
    side_width: int = 32
    inner_width: int = 128
    basis_dim: int = 64
    vocab_size: int = 32_000
    hidden_size: int = 4096
    step_ms: float = 0.0
    seed: int = 0

    def rng(self, *key: int) -> np.random.Generator:
        """Randomness of one part."""
        return np.random.default_rng([self.seed, *key])


def synthetic_basis(shape: SyntheticShape) -> OutputBasis:
    """Random directions; a correction of standard normal numbers changes logits by standard normal ones."""
    matrix = shape.rng(1).standard_normal((shape.vocab_size, shape.basis_dim), np.float32)
    return OutputBasis.from_matrix(matrix / np.float32(shape.basis_dim**0.5))


def synthetic_tokenizer(shape: SyntheticShape) -> bytes:
    """A byte-level BPE tokenizer of the full size, with random merges."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    names = list(vocab)
    rng = shape.rng(2)
    merges = []
    while len(vocab) < shape.vocab_size:
        left, right = (names[i] for i in rng.integers(0, len(names), 2))
        if left + right not in vocab and len(left + right) <= 12:
            vocab[left + right] = len(vocab)
            names.append(left + right)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


def synthetic_side_network(shape: SyntheticShape) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Config and tensors of a tap ladder with random weights."""
    rng = shape.rng(3)
    side, inner, rungs = shape.side_width, shape.inner_width, shape.num_taps - 1

    def uniform(*size: int, fan_in: int) -> NDArray[np.float32]:
        return (rng.uniform(-1, 1, size) / fan_in**0.5).astype(np.float32)

    config = {
        "num_taps": shape.num_taps,
        "tap_dim": shape.tap_dim,
        "basis_dim": shape.basis_dim,
        "side_width": side,
        "inner_width": inner,
        "dropout": 0.0,
    }
    tensors = {
        "ladder.mix_weight": uniform(shape.num_taps, side, shape.tap_dim, fan_in=shape.tap_dim),
        "ladder.mix_bias": uniform(shape.num_taps, side, fan_in=shape.tap_dim),
        "ladder.up_weight": uniform(rungs, inner, side, fan_in=side),
        "ladder.up_bias": uniform(rungs, inner, fan_in=side),
        "ladder.down_weight": uniform(rungs, side, inner, fan_in=inner),
        "ladder.down_bias": uniform(rungs, side, fan_in=inner),
        "norm_weight": np.ones(side, np.float32),
        "head_weight": rng.standard_normal((shape.basis_dim, side), np.float32) / np.float32(side**0.5),
        "head_bias": np.zeros(shape.basis_dim, np.float32),
    }
    return config, tensors


def synthetic_plugin(shape: SyntheticShape, description: CloudDescription, tokenizer_json: bytes) -> Plugin:
    """A tap ladder with random weights, bound to the model of that description."""
    config, tensors = synthetic_side_network(shape)
    gate_weight = shape.rng(5).standard_normal(shape.hidden_size, np.float32)
    return Plugin(
        kind="tap_ladder",
        config=config,
        tensors=tensors,
        gate=GateParameters(weight=gate_weight, bias=0.0, threshold=0.0),
        backbone_digest=description.backbone_digest,
        projections_digest=description.projections_digest,
        tokenizer_digest=description.tokenizer_digest,
        tokenizer_json=tokenizer_json,
        output_basis=synthetic_basis(shape).to_bytes(),
    )


class SyntheticBackbone:
    """Fits `cotune.cloud.hosted.DescribedBackbone`: features are a pure function of the tokens read so far."""

    def __init__(self, shape: SyntheticShape) -> None:
        self.shape = shape
        self.output_basis = synthetic_basis(shape)
        self.tokenizer_json = synthetic_tokenizer(shape)
        name = json.dumps(vars(shape), sort_keys=True)
        self.description = CloudDescription(
            model="synthetic",
            backbone_digest=_digest(f"backbone {name}".encode()),
            tokenizer_digest=_digest(self.tokenizer_json),
            projections_digest=_digest(f"projections {name}".encode()),
            basis_digest=self.output_basis.digest,
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            num_taps=shape.num_taps,
            tap_dim=shape.tap_dim,
            basis_dim=shape.basis_dim,
            max_context=4096,
            stop_token_ids=(),
        )

    def cursor(self) -> SyntheticCursor:
        """An empty sequence."""
        return SyntheticCursor(self.shape)

    def features(self, input_ids: NDArray[np.int64], first_target: int, top_k: int) -> SequenceFeatures:
        """There is nothing to train on."""
        raise InputError("the synthetic model has no training features; host a real one")


class SyntheticCursor:
    """One sequence."""

    def __init__(self, shape: SyntheticShape) -> None:
        self._shape = shape
        self._tokens: list[int] = []

    @property
    def length(self) -> int:
        """How many tokens were read."""
        return len(self._tokens)

    def extend(self, token_ids: NDArray[np.int64], is_wanted: Callable[[], bool] | None = None) -> StepFeatures:
        """Read (seq,) tokens; never gives up."""
        started_s = time.perf_counter()
        self._tokens += token_ids.tolist()
        features = synthetic_features(self._shape, self._tokens)
        time.sleep(max(0.0, self._shape.step_ms / 1e3 - (time.perf_counter() - started_s)))
        return features

    def truncate(self, length: int) -> None:
        """Forget all tokens from index `length` on."""
        del self._tokens[length:]


def synthetic_features(shape: SyntheticShape, tokens: list[int]) -> StepFeatures:
    """A peaked distribution: 64 likely tokens whose probability falls with the square of their rank, and a tail."""
    rng = shape.rng(4, len(tokens), *tokens[-4:])
    logits = rng.standard_normal(shape.vocab_size, np.float32) - np.float32(6)
    likely = rng.integers(0, shape.vocab_size, NUM_LIKELY)
    logits[likely] = 8 - 2 * np.log(np.arange(1, NUM_LIKELY + 1)) + rng.normal(0, 0.5, NUM_LIKELY)
    return StepFeatures(
        logits=logits,
        hidden=rng.standard_normal(shape.hidden_size, np.float32),
        taps=rng.standard_normal((shape.num_taps, shape.tap_dim), np.float32),
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
