"""Fewer key-value heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressible import VOCAB, tiny_model
from numpy.typing import NDArray

from cotune.compression.calibration import LayerProgress
from cotune.compression.heads import Heads, slice_heads
from cotune.errors import InputError

Ids = NDArray[np.int64]


@pytest.fixture
def input_ids() -> Ids:
    return np.random.default_rng(0).integers(0, VOCAB, (5, 9))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_group_that_adds_nothing_goes_and_nothing_changes(architecture: str, input_ids: Ids) -> None:
    """Four key-value heads of two query heads each; another group is silent in each block. Qwen 2 has biases."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    model, ids = tiny_model(architecture, **shape), torch.from_numpy(input_ids)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight[:, 8 * index : 8 * index + 8] = 0
            if layer.self_attn.q_proj.bias is not None:
                layer.self_attn.k_proj.bias.normal_(generator=torch.Generator().manual_seed(index))
                layer.self_attn.q_proj.bias.normal_(generator=torch.Generator().manual_seed(index))
        before = model(ids).logits
        with pytest.raises(InputError, match="expected 1 or 2 or 4: the hidden size of 32"):
            slice_heads(model, input_ids, 3)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 24:] = 0
        silent = model(ids).logits
        assert not torch.allclose(silent, before)
        slice_heads(model, input_ids, 2)
        again = model(ids).logits
    # In the first two blocks exactly two groups were silent; the third had one and the last group, too.
    torch.testing.assert_close(again, silent, rtol=1e-3, atol=1e-3)
    attention = model.model.layers[0].self_attn
    shapes = [tuple(getattr(attention, f"{part}_proj").weight.shape) for part in "qkvo"]
    assert shapes == [(16, 32), (8, 32), (8, 32), (32, 16)]
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 4)
    # Block 1 keeps groups 0 and 2: query rows 0-7 and 16-23, key rows 0-3 and 8-11.
    dense, kept = tiny_model(architecture, **shape).model.layers[1].self_attn, model.model.layers[1].self_attn
    assert torch.equal(kept.q_proj.weight, dense.q_proj.weight[[*range(8), *range(16, 24)]])
    assert torch.equal(kept.k_proj.weight, dense.k_proj.weight[[*range(4), *range(8, 12)]])
    assert torch.equal(kept.v_proj.weight, dense.v_proj.weight[[*range(4), *range(8, 12)]])


def test_repair_loses_less(input_ids: Ids) -> None:
    errors = []
    for repairs in (True, False):
        seen: list[LayerProgress] = []
        slice_heads(tiny_model(), input_ids, 1, repairs=repairs, on_layer=seen.append)
        assert [progress.name for progress in seen] == [f"model.layers.{i}.self_attn.o_proj" for i in range(3)]
        errors.append(seen[0].error or 0)
    assert 0 < errors[0] < 0.95 * errors[1]


def test_bad_input_is_one_clear_sentence(input_ids: Ids) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match=r"a share of 0\.2 of 2 in steps of 1 leaves all"):
        Heads().prune(model, 0.2, input_ids)
    with pytest.raises(InputError, match="0 key-value heads are to stay, expected 1 or 2"):
        slice_heads(model, input_ids, 0)
    assert Heads().prune(model, 0.5, input_ids) == {"num_attention_heads": 2, "num_key_value_heads": 1}
