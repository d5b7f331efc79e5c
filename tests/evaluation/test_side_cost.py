"""The side network's costs, held against a step of it and against every byte that is allocated."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from cotune.errors import InputError
from cotune.evaluation.allocations import count_allocations
from cotune.evaluation.method_cost import MethodSettings, predict_cost
from cotune.evaluation.model_shape import ModelShape
from cotune.evaluation.side_cost import (
    SideSettings,
    basis_bytes,
    features_bytes,
    num_side_parameters,
    position_bytes,
    side_step_bytes,
    side_step_flops,
)
from cotune.evaluation.workload import Workload
from cotune.models.backbone import Backbone
from cotune.tuning.feature_set import FeatureSet
from cotune.tuning.side import SideConfig, SideTuner, fresh_network, side_batches

SHAPE = ModelShape(hidden=64, inner=160, layers=4, heads=4, kv_heads=4, head_dim=16, vocab=700)
LOAD = Workload(batch=2, length=128)
SIDE = SideSettings(top_k=50)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    config = LlamaConfig(
        hidden_size=SHAPE.hidden,
        intermediate_size=SHAPE.inner,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        vocab_size=SHAPE.vocab,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Backbone.from_model(LlamaForCausalLM(config), b"{}")


@pytest.fixture(scope="module")
def features(backbone: Backbone) -> FeatureSet:
    texts = np.random.default_rng(0).integers(0, SHAPE.vocab, (LOAD.batch, LOAD.length + 1))
    return FeatureSet.from_sequences([backbone.features(text, 1, SIDE.top_k) for text in texts])


def test_a_step_takes_the_bytes_and_operations_predicted(backbone: Backbone, features: FeatureSet) -> None:
    config = SideConfig(num_batch_positions=LOAD.num_targets)
    network = fresh_network(features, backbone.output_basis, config)
    assert num_side_parameters(SHAPE, SIDE) == network.num_parameters
    tuner = SideTuner(network, torch.from_numpy(backbone.output_basis.matrix()), config)
    state = tuner.init(dict(network.named_parameters()))
    batches = side_batches(features, network, SHAPE.vocab, config.family, LOAD.num_targets, seed=0)

    def step() -> None:
        for batch in batches.epoch(0):
            tuner.step(state, batch)

    step()
    # Whatever the moment, all gradients are there at its end or the logits at its middle.
    found = count_allocations(step).peak_bytes
    assert side_step_bytes(SHAPE, LOAD, SIDE) == pytest.approx(found, rel=0.1)
    with FlopCounterMode(display=False) as counter:
        step()
    assert side_step_flops(SHAPE, LOAD, SIDE) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_features_take_the_bytes_predicted(backbone: Backbone, features: FeatureSet) -> None:
    names = ("tap_codes", "tap_scales", "log_normalizer", "target_logits", "top_ids", "top_logits", "hidden")
    held = features.target_ids.nbytes + sum(getattr(features, name).nbytes for name in names)
    assert position_bytes(SHAPE, SIDE) * len(features) == pytest.approx(held + len(features) * 8 * 52, rel=0.02)
    basis = backbone.output_basis
    assert basis_bytes(SHAPE, SIDE) == basis.codes.nbytes + basis.scales.nbytes + basis.matrix().nbytes
    text = np.random.default_rng(1).integers(0, SHAPE.vocab, LOAD.length + 1)
    found = count_allocations(lambda: backbone.features(text, 1, SIDE.top_k)).peak_bytes
    assert features_bytes(SHAPE, LOAD, SIDE) == pytest.approx(found, rel=0.15)


def test_with_and_without_a_model_in_the_process() -> None:
    settings = MethodSettings(side=SIDE)
    away, here = (predict_cost(SHAPE, method, LOAD, settings) for method in ("side", "side_local"))
    assert here.weights - away.weights == 4 * SHAPE.num_parameters
    assert away.num_trained == here.num_trained and away.result == 4 * away.num_trained
    assert (here.sent, away.sent) == (0, 256 * position_bytes(SHAPE, SIDE))
    assert here.flops - away.flops == predict_cost(SHAPE, "inference", LOAD).flops
    more = MethodSettings(side=dataclasses.replace(SIDE, num_steps=5))
    assert predict_cost(SHAPE, "side", LOAD, more).weights - away.weights == 4 * 256 * position_bytes(SHAPE, SIDE)


def test_impossible_widths_are_refused() -> None:
    with pytest.raises(InputError, match="side_width is 0, expected at least 1"):
        SideSettings(side_width=0)
