"""Tiny problems with everything known: base logits of the whole vocabulary, and targets that follow from the taps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cotune.data.batches import EncodedExample
from cotune.generation.output_basis import OutputBasis
from cotune.models.backbone import Backbone
from cotune.tuning.feature_set import FeatureSet
from cotune.wire.codec import quantise
from cotune.wire.features import SequenceFeatures

VOCAB, TAPS, TAP_DIM, BASIS_DIM, HIDDEN = 40, 3, 8, 12, 6


@dataclass(frozen=True)
class World:
    """Positions whose target is a fixed function of the taps, and whose base model knows nothing of it."""

    logits: NDArray[np.float32]
    taps: NDArray[np.float32]
    hidden: NDArray[np.float16]
    target_ids: NDArray[np.int64]
    lengths: list[int]

    @classmethod
    def draw(cls, num_positions: int, seed: int, *, spread: float = 2.0) -> World:
        rng = np.random.default_rng(seed)
        taps = rng.standard_normal((num_positions, TAPS, TAP_DIM)).astype(np.float32)
        teacher = np.random.default_rng(99).standard_normal((TAPS * TAP_DIM, 5))
        target_ids = 3 * (taps.reshape(num_positions, -1) @ teacher).argmax(axis=1)
        half = num_positions // 2
        return cls(
            logits=(spread * rng.standard_normal((num_positions, VOCAB))).astype(np.float32),
            taps=taps,
            hidden=rng.standard_normal((num_positions, HIDDEN)).astype(np.float16),
            target_ids=target_ids.astype(np.int64),
            lengths=[half, num_positions - half],
        )

    def features(self, top_k: int) -> FeatureSet:
        """What a cloud would tell about these positions, in two sequences."""
        codes, scales = quantise(self.taps)
        top_ids = np.sort(np.argsort(-self.logits, axis=1)[:, :top_k], axis=1)
        rows = np.arange(len(self.logits))
        largest = self.logits.max(axis=1)
        whole = SequenceFeatures(
            target_ids=self.target_ids,
            tap_codes=codes,
            tap_scales=scales,
            log_normalizer=largest + np.log(np.exp(self.logits - largest[:, None]).sum(axis=1)),
            target_logits=self.logits[rows, self.target_ids],
            top_ids=top_ids,
            top_logits=np.take_along_axis(self.logits, top_ids, axis=1),
            hidden=self.hidden,
        )
        ends = np.cumsum(self.lengths)
        return FeatureSet.from_sequences(
            [
                SequenceFeatures(**{name: array[end - length : end] for name, array in vars(whole).items()})
                for end, length in zip(ends, self.lengths, strict=True)
            ]
        )


@pytest.fixture(scope="session")
def draw_world() -> Callable[..., World]:
    return World.draw


@pytest.fixture(scope="session")
def output_basis() -> OutputBasis:
    """Q (vocab, basis_dim), random."""
    matrix = np.random.default_rng(5).standard_normal((VOCAB, BASIS_DIM)) / 3
    return OutputBasis.from_matrix(matrix.astype(np.float32))


class CountingSource:
    """A source of features that follow from the token ids; counts what it is asked, and may fail."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.fail_after = fail_after

    def features(self, input_ids: NDArray[np.int64], first_target: int, top_k: int) -> SequenceFeatures:
        if self.fail_after is not None and len(self.asked) == self.fail_after:
            raise KeyboardInterrupt
        self.asked.append(input_ids.tolist())
        count = len(input_ids) - first_target
        rng = np.random.default_rng([*input_ids.tolist(), first_target, top_k])
        return SequenceFeatures(
            target_ids=input_ids[first_target:],
            tap_codes=rng.integers(-127, 128, (count, TAPS, TAP_DIM)).astype(np.int8),
            tap_scales=rng.random((count, TAPS)).astype(np.float16),
            log_normalizer=rng.random(count).astype(np.float32) + 5,
            target_logits=rng.random(count).astype(np.float32),
            top_ids=np.sort(rng.random((count, VOCAB)).argsort(axis=1)[:, :top_k], axis=1),
            top_logits=rng.random((count, top_k)).astype(np.float32),
            hidden=rng.random((count, HIDDEN)).astype(np.float16),
        )


@pytest.fixture
def make_source() -> Callable[..., CountingSource]:
    return CountingSource


@pytest.fixture(scope="session")
def examples() -> list[EncodedExample]:
    """Sequences of several lengths; the target counts upwards from the last prompt token."""
    rng = np.random.default_rng(0)
    made = []
    for length in (4, 6, 5, 7, 6, 5, 4, 8, 6):
        start = int(rng.integers(3, 30))
        prompt = [1, int(rng.integers(3, VOCAB)), start]
        made.append(EncodedExample(np.array([*prompt, *range(start + 1, start + length - 1), 2], np.int64), 3))
    return made


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """A tiny random model of two architectures that differ in everything that LoRA touches."""
    common = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **common))
        else:
            model = LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=16,
                    intermediate_size=24,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    max_position_embeddings=32,
                    pad_token_id=0,
                    **common,
                )
            )
        # The usual initial values are so small that a model is nearly the identity.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return Backbone.from_model(model, b"{}")
