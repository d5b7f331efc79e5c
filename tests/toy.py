"""A toy backbone and side network in NumPy: exact, fast, and as unpredictable as a hash of the history."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.cloud.hosted import HostedModel
from cotune.generation.gate import Gate, GateLayer
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import Correction, RowWork, StepFeatures
from cotune.generation.reference import Personal
from cotune.generation.side_state import StatelessCorrector
from cotune.wire.codec import dequantise, quantise
from cotune.wire.description import CloudDescription
from cotune.wire.features import SequenceFeatures

VOCAB, HIDDEN, TAPS, TAP_DIM, BASIS = 97, 12, 3, 4, 6
STOP = 2


def _features(tokens: tuple[int, ...]) -> StepFeatures:
    seed = hashlib.sha256(repr(tokens).encode()).digest()
    rng = np.random.default_rng(np.frombuffer(seed, np.uint32))
    return StepFeatures(
        logits=(3 * rng.standard_normal(VOCAB)).astype(np.float32),
        hidden=rng.standard_normal(HIDDEN).astype(np.float32),
        taps=rng.standard_normal((TAPS, TAP_DIM)).astype(np.float32),
    )


class ToyCursor:
    def __init__(self) -> None:
        self._tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: NDArray[np.int64], is_wanted: Callable[[], bool] | None = None) -> StepFeatures:
        assert len(token_ids) > 0
        self._tokens += token_ids.tolist()
        return _features(tuple(self._tokens))

    def truncate(self, length: int) -> None:
        assert 0 <= length <= len(self._tokens)
        del self._tokens[length:]

    def fork(self) -> ToyCursor:
        twin = ToyCursor()
        twin._tokens = list(self._tokens)
        return twin

    def close(self) -> None:
        self._tokens.clear()


class ToyBackbone:
    prompt_chunk = 5
    block_size = 4
    rows_are_independent = True

    def cursor(self, num_prompt: int | None = None) -> ToyCursor:
        return ToyCursor()

    def extend(self, work: Sequence[RowWork], is_wanted: Callable[[], bool] | None = None) -> list[list[StepFeatures]]:
        outputs = []
        for item in work:
            steps = [item.cursor.extend(item.token_ids[i : i + 1]) for i in range(len(item.token_ids))]
            outputs.append(steps[len(steps) - item.num_outputs :])
        return outputs

    def features(self, input_ids: NDArray[np.int64], first_target: int, top_k: int) -> SequenceFeatures:
        steps = [_features(tuple(input_ids[:t].tolist())) for t in range(first_target, len(input_ids))]
        logits = np.stack([step.logits for step in steps])
        codes, scales = quantise(np.stack([step.taps for step in steps]))
        targets = input_ids[first_target:]
        top = np.sort(np.argsort(-logits, axis=1)[:, :top_k], axis=1)
        return SequenceFeatures(
            target_ids=targets,
            tap_codes=codes,
            tap_scales=scales,
            log_normalizer=np.log(np.exp(logits).sum(axis=1)).astype(np.float32),
            target_logits=np.take_along_axis(logits, targets[:, None], axis=1)[:, 0],
            top_ids=top,
            top_logits=np.take_along_axis(logits, top, axis=1),
            hidden=np.stack([step.hidden for step in steps]).astype(np.float16),
        )


@dataclass
class ToyCorrector(StatelessCorrector):
    """A random linear map from taps to a correction."""

    strength: float = 1.0
    seed: int = 0

    def correct(self, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> Correction:
        weight = np.random.default_rng(self.seed).standard_normal((BASIS, TAPS * TAP_DIM)).astype(np.float32)
        taps = dequantise(tap_codes, tap_scales).ravel()
        with np.errstate(invalid="ignore"):  # as in `cotune.device.side_network`
            codes, scale = quantise(np.float32(self.strength) * (weight @ taps))
        return Correction(codes=codes, scale=np.float16(scale))


class ToyMemory:
    """Remembers every position, and refuses to be left one out: its correction depends on all that it has read."""

    reads_every_position = True

    def __init__(self, corrector: ToyCorrector, prompt_window: int = 3) -> None:
        self.corrector, self.prompt_window = corrector, prompt_window

    def open(self) -> ToyMemoryState:
        return ToyMemoryState(self.corrector)


class ToyMemoryState:
    def __init__(self, corrector: ToyCorrector) -> None:
        self._corrector = corrector
        self.read_positions: list[tuple[int, NDArray[np.float32]]] = []

    @property
    def next_position(self) -> int | None:
        return self.read_positions[-1][0] + 1 if self.read_positions else None

    def read(self, position: int, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> None:
        assert self.next_position is None or position <= self.next_position
        self.read_positions = [one for one in self.read_positions if one[0] < position]
        self.read_positions.append((position, dequantise(tap_codes, tap_scales)))

    def correct(self, position: int, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> Correction:
        self.read(position, tap_codes, tap_scales)
        mixed = sum((taps * np.float32(1 + read % 7) for read, taps in self.read_positions), np.zeros(1, np.float32))
        return self._corrector.correct(*quantise(mixed / np.float32(4 * len(self.read_positions) ** 0.5)))


def toy_basis(seed: int = 1) -> OutputBasis:
    rng = np.random.default_rng(seed)
    return OutputBasis.from_matrix(rng.standard_normal((VOCAB, BASIS)).astype(np.float32))


def layered_gate(threshold: float = 0.0) -> Gate:
    """One with a hidden layer."""
    rng = np.random.default_rng(5)
    layer = GateLayer(
        weight=rng.standard_normal((4, HIDDEN)).astype(np.float16), bias=rng.standard_normal(4).astype(np.float32)
    )
    return Gate(weight=rng.standard_normal(4).astype(np.float32), threshold=threshold, layer=layer)


def toy_gate(threshold: float = 0.0) -> Gate:
    weight = np.random.default_rng(2).standard_normal(HIDDEN).astype(np.float32)
    return Gate(weight=weight, bias=0.1, threshold=threshold)


def toy_personal(strength: float = 1.0, seed: int = 0, *, remembers: bool = False) -> Personal:
    corrector = ToyCorrector(strength, seed)
    return Personal(
        corrector=ToyMemory(corrector) if remembers else corrector, output_basis=toy_basis(), gate=toy_gate()
    )


def toy_model(max_context: int = 512) -> HostedModel:
    basis = toy_basis()
    return HostedModel(
        backbone=ToyBackbone(),
        description=CloudDescription(
            model="toy",
            backbone_digest="b" * 64,
            tokenizer_digest="t" * 64,
            projections_digest="p" * 64,
            basis_digest=basis.digest,
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_taps=TAPS,
            tap_dim=TAP_DIM,
            basis_dim=BASIS,
            max_context=max_context,
            stop_token_ids=(STOP,),
        ),
        output_basis=basis,
        tokenizer_json=b"{}",
    )
