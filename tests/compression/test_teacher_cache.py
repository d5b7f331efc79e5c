from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, probe_ids, tiny_backbone

from cotune.compression.teacher_cache import SUFFIX, CachedTeacher
from cotune.data.batches import EncodedExample
from cotune.distillation.teacher import LocalTeacher
from cotune.distillation.top_log_probs import TopLogProbs
from cotune.errors import InputError
from cotune.file_cache import sealed
from cotune.models.backbone import Backbone


class CountingTeacher(LocalTeacher):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.asked: list[list[int]] = []

    def top_log_probs(self, examples: Sequence[EncodedExample], top_k: int) -> TopLogProbs:
        self.asked += [example.input_ids.tolist() for example in examples]
        return super().top_log_probs(examples, top_k)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("llama")


@pytest.fixture(scope="module")
def texts(backbone: Backbone) -> list[EncodedExample]:
    ids = probe_ids(backbone)
    return [EncodedExample(ids[start : start + 8], 1 + start % 3) for start in range(0, 24, 4)]


@pytest.mark.parametrize("top_k", [5, VOCAB])
def test_nothing_is_asked_twice_and_numbers_stay(
    tmp_path: Path, backbone: Backbone, texts: list[EncodedExample], top_k: int
) -> None:
    teacher = CountingTeacher(backbone)
    cached = CachedTeacher(teacher, tmp_path)
    first = cached.top_log_probs(texts, top_k)
    again = cached.top_log_probs(texts[::-1], top_k)
    assert len(teacher.asked) == len(texts) == cached.num_asked
    plain = TopLogProbs.joined([LocalTeacher(backbone).top_log_probs([text], top_k) for text in texts])
    assert torch.equal(first.ids, plain.ids) and torch.equal(first.log_probs, plain.log_probs)
    assert torch.equal(again.log_probs[:5], first.log_probs[-5:])  # the last text has five targets

    resumed = CachedTeacher(CountingTeacher(backbone), tmp_path)
    assert torch.equal(resumed.top_log_probs(texts, top_k).log_probs, first.log_probs)
    assert resumed.num_asked == 0 and resumed.description is backbone.spec


def test_each_text_k_and_teacher_has_a_file_of_its_own(
    tmp_path: Path, backbone: Backbone, texts: list[EncodedExample]
) -> None:
    ids = texts[0].input_ids
    for teacher in (backbone, tiny_backbone("llama", seed=1)):
        cached = CachedTeacher(LocalTeacher(teacher), tmp_path)
        for example in (EncodedExample(ids, 1), EncodedExample(ids, 2), EncodedExample(ids[:-1], 1)):
            for top_k in (4, 5, VOCAB, VOCAB + 1):
                cached.top_log_probs([example], top_k)
        assert cached.num_asked == 9  # more than all are all
    assert len(list(tmp_path.iterdir())) == 18


@pytest.mark.parametrize("other", [sealed(b"nonsense"), b"", b"short"], ids=["other contents", "empty", "cut"])
def test_a_damaged_answer_is_asked_for_again(
    tmp_path: Path, backbone: Backbone, texts: list[EncodedExample], other: bytes
) -> None:
    first = CachedTeacher(LocalTeacher(backbone), tmp_path).top_log_probs(texts[:1], 4)
    (path,) = tmp_path.glob("*" + SUFFIX)
    good = path.read_bytes()
    path.write_bytes(other)
    cached = CachedTeacher(LocalTeacher(backbone), tmp_path)
    assert torch.equal(cached.top_log_probs(texts[:1], 4).log_probs, first.log_probs)
    assert cached.num_asked == 1 and path.read_bytes() == good


def test_an_answer_of_another_shape_is_asked_for_again(
    tmp_path: Path, backbone: Backbone, texts: list[EncodedExample]
) -> None:
    cached = CachedTeacher(LocalTeacher(backbone), tmp_path)
    cached.top_log_probs(texts[:1], 4)
    (path,) = tmp_path.glob("*" + SUFFIX)
    cached.top_log_probs([EncodedExample(texts[0].input_ids, 2)], 4)
    (other,) = set(tmp_path.glob("*" + SUFFIX)) - {path}
    path.write_bytes(other.read_bytes())
    assert len(cached.top_log_probs(texts[:1], 4)) == 7 and cached.num_asked == 3


def test_given_texts_stay_where_own_texts_have_to_go(
    tmp_path: Path, backbone: Backbone, texts: list[EncodedExample]
) -> None:
    size = CachedTeacher(LocalTeacher(backbone), tmp_path / "probe")
    size.top_log_probs(texts[:1], 4)
    (path,) = (tmp_path / "probe").glob("*" + SUFFIX)
    room = 3 * path.stat().st_size

    bounded = CachedTeacher(LocalTeacher(backbone), tmp_path / "bounded", max_bytes=max(room, 2 * (512 + 7 * 32)))
    bounded.reserve(texts[:2], 4)
    for text in [*texts, *texts[2:]]:
        bounded.top_log_probs([text], 4)
    before = bounded.num_asked
    bounded.top_log_probs(texts[:2], 4)
    assert bounded.num_asked == before > len(texts)
    with pytest.raises(InputError, match=r"the teacher cache .* raise max_bytes"):
        bounded.reserve(texts, 300)


def test_a_teacher_that_has_nothing_to_say_is_refused(tmp_path: Path, backbone: Backbone) -> None:
    cached = CachedTeacher(LocalTeacher(backbone), tmp_path)
    with pytest.raises(InputError, match="top_k is 0"):
        cached.top_log_probs([EncodedExample(np.arange(4), 1)], 0)
