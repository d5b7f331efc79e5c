"""Embeddings from numbers: what the model reads, what it writes, and that numbers can be found by slopes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_backbone

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.sandwich.account import Account
from cotune.sandwich.bilevel.slopes import estimate_slope
from cotune.sandwich.prompts.cma_response import CmaResponse
from cotune.sandwich.prompts.latent import LatentPrompt
from cotune.sandwich.prompts.soft_prefix import SoftPrefix

EXAMPLE = EncodedExample(np.array([0, 7, 9, 30, 1]), 3)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("llama")


def test_at_zero_the_prefix_is_the_embeddings_of_tokens(backbone: Backbone) -> None:
    prefix = SoftPrefix(backbone, num_tokens=2, dim=5, seed=3)
    tokens = torch.randint(400, (2,), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([tokens, torch.from_numpy(EXAMPLE.input_ids)])
    with torch.no_grad():
        logits = backbone.model(input_ids=ids[None]).logits[0].log_softmax(-1)
    nats = -(logits[4, 30] + logits[5, 1]) / 2  # the targets are the last two of seven
    assert prefix.losses(np.zeros(5), [EXAMPLE])[0] == pytest.approx(1 - float(torch.exp(-nats)), abs=1e-5)


def test_slopes_lead_to_a_lower_loss(backbone: Backbone) -> None:
    prefix = SoftPrefix(backbone, num_tokens=2, dim=5)
    z = np.zeros(5)
    for step in range(8):
        z = z - 20 * estimate_slope(
            lambda z: float(prefix.losses(z, [EXAMPLE])[0]),
            z,
            smoothing_radius=0.3,
            num_directions=4,
            generator=np.random.default_rng(step),
        )
    assert prefix.losses(z, [EXAMPLE])[0] < prefix.losses(np.zeros(5), [EXAMPLE])[0]


def test_it_writes_an_instruction_for_a_latent_prompt(backbone: Backbone) -> None:
    prefix = SoftPrefix(backbone, num_tokens=2, dim=3)
    prompt = LatentPrompt(prefix.writer("Instruction:", max_new_tokens=5), dim=3, smoothing_radius=5.0)
    written = prompt.best(np.zeros(3))
    assert written == prompt.best(np.zeros(3)) and isinstance(written, str)
    assert len(prompt.candidates(np.zeros(3))) > 1
    with pytest.raises(InputError, match="at most 128"):
        prefix.write(np.zeros(3), "x", max_new_tokens=500)


def test_prefixes_that_cannot_be_are_refused(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="num_tokens"):
        SoftPrefix(backbone, num_tokens=0, dim=1)


def test_a_fit_counts_what_the_model_that_writes_takes(backbone: Backbone) -> None:
    prefix = SoftPrefix(backbone, num_tokens=2, dim=3)
    writer = prefix.writer("Instruction:", max_new_tokens=5)
    written = LatentPrompt(writer, dim=3, smoothing_radius=5.0)
    account = Account(num_edge_parameters=1)
    for variable in (written, CmaResponse(written, spread=1.0, max_evaluations=2)):
        variable.count_in(account)
    before = account.taken()
    assert before.edge_flops == before.edge_forward_tokens == 0
    written.best(np.zeros(3))
    taken, num_read = account.taken(), 2 + prefix.num_tokens_of("Instruction:")
    assert num_read < taken.edge_forward_tokens <= num_read + 5
    embedding = backbone.model.get_input_embeddings().weight.numel()
    size = sum(each.numel() for each in backbone.model.parameters()) - embedding
    assert taken.edge_flops == 2 * size * taken.edge_forward_tokens
    LatentPrompt(lambda z: "x", dim=1).count_in(account)  # nothing to count, and no error
