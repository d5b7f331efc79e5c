"""What one model learns from another over aligned chunks, whatever their tokenizers.

The loss of our reconstruction of Co-PLMs (arXiv 2511.11678, whose method could not be read):

    L = (1 - a) CE + a sum_k g_k (l_b T^2 L_byte(k) + l_t T^2 L_tok(k) + l_c L_chunk(k)) / sum_k 1

over the usable chunks k of a batch. L_byte and L_tok are taken where chunk k begins and are zero for chunks that have
no start of their own; g_k is the gate. T^2 keeps the size of the gradients, as in arXiv 1503.02531, section 2, and in
the loss for one tokenizer.

The teacher's half is read once and can be kept: 257 numbers at each chunk for L_byte, one for L_chunk, k + 1 and k
token places for L_tok. Then the teacher is no longer needed, so that a device never holds two models while it trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from cotune.distillation.chunk_gate import ChunkGate
from cotune.distillation.chunk_index import ChunkIndex
from cotune.distillation.chunk_likelihood import chunk_divergence, chunk_log_likelihoods
from cotune.distillation.common_tokens import CommonTokens, TopCommon
from cotune.distillation.divergences import check_temperature
from cotune.distillation.merged_bytes import MergedBytes
from cotune.distillation.next_byte import next_byte_divergence, next_byte_log_probs, shared_events
from cotune.distillation.token_bytes import TokenBytes
from cotune.distillation.top_log_probs import check_top_k
from cotune.errors import InputError


@dataclass(frozen=True, kw_only=True)
class MutualLossConfig:
    """The terms and their weights."""

    mix: float = 0.5
    """a, the share of the other model against the text itself, 0 to 1."""
    byte_weight: float = 1.0
    """l_b."""
    chunk_weight: float = 0.5
    """l_c."""
    token_weight: float = 0.0
    """l_t."""
    temperature: float = 2.0
    """T of next bytes and tokens."""
    tau: float = 2.0
    """Of chunk likelihoods."""
    top_k: int = 64
    """Common tokens of L_tok at each chunk."""
    drops_merged: bool = False
    """Leave the bytes out of L_byte that one of the two tokenizers would have merged into the token before."""
    gate: ChunkGate | None = field(default_factory=ChunkGate)
    """None counts every chunk fully."""

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise InputError(f"mix is {self.mix}, expected 0 to 1")
        for name in ("byte_weight", "chunk_weight", "token_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}, expected a number of at least 0")
        check_temperature(self.temperature)
        if not 0 < self.tau < float("inf"):
            raise InputError(f"tau is {self.tau}, expected a positive number")
        check_top_k(self.top_k)


@dataclass(frozen=True, eq=False)
class ChunkReadings:
    """What a model says of the chunks of a batch: all that another one has to know of it. Without a gradient.

    Attributes:
        log_likelihoods: float (chunks,), l of each chunk, nats.
        next_bytes: float (starts, 257), log P at the chunks that have a start of their own; None where it was not read.
        top_common: at the same chunks; None where it was not read.
        merged: bool (starts, 257), X of the token before them; None where it was not read.
    """

    log_likelihoods: Tensor
    next_bytes: Tensor | None = None
    top_common: TopCommon | None = None
    merged: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[ChunkReadings]) -> ChunkReadings:
        """Of a batch, from those of its texts, at least one, which were read for the same terms."""
        common = [one.top_common for one in parts if one.top_common is not None]
        return cls(
            log_likelihoods=torch.cat([one.log_likelihoods for one in parts]),
            next_bytes=_joined([one.next_bytes for one in parts]),
            top_common=TopCommon(
                torch.cat([one.places for one in common]), torch.cat([one.log_probs for one in common])
            )
            if common
            else None,
            merged=_joined([one.merged for one in parts]),
        )

    def of_texts(self, num_chunks: Sequence[int], num_starts: Sequence[int]) -> list[ChunkReadings]:
        """Of each text of a batch, the opposite of `joined`.

        Args:
            num_chunks: of each text.
            num_starts: of each text, the chunks that have a start of their own.

        Example:
            >>> both = ChunkReadings(log_likelihoods=torch.tensor([-1.0, -2.0, -3.0]))
            >>> [one.log_likelihoods.tolist() for one in both.of_texts([1, 2], [1, 1])]
            [[-1.0], [-2.0, -3.0]]
        """
        common = self.top_common
        return [
            ChunkReadings(
                log_likelihoods=self.log_likelihoods[chunks],
                next_bytes=None if self.next_bytes is None else self.next_bytes[starts],
                top_common=None if common is None else TopCommon(common.places[starts], common.log_probs[starts]),
                merged=None if self.merged is None else self.merged[starts],
            )
            for chunks, starts in zip(_one_after_another(num_chunks), _one_after_another(num_starts), strict=True)
        ]


@dataclass(frozen=True, eq=False)
class MutualTerms:
    """The loss of a batch and what it is made of.

    Attributes:
        loss: float (), nats, sum_k g_k (..) / sum_k 1, with its gradient; CE and a are not in it.
        gates, chunk: float (chunks,), g_k and L_chunk, constants.
        byte, token: float (starts,), L_byte and L_tok without T^2, constants; None where their weight is 0.
    """

    loss: Tensor
    gates: Tensor
    chunk: Tensor | None
    byte: Tensor | None
    token: Tensor | None


class MutualLoss:
    """The loss of one direction, from a teacher to a student; make another one for the way back.

    Args:
        config: which terms.
        teacher, student: the tables of their tokenizers, as long as their models' vocabularies.

    Raises:
        InputError: the vocabularies have nothing in common that a term needs.

    Example:
        >>> loss = MutualLoss(MutualLossConfig(), teacher_table, student_table)  # doctest: +SKIP
        >>> readings = loss.read(teacher_logits, ChunkIndex.of_batch(alignments, 0))  # doctest: +SKIP
        >>> terms = loss(readings, student_logits, ChunkIndex.of_batch(alignments, 1))  # doctest: +SKIP
        >>> loss.mixed(cross_entropy, terms.loss).backward()  # doctest: +SKIP
    """

    def __init__(self, config: MutualLossConfig, teacher: TokenBytes, student: TokenBytes) -> None:
        self.config = config
        self._teacher, self._student = teacher, student
        self._events = shared_events(teacher, student) if config.byte_weight > 0 else None
        drops = config.drops_merged and self._events is not None
        self._merged = (MergedBytes(teacher), MergedBytes(student)) if drops else None
        self._common = CommonTokens.of_tables(teacher, student) if config.token_weight > 0 else None

    @torch.no_grad()
    def read(self, logits: Tensor, index: ChunkIndex) -> ChunkReadings:
        """The teacher's half.

        Args:
            logits: float (batch, seq, teacher's vocab).
            index: the teacher's side.
        """
        starts = _starts(logits, index)
        return ChunkReadings(
            log_likelihoods=chunk_log_likelihoods(logits, index),
            next_bytes=None if self._events is None else next_byte_log_probs(starts, self._teacher),
            top_common=None
            if self._common is None
            else TopCommon.of_logits(
                starts,
                self._common,
                top_k=self.config.top_k,
                student_vocab=len(self._student),
            ),
            merged=None if self._merged is None else self._merged[0](index.last_ids[index.has_own_start]),
        )

    def __call__(self, teacher: ChunkReadings, logits: Tensor, index: ChunkIndex) -> MutualTerms:
        """The student's half, and the loss.

        Args:
            teacher: of the same chunks.
            logits: float (batch, seq, student's vocab).
            index: the student's side.

        Raises:
            InputError: the teacher's readings are of other chunks, or lack what a term needs.
        """
        config, own = self.config, chunk_log_likelihoods(logits, index)
        self._check(teacher, index)
        told = teacher.log_likelihoods.to(own)
        gates = torch.ones_like(own) if config.gate is None else config.gate(told, own, index.num_bytes)
        gates = gates.detach()
        starts, start_gates = _starts(logits, index), gates[index.has_own_start]
        total, heat = own.sum() * 0.0, config.temperature
        chunk = byte = token = None
        if config.chunk_weight > 0:
            chunk = chunk_divergence(told, own, tau=config.tau)
            total = total + config.chunk_weight * (gates * chunk).sum()
        if self._events is not None and teacher.next_bytes is not None:
            expected = next_byte_log_probs(starts, self._student)
            merged = None
            if self._merged is not None and teacher.merged is not None:
                merged = teacher.merged.to(own.device) | self._merged[1](index.last_ids[index.has_own_start])
            byte = next_byte_divergence(
                teacher.next_bytes.to(expected), expected, self._events, merged=merged, temperature=heat
            )
            total = total + config.byte_weight * heat**2 * (start_gates * byte).sum()
        if self._common is not None and teacher.top_common is not None:
            token = teacher.top_common.divergence(starts, self._common, temperature=heat)
            total = total + config.token_weight * heat**2 * (start_gates * token).sum()
        terms = (None if term is None else term.detach() for term in (chunk, byte, token))
        return MutualTerms(total / max(len(index), 1), gates, *terms)

    def mixed(self, cross_entropy: Tensor, distillation: Tensor) -> Tensor:
        """L = (1 - a) CE + a times the rest."""
        return (1 - self.config.mix) * cross_entropy + self.config.mix * distillation

    def _check(self, teacher: ChunkReadings, index: ChunkIndex) -> None:
        num_starts = int(index.has_own_start.sum())
        if len(teacher.log_likelihoods) != len(index):
            raise InputError(
                f"the teacher read {len(teacher.log_likelihoods)} chunks, expected {len(index)}; "
                "give both sides of the same alignments"
            )
        for name, term, reading in (
            ("byte_weight", self._events, teacher.next_bytes),
            ("drops_merged", self._merged, teacher.merged),
            ("token_weight", self._common, None if teacher.top_common is None else teacher.top_common.log_probs),
        ):
            if term is not None and (reading is None or len(reading) != num_starts):
                came = "nothing" if reading is None else f"{len(reading)} positions"
                raise InputError(
                    f"{name} is set and the teacher told {came} for it, expected {num_starts} positions; "
                    "read the teacher with the same config, or set it to 0"
                )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [one for one in parts if one is not None]
    return torch.cat(found) if found else None


def _one_after_another(sizes: Sequence[int]) -> list[slice]:
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _starts(logits: Tensor, index: ChunkIndex) -> Tensor:
    """The logits where chunks begin that have a start of their own, (starts, vocab)."""
    return logits[index.rows[index.has_own_start], index.positions[index.has_own_start]]
