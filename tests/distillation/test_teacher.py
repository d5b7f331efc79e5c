from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, probe_ids, tiny_backbone

from cotune.data.batches import EncodedExample
from cotune.distillation.teacher import CloudTeacher, LocalTeacher, check_same_tokenizer
from cotune.errors import InputError, MismatchError
from cotune.models.backbone import Backbone


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return tiny_backbone(request.param)


@pytest.fixture(scope="module")
def texts(backbone: Backbone) -> list[EncodedExample]:
    ids = probe_ids(backbone)
    return [EncodedExample(ids[:9], 4), EncodedExample(ids[5:8], 1), EncodedExample(ids[10:30], 19)]


def exact(backbone: Backbone, texts: list[EncodedExample]) -> torch.Tensor:
    """Log-probabilities of the plain model, one text at a time, float64."""
    rows = []
    for text in texts:
        with torch.no_grad():
            logits = backbone.model(torch.from_numpy(text.input_ids[None])).logits[0]
        rows.append(logits[text.first_target - 1 : -1].double().log_softmax(1))
    return torch.cat(rows)


def test_a_backbone_says_what_its_model_says(backbone: Backbone, texts: list[EncodedExample]) -> None:
    expected = exact(backbone, texts)
    teacher = LocalTeacher(backbone)
    whole = teacher.top_log_probs(texts, VOCAB)
    torch.testing.assert_close(whole.log_probs.double(), expected, atol=1e-4, rtol=0)
    top = teacher.top_log_probs(texts, 7)
    assert top.ids.shape == (5 + 2 + 1, 7)
    assert torch.equal(top.log_probs, whole.log_probs.gather(1, top.ids))
    assert torch.equal(top.ids, expected.topk(7).indices.sort(dim=1).values)
    assert teacher.description is backbone.spec
    # Others may compute with it, gradients and all.
    assert not top.log_probs.requires_grad and not whole.log_probs.is_inference()


def test_a_source_of_features_says_the_same(backbone: Backbone, texts: list[EncodedExample]) -> None:
    """Per text, as a cloud computes it: log softmax against logits minus log normaliser, both float32."""
    for top_k in (7, VOCAB + 1):
        cloud = CloudTeacher(backbone).top_log_probs(texts, top_k)
        for text in texts:
            (alone, local) = (t.top_log_probs([text], top_k) for t in (CloudTeacher(backbone), LocalTeacher(backbone)))
            assert torch.equal(alone.ids, local.ids)
            torch.testing.assert_close(alone.log_probs, local.log_probs, atol=2e-6, rtol=2e-7)
        assert cloud.log_probs.dtype == torch.float32 and len(cloud) == 8
        together = LocalTeacher(backbone).top_log_probs(texts, top_k)
        torch.testing.assert_close(cloud.log_probs, together.log_probs, atol=1e-4, rtol=0)


@dataclass
class Answers:
    """A source whose answers are changed on the way."""

    backbone: Backbone
    changes: dict[str, Any]

    @property
    def description(self) -> Any:
        return self.backbone.spec

    def features(self, input_ids: np.ndarray, first_target: int, top_k: int) -> Any:
        features = self.backbone.features(input_ids, first_target, top_k)
        return replace(features, **{name: change(getattr(features, name)) for name, change in self.changes.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_ids": lambda ids: ids + VOCAB}, "ascending numbers from 0 to 399"),
        ({"top_logits": lambda logits: logits + 20}, "expected at most 1"),
        ({"log_normalizer": lambda z: z * np.nan}, "expected at most 1"),
        ({"top_ids": lambda ids: ids[:-1]}, r"expected \(5, 3\)"),
    ],
    ids=["ids", "sum", "nan", "shape"],
)
def test_answers_that_are_no_distribution_are_refused(
    backbone: Backbone, texts: list[EncodedExample], changes: dict[str, Any], message: str
) -> None:
    assert len(CloudTeacher(Answers(backbone, {})).top_log_probs(texts[:1], 3)) == 5
    with pytest.raises(InputError, match=message):
        CloudTeacher(Answers(backbone, changes)).top_log_probs(texts[:1], 3)


def test_bad_requests_are_refused(backbone: Backbone, texts: list[EncodedExample]) -> None:
    for teacher in (LocalTeacher(backbone), CloudTeacher(backbone)):
        with pytest.raises(InputError, match="top_k is 0"):
            teacher.top_log_probs(texts, 0)
    with pytest.raises(InputError, match="no sequences to predict"):
        LocalTeacher(backbone).top_log_probs([], 3)


def test_other_tokenizers_are_one_clear_error(backbone: Backbone) -> None:
    spec = backbone.spec
    check_same_tokenizer(spec, replace(spec, backbone_digest="other", max_context=7))
    for other in (replace(spec, tokenizer_digest="0" * 64), replace(spec, vocab_size=VOCAB + 64)):
        with pytest.raises(MismatchError, match=r"the student has tokenizer .* take a student with the teacher's"):
            check_same_tokenizer(spec, other)
