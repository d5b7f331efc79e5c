from __future__ import annotations

import pytest
import torch

from cotune.data.batches import EncodedExample, pad_batch
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import answer_nats
from cotune.tuning.prefix import Prefix


def test_the_start_is_a_text_of_drawn_tokens_in_front(backbone: Backbone, examples: list[EncodedExample]) -> None:
    """Keys and values of the drawn tokens are the same as these tokens in front of each text."""
    adapter = Prefix(num_virtual_tokens=4).fresh(backbone, (), seed=9)
    drawn = torch.randint(backbone.spec.vocab_size, (4,), generator=torch.Generator().manual_seed(9))
    with adapter.attach(backbone.model) as model:
        nats = answer_nats(model, model.get_output_embeddings(), adapter.params, pad_batch(examples, 0)).detach()
    longer = [
        EncodedExample(torch.cat([drawn, torch.from_numpy(e.input_ids)]).numpy(), e.first_target + 4) for e in examples
    ]
    head, own = backbone.model.get_output_embeddings(), dict(backbone.model.named_parameters())
    expected = answer_nats(backbone.model, head, own, pad_batch(longer, 0))
    torch.testing.assert_close(nats, expected, atol=2e-5, rtol=1e-5)


def test_it_is_as_large_as_keys_and_values_are(backbone: Backbone) -> None:
    adapter = Prefix(num_virtual_tokens=3).fresh(backbone, (), seed=0)
    # Two layers; a head of 8, one key-value head in the Llama, two in the GPT-2.
    kv_heads = 1 if backbone.spec.architecture.startswith("Llama") else 2
    assert adapter.num_parameters == 3 * 2 * 2 * kv_heads * 8
    assert adapter.num_virtual_tokens == 3


def test_an_empty_prefix_is_refused() -> None:
    with pytest.raises(InputError, match="num_virtual_tokens is 0"):
        Prefix(num_virtual_tokens=0)
