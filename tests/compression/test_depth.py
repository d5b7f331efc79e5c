"""Block influence and dropping blocks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from compressible import VOCAB, tiny_model
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel

from cotune.compression.depth import Depth, block_influence, lowest_blocks
from cotune.errors import InputError

Ids = NDArray[np.int64]


@pytest.fixture
def input_ids() -> Ids:
    return np.random.default_rng(0).integers(0, VOCAB, (5, 9))


def test_influence_is_one_minus_the_mean_cosine(input_ids: Ids) -> None:
    model = tiny_model()
    with torch.no_grad():
        # The last of transformers' hidden states is behind the final norm, which leaves no cosine as it was.
        model.model.norm = torch.nn.Identity()
        states = model(torch.from_numpy(input_ids), output_hidden_states=True).hidden_states
    expected = []
    for before, after in pairwise(states):
        x, y = before.double().numpy(), after.double().numpy()
        cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        expected.append(1 - cosines.mean())
    assert len(expected) == 3
    assert block_influence(model, input_ids, batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_a_block_that_does_nothing_has_none_and_can_go(input_ids: Ids) -> None:
    model, ids = tiny_model(), torch.from_numpy(input_ids)
    idle = model.model.layers[1]
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
        before = model(ids).logits
    influence = block_influence(model, input_ids)
    assert influence[1] == pytest.approx(0, abs=1e-12) and min(influence[0], influence[2]) > 0.01
    facts = Depth().prune(model, "1", input_ids)
    assert facts == {"block_influence": influence, "dropped_blocks": [1]}
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_other_architectures_lose_blocks_too(input_ids: Ids) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, n_positions=16, vocab_size=VOCAB)).eval()
    influence = block_influence(model, input_ids)
    assert len(influence) == 3
    assert Depth().prune(model, 1, input_ids)["dropped_blocks"] == lowest_blocks(influence, 1)
    assert model.config.n_layer == 2


def test_of_equal_influence_the_first_goes() -> None:
    assert lowest_blocks([0.3, 0.1, 0.1, 0.1], 2) == [1, 2]


def test_bad_input_is_one_clear_sentence(input_ids: Ids) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="3 blocks are to go, expected 1 to 2"):
        Depth().prune(model, 3, input_ids)
    for amount in (0.5, 0, "two", -1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="expected a whole number of blocks"):
            Depth().prune(model, amount, input_ids)
    with pytest.raises(InputError, match="no calibration texts came"):
        Depth().prune(model, 1, None)
    with pytest.raises(InputError, match="skip is"):
        Depth().prune(model, 1, input_ids, skip=["mlp.down_proj"])
    assert len(model.model.layers) == 3
