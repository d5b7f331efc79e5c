"""Fewer feed-forward channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressible import VOCAB, tiny_model
from numpy.typing import NDArray
from torch.nn import functional as F

from cotune.compression.calibration import LayerProgress
from cotune.compression.channels import Channels, slice_channels
from cotune.errors import InputError

Ids = NDArray[np.int64]


@pytest.fixture
def input_ids() -> Ids:
    return np.random.default_rng(0).integers(0, VOCAB, (5, 9))


def test_channels_that_add_nothing_go_and_nothing_changes(input_ids: Ids) -> None:
    model, ids = tiny_model(), torch.from_numpy(input_ids)
    silent = torch.tensor([0, 5, 6, 20, 30, 31, 46, 47])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, silent] = 0
        before = model(ids).logits
        slice_channels(model, input_ids, 40, batch_size=2)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    mlp = model.model.layers[0].mlp
    assert [tuple(part.weight.shape) for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)] == [
        (40, 32),
        (40, 32),
        (32, 40),
    ]
    kept = [channel for channel in range(48) if channel not in silent]
    assert torch.equal(mlp.up_proj.weight, tiny_model().model.layers[0].mlp.up_proj.weight[kept])
    assert model.config.intermediate_size == 40


def test_importance_is_what_a_channel_adds_by_itself(input_ids: Ids) -> None:
    """The first block worked out from its formula, without repair; the second reads what that puts out."""
    model, dense = tiny_model(), tiny_model()
    seen: list[LayerProgress] = []
    slice_channels(model, input_ids, 10, repairs=False, on_layer=seen.append)
    states: list[torch.Tensor] = []
    for layer in (*dense.model.layers[:1], *model.model.layers[1:2]):
        layer.mlp.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0]))
    with torch.no_grad():
        dense(torch.from_numpy(input_ids))
        model(torch.from_numpy(input_ids))
        for index, inputs in enumerate(states):
            mlp = dense.model.layers[index].mlp
            active = (F.silu(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)).reshape(-1, 48).double()
            added = active[:, None, :] * mlp.down_proj.weight.double()  # (tokens, hidden, channels)
            kept = sorted(added.square().sum((0, 1)).topk(10).indices.tolist())
            assert torch.equal(model.model.layers[index].mlp.down_proj.weight, mlp.down_proj.weight[:, kept])
    assert [progress.name for progress in seen] == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert all(progress.error is not None and 0.01 < progress.error < 1 for progress in seen)


def test_repair_loses_less(input_ids: Ids) -> None:
    errors = []
    for repairs in (True, False):
        seen: list[LayerProgress] = []
        slice_channels(tiny_model(), input_ids, 24, repairs=repairs, on_layer=seen.append)
        errors.append(seen[0].error or 0)
    assert 0 < errors[0] < 0.8 * errors[1]


def test_a_share_leaves_a_multiple(input_ids: Ids) -> None:
    model = tiny_model()
    assert Channels(multiple=16).prune(model, 0.4, input_ids) == {"intermediate_size": 32}
    assert model.config.intermediate_size == 32


def test_bad_input_is_one_clear_sentence(input_ids: Ids) -> None:
    model = tiny_model()
    for num in (0, 49):
        with pytest.raises(InputError, match=f"num_kept is {num}, expected 1 to 48"):
            slice_channels(model, input_ids, num)
    for amount in (0, 1, "a quarter", 2):
        with pytest.raises(InputError, match="expected a share above 0 and below 1"):
            Channels().prune(model, amount, input_ids)
    with pytest.raises(InputError, match="no calibration texts came"):
        Channels().prune(model, 0.5, None)
