"""TRL's GOLD and ULD beside the terms here, in an environment that has TRL.

TRL is no dependency and no part of CI: its losses stand in `trl.experimental`, whose interfaces may change. It ran with
TRL 1.16; make an environment with `pip install trl` and this package, and run this file there. `observed` reads the
logits of the answer's own positions, as ULD's paper does with its unaligned ones.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from byte_oracle import ByteOracle, longest_match
from tokenizer_kinds import spans_of
from torch import Tensor

from cotune.distillation.alignment import align
from cotune.distillation.byte_spans import ByteSpans
from cotune.distillation.chunk_index import ChunkIndex
from cotune.distillation.divergences import Divergence, ForwardKl, JensenShannon, ReverseKl, divergence_of_logits
from cotune.distillation.mutual_loss import MutualLoss, MutualLossConfig

pytest.importorskip("trl", reason="TRL is not installed; pip install trl in an environment of its own")
gold = pytest.importorskip(
    "trl.experimental.gold.gold_trainer", reason="this TRL has no GOLD trainer, or not what it needs"
)
pytestmark = pytest.mark.filterwarnings("default")


def draw(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def offsets(spans: ByteSpans) -> list[tuple[int, int]]:
    """GOLD's form: start and end of each token, in bytes of the completion."""
    starts = [spans.start, *spans.ends.tolist()]
    return list(zip(starts, spans.ends.tolist(), strict=False))


def uld(*, is_extended: bool) -> Any:
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=is_extended,
        uld_token_merge_strategy="observed",
        uld_use_hybrid_loss=False,
        uld_hybrid_matched_weight=None,
        uld_hybrid_unmatched_weight=None,
        beta=0.5,
    )
    return gold.ULDLoss(config)


def uld_loss(teacher: Tensor, student: Tensor, ids: tuple[Tensor, Tensor], spans: Any = None) -> float:
    """Their loss over whole texts; teacher first, as here."""
    places = [None, None] if spans is None else [torch.tensor([offsets(one)]) for one in spans]
    result: Tensor = uld(is_extended=spans is not None)(
        student_logits=student,
        teacher_logits=teacher,
        student_labels=ids[1],
        teacher_labels=ids[0],
        student_input_ids=ids[1],
        teacher_input_ids=ids[0],
        student_byte_offsets=places[1],
        teacher_byte_offsets=places[0],
    )
    return result.item()


@pytest.mark.parametrize(
    ("beta", "divergence"), [(0.0, ForwardKl()), (0.3, JensenShannon(0.3)), (1.0, ReverseKl())], ids=repr
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_golds_divergence_is_ours(beta: float, divergence: Divergence, temperature: float) -> None:
    teacher, student = draw(2, 5, 11, seed=1), draw(2, 5, 11, seed=2)
    labels = torch.zeros(2, 5, dtype=torch.int64)
    labels[0, :2] = -100
    theirs = gold.GOLDTrainer.generalized_jsd_loss(student, teacher, labels=labels, beta=beta, temperature=temperature)
    ours = divergence_of_logits(divergence, teacher, student, wanted=labels != -100, temperature=temperature).mean()
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("text", ["the cat sat on the mat", "日本 and the dog 😀", "naïve"])
def test_golds_groups_are_our_chunks(text: str) -> None:
    """Where both tokenizers write the whole text, and neither puts a space in front of it."""
    if not hasattr(gold.ULDLoss, "_align_by_byte_offsets"):
        pytest.skip("this TRL aligns by decoded text, not by bytes")
    one, other = spans_of("byte_level", text), spans_of("unigram", text)
    pair = align(one, other)
    theirs = gold.ULDLoss._align_by_byte_offsets(offsets(one), offsets(other))
    for side, spans, groups in zip(pair.sides, (one, other), theirs, strict=True):
        # Their positions count spans, ours tokens of the whole text.
        place = {token: index for index, token in enumerate(spans.first_tokens.tolist())}
        sizes = [end - first for first, end in zip(side.first_tokens, side.end_tokens, strict=True)]
        assert [group[0] for group in groups] == [place[token] for token in side.first_tokens.tolist()]
        assert [len(group) for group in groups] == sizes


def test_uld_is_the_distance_of_sorted_probabilities() -> None:
    """Position by position up to the shorter side, as the paper has it (arXiv 2402.12030): no alignment."""
    teacher, student = draw(1, 6, 9, seed=1), draw(1, 4, 7, seed=2)
    ids = (torch.arange(6)[None] % 9, torch.arange(4)[None] % 7)
    p, q = (np.sort(side[0, :4].softmax(-1).numpy(), axis=1)[:, ::-1] for side in (teacher, student))
    expected = np.abs(p - np.pad(q, ((0, 0), (0, 2)))).sum() / 4
    assert uld_loss(teacher, student, ids) == pytest.approx(float(expected), rel=1e-4)
    assert uld_loss(teacher, teacher, (ids[0], ids[0])) == pytest.approx(0.0, abs=1e-6)


def test_over_one_language_of_bytes_ours_is_zero_and_uld_is_not() -> None:
    oracle, text = ByteOracle.of_abc(), "caabacbbc"
    sides = [longest_match("aa", "ab", "ac", "b", "c"), longest_match("a", "ba", "bb", "bc", "c")]
    spans = [ByteSpans.of_text(tokenizer, text, table, end_id=1) for tokenizer, table in sides]
    logits = [oracle.logits(one, table, text) for one, (_, table) in zip(spans, sides, strict=True)]
    pair = align(*spans)
    loss = MutualLoss(MutualLossConfig(), sides[0][1], sides[1][1])
    readings = loss.read(logits[0], ChunkIndex.of_batch([pair], 0))
    assert loss(readings, logits[1], ChunkIndex.of_batch([pair], 1)).loss.item() == pytest.approx(0.0, abs=1e-12)
    ids = tuple(torch.from_numpy(one.input_ids)[None] for one in spans)
    assert uld_loss(logits[0].float(), logits[1].float(), (ids[0], ids[1])) > 0.1
