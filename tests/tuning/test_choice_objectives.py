from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import functional_call

from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.tuning.choice_objectives import ChoiceBatch, ChoiceErrors, ChoiceExample, ChoiceNats, choice_scores


def example(prompt: list[int], *choices: list[int], label: int = 0) -> ChoiceExample:
    return ChoiceExample(
        prompt_ids=np.array(prompt, np.int64), choices=tuple(np.array(c, np.int64) for c in choices), label=label
    )


QUESTIONS = [
    example([1, 5, 9], [7], [8, 2], [8, 4, 6], label=2),
    example([1, 11], [7], [3], label=1),
    example([1, 5, 9, 4, 4], [20], [21], [22], label=0),
]


def scores_by_hand(backbone: Backbone) -> list[list[float]]:
    """One text at a time, token by token."""
    scores = []
    for question in QUESTIONS:
        scores.append([])
        for choice in question.choices:
            ids = torch.tensor([*question.prompt_ids, *choice])
            with torch.no_grad():
                nats = backbone.model(ids[None]).logits[0].log_softmax(-1)
            first = len(question.prompt_ids)
            scores[-1].append(sum(float(nats[first + k - 1, token]) for k, token in enumerate(choice)))
    return scores


def test_scores_are_those_of_each_text_alone(backbone: Backbone) -> None:
    batch = ChoiceBatch.of(QUESTIONS, pad_token_id=0)
    assert len(batch.input_ids) == 5, "choices of one token share the prompt's row, and [8, 2] and [8, 4, 6] do not"
    params = dict(backbone.model.named_parameters())
    with torch.no_grad():
        scores = choice_scores(backbone.model, params, batch)
        by_length = choice_scores(backbone.model, params, batch, by_length=True)
    expected = scores_by_hand(backbone)
    assert scores[0].tolist() == pytest.approx(expected[0], abs=1e-4)
    assert scores[1].tolist() == pytest.approx([*expected[1], -np.inf], abs=1e-4)
    assert scores[2].tolist() == pytest.approx(expected[2], abs=1e-4)
    assert by_length[0].tolist() == pytest.approx([expected[0][0], expected[0][1] / 2, expected[0][2] / 3], abs=1e-4)
    # The output embedding is as before.
    assert backbone.model(torch.tensor([[1, 2]])).logits.shape[:2] == (1, 2)


def test_cross_entropy_and_errors_by_hand(backbone: Backbone) -> None:
    batch, params = ChoiceBatch.of(QUESTIONS, pad_token_id=0), dict(backbone.model.named_parameters())
    with torch.no_grad():
        nats, errors = ChoiceNats()(backbone.model, params, batch), ChoiceErrors()(backbone.model, params, batch)
    expected = scores_by_hand(backbone)
    for i, question in enumerate(QUESTIONS):
        probabilities = np.exp(expected[i]) / np.exp(expected[i]).sum()
        assert float(nats.sums[i]) == pytest.approx(-np.log(probabilities[question.label]), abs=1e-4)
        assert float(errors.sums[i]) == float(probabilities.argmax() != question.label)
    assert nats.counts.tolist() == errors.counts.tolist() == [1, 1, 1]
    assert nats.mean == pytest.approx(float(nats.sums.mean()))


def test_the_right_label_is_no_error(backbone: Backbone) -> None:
    best = [int(np.argmax(scores)) for scores in scores_by_hand(backbone)]
    right = [
        example(q.prompt_ids.tolist(), *(c.tolist() for c in q.choices), label=b)
        for q, b in zip(QUESTIONS, best, strict=True)
    ]
    params = dict(backbone.model.named_parameters())
    with torch.no_grad():
        assert ChoiceErrors()(backbone.model, params, ChoiceBatch.of(right, 0)).mean == 0
        assert ChoiceErrors(by_length=True)(backbone.model, params, ChoiceBatch.of(right[2:], 0)).mean == 0


def test_nan_is_not_taken_for_an_answer(backbone: Backbone) -> None:
    params = {name: tensor * torch.nan for name, tensor in backbone.model.named_parameters()}
    with torch.no_grad():
        assert np.isnan(ChoiceErrors()(backbone.model, params, ChoiceBatch.of(QUESTIONS, 0)).mean)


def test_gradients_flow_through_the_cross_entropy(backbone: Backbone) -> None:
    """The same objective serves back-propagation."""
    params = {name: tensor.detach().requires_grad_() for name, tensor in backbone.model.named_parameters()}
    functional_call(backbone.model, params, (torch.tensor([[1]]),))
    losses = ChoiceNats()(backbone.model, params, ChoiceBatch.of(QUESTIONS, 0))
    (losses.sums.sum() / losses.counts.sum()).backward()
    assert any(tensor.grad is not None and bool(tensor.grad.any()) for tensor in params.values())


def test_bad_examples_are_refused() -> None:
    with pytest.raises(InputError, match="empty prompt or choice"):
        example([], [1])
    with pytest.raises(InputError, match="empty prompt or choice"):
        example([1], [])
    with pytest.raises(InputError, match="empty prompt or choice"):
        example([1])
    with pytest.raises(InputError, match="label is 2, expected 0 to 1"):
        example([1], [1], [2], label=2)
    with pytest.raises(InputError, match="no examples"):
        ChoiceBatch.of([], 0)
