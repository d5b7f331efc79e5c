from __future__ import annotations

import numpy as np
import pytest
import torch

from cotune.errors import InputError
from cotune.evaluation import rouge_l, token_f1
from cotune.models.backbone import Backbone
from cotune.tuning.text_objectives import TextBatch, TextErrors, greedy_texts

PROMPTS = tuple(np.array(ids, np.int64) for ids in ([1, 5, 9, 30], [1, 12], [1, 7, 7]))


def decode(ids: list[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def one_by_one(backbone: Backbone, prompt: np.ndarray, num: int) -> list[int]:
    """Greedy decoding without a cache and without padding."""
    ids = prompt.tolist()
    for _ in range(num):
        with torch.no_grad():
            ids.append(int(backbone.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_texts_are_those_of_each_prompt_alone(backbone: Backbone) -> None:
    params = dict(backbone.model.named_parameters())
    texts = greedy_texts(backbone.model, params, PROMPTS, max_new_tokens=6)
    expected = [one_by_one(backbone, prompt, 6) for prompt in PROMPTS]
    assert texts == expected
    stop = expected[0][2]
    cut = [text[: text.index(stop)] if stop in text else text for text in expected]
    assert greedy_texts(backbone.model, params, PROMPTS, max_new_tokens=6, stop_token_ids={stop}) == cut


def test_the_given_parameters_decide(backbone: Backbone) -> None:
    params = dict(backbone.model.named_parameters())
    other = {name: tensor.flip(0) for name, tensor in params.items()}
    texts = [greedy_texts(backbone.model, p, PROMPTS, max_new_tokens=5) for p in (params, other)]
    assert texts[0] != texts[1]


def test_errors_by_hand(backbone: Backbone) -> None:
    params = dict(backbone.model.named_parameters())
    words = [decode(one_by_one(backbone, prompt, 4)) for prompt in PROMPTS]
    references = ((words[0],), ("nothing of it",), (" ".join(words[2].split()[:2]), "other"))
    batch = TextBatch(prompts=PROMPTS, references=references)
    for metric in (rouge_l, token_f1):
        losses = TextErrors(metric=metric, decode=decode, max_new_tokens=4)(backbone.model, params, batch)
        assert losses.sums.tolist() == pytest.approx([0.0, 1.0, 1 - max(metric(words[2], r) for r in references[2])])
        assert 0 < float(losses.sums[2]) < 1 and losses.counts.tolist() == [1, 1, 1]


def test_bad_batches_and_settings_are_refused() -> None:
    with pytest.raises(InputError, match="3 prompts met 1 references"):
        TextBatch(prompts=PROMPTS, references=(("a",),))
    with pytest.raises(InputError, match="0 prompts"):
        TextBatch(prompts=(), references=())
    with pytest.raises(InputError, match="a prompt is empty"):
        TextBatch(prompts=(np.empty(0, np.int64),), references=(("a",),))
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        TextErrors(metric=token_f1, decode=decode, max_new_tokens=0)
