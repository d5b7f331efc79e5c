from __future__ import annotations

import pytest
import torch

from cotune.data.batches import EncodedExample, pad_batch
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import answer_nats
from cotune.tuning.soft_prompt import SoftPrompt


def test_it_starts_from_embeddings_of_the_vocabulary(backbone: Backbone) -> None:
    adapter = SoftPrompt(num_virtual_tokens=6).fresh(backbone, (), seed=2)
    (prompt,) = adapter.params.values()
    vocabulary = backbone.model.get_input_embeddings().weight
    assert prompt.shape == (6, 16) and adapter.num_virtual_tokens == 6
    assert all(bool((vocabulary == row).all(dim=1).any()) for row in prompt)
    other = SoftPrompt(num_virtual_tokens=6).fresh(backbone, (), seed=3)
    assert not torch.equal(next(iter(other.params.values())), prompt)


def test_losses_are_of_the_answers_after_the_prompt(backbone: Backbone, examples: list[EncodedExample]) -> None:
    """The positions of a padded batch, against the bare model on embeddings put together by hand."""
    adapter = SoftPrompt(num_virtual_tokens=4).fresh(backbone, (), seed=0)
    (prompt,) = adapter.params.values()
    with adapter.attach(backbone.model) as model:
        nats = answer_nats(model, model.get_output_embeddings(), adapter.params, pad_batch(examples, 0)).detach()
    expected = []
    for example in examples:
        ids = torch.from_numpy(example.input_ids)
        embeddings = torch.cat([prompt, backbone.model.get_input_embeddings()(ids[:-1])])
        with torch.no_grad():
            scores = backbone.model(inputs_embeds=embeddings[None]).logits[0].log_softmax(-1)
        # Position i of the text predicts token i + 1.
        rows = torch.arange(example.first_target, len(ids)) - 1 + 4
        expected.append(-scores[rows, ids[example.first_target :]])
    torch.testing.assert_close(nats, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="num_virtual_tokens is 0"):
        SoftPrompt(num_virtual_tokens=0)
