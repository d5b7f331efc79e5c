"""Greedy texts are in `test_text_objectives.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cotune.models.backbone import Backbone
from cotune.tuning.continuations import continuations, sampled

PROMPTS = tuple(np.array(ids, np.int64) for ids in ([1, 5, 9, 30], [1, 12], [1, 7, 7]))


def write(backbone: Backbone, seed: int, temperature: float = 1.0, **options: object) -> list[list[int]]:
    params = dict(backbone.model.named_parameters())
    choose = sampled(torch.Generator().manual_seed(seed), temperature)
    return continuations(backbone.model, params, PROMPTS, choose, **{"max_new_tokens": 6, **options})  # type: ignore[arg-type]


def test_a_seed_decides_the_texts_and_nothing_else_changes(backbone: Backbone) -> None:
    before = torch.get_rng_state()
    texts = write(backbone, 3)
    assert texts == write(backbone, 3) != write(backbone, 4)
    assert [len(text) for text in texts] == [6, 6, 6]
    assert torch.equal(before, torch.get_rng_state())


def test_a_text_ends_with_its_stop_token(backbone: Backbone) -> None:
    whole = write(backbone, 5)
    stop = whole[0][2]
    cut = write(backbone, 5, stop_token_ids={stop})
    assert cut[0] == whole[0][: whole[0].index(stop) + 1] and cut[0][-1] == stop
    assert all(text and stop not in text[:-1] for text in cut)


def test_draws_follow_the_probabilities(backbone: Backbone) -> None:
    """First tokens of 3,000 draws against softmax(logits / T), and against another temperature's."""
    params, prompt = dict(backbone.model.named_parameters()), PROMPTS[0]
    with torch.no_grad():
        logits = 4 * backbone.model(torch.from_numpy(prompt[None])).logits[0, -1]
    head = backbone.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, output: 4 * output)  # further from uniform
    for temperature, other in ((1.0, 3.0), (3.0, 1.0)):
        choose = sampled(torch.Generator().manual_seed(0), temperature)
        texts = continuations(backbone.model, params, [prompt] * 3000, choose, max_new_tokens=1)
        counts = np.bincount([text[0] for text in texts], minlength=len(logits)) / 3000
        expected, wrong = ((logits / t).softmax(-1).numpy() for t in (temperature, other))
        assert np.abs(counts - expected).sum() < 0.15 < 0.3 < np.abs(counts - wrong).sum()
    hook.remove()
    assert write(backbone, 0, 1e-3)[0][0] == int(logits.argmax())


@pytest.mark.parametrize("length", [1, 4])
def test_no_text_is_longer_than_asked(backbone: Backbone, length: int) -> None:
    assert [len(text) for text in write(backbone, 1, max_new_tokens=length)] == [length] * 3
