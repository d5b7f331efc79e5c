from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotune.errors import InputError, NonFiniteLossError
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import Correction
from cotune.models.spa_ladder import SpaLadder, SpaLadderConfig
from cotune.models.tap_ladder import TapLadder, TapLadderConfig
from cotune.tuning.feature_set import FeatureSet
from cotune.tuning.loop import LoopConfig, LoopProgress
from cotune.tuning.side import AttentionShape, SideConfig, fresh_ladder, tune_side
from cotune.tuning.side_evaluation import nats_per_token
from cotune.wire.codec import dequantise, quantise, quantise_int4

CONFIG = SideConfig(
    loop=LoopConfig(epochs=4, learning_rate=0.01, checkpoint_interval_s=0.0),
    num_batch_positions=50,
    side_width=8,
    inner_width=16,
)


def base_nats(features: Any) -> float:
    return float((features.log_normalizer - features.target_logits).mean())


def test_an_untrained_side_network_is_the_base_model(draw_world: Callable[..., Any], output_basis: OutputBasis) -> None:
    features = draw_world(60, 1).features(10)
    network = fresh_ladder(features, output_basis, CONFIG)
    assert nats_per_token(features, network, output_basis, "parallel") == pytest.approx(base_nats(features), abs=1e-5)
    uniform = nats_per_token(features, network, output_basis, "serial")
    assert uniform == pytest.approx(np.log(output_basis.vocab_size), abs=1e-6)


@pytest.mark.parametrize("family", ["parallel", "serial"])
def test_it_beats_the_base_model_on_positions_it_has_not_seen(
    draw_world: Callable[..., Any], output_basis: OutputBasis, family: str
) -> None:
    features, heldout = draw_world(600, 1).features(10), draw_world(200, 2).features(10)
    config = replace(CONFIG, family=family, loop=LoopConfig(epochs=10, learning_rate=0.02))
    result = tune_side(features, output_basis, config, heldout=heldout)
    nats = nats_per_token(heldout, result.network, output_basis, family)
    assert nats < base_nats(heldout) - 1
    assert nats == pytest.approx(result.curve[result.best_epoch].heldout_loss, rel=1e-5)
    assert not result.network.training


def test_training_sees_what_the_device_will_compute(draw_world: Callable[..., Any], output_basis: OutputBasis) -> None:
    # With all logits known, the loss is that of softmax(z + delta) with delta from the wire's int8 correction.
    world = draw_world(100, 1)
    features = world.features(output_basis.vocab_size)
    network = tune_side(features, output_basis, CONFIG).network
    taps = torch.from_numpy(features.tap_codes.astype(np.float32) * features.tap_scales.astype(np.float32)[..., None])
    codes, scales = quantise(network(taps).detach().numpy())
    delta = np.stack(
        [output_basis.delta(Correction(codes=c, scale=np.float16(s))) for c, s in zip(codes, scales, strict=True)]
    )
    logits = (world.logits + delta).astype(np.float64)
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(100), world.target_ids]
    assert nats_per_token(features, network, output_basis, "parallel") == pytest.approx(expected.mean(), abs=1e-5)


def test_the_seed_decides_and_the_global_generator_is_left_alone(
    draw_world: Callable[..., Any], output_basis: OutputBasis
) -> None:
    features = draw_world(100, 1).features(10)
    config = replace(CONFIG, dropout=0.2)
    before = torch.get_rng_state()
    first, second, other = (
        tune_side(features, output_basis, replace(config, seed=seed)).network.to_arrays() for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not np.array_equal(first["head_weight"], other["head_weight"])


def test_an_interrupted_and_resumed_run_gives_the_same_network(
    tmp_path: Path, draw_world: Callable[..., Any], output_basis: OutputBasis
) -> None:
    features, heldout = draw_world(120, 1).features(10), draw_world(50, 2).features(10)
    config = replace(CONFIG, dropout=0.1)
    whole = tune_side(features, output_basis, config, heldout=heldout)

    def interrupt(progress: LoopProgress) -> None:
        if progress.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_side(features, output_basis, config, heldout=heldout, run_dir=tmp_path, progress=interrupt)
    resumed = tune_side(features, output_basis, config, heldout=heldout, run_dir=tmp_path, resume=True)
    expected = whole.network.to_arrays()
    for name, array in resumed.network.to_arrays().items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)

    with pytest.raises(InputError, match="another config or other data"):
        tune_side(heldout, output_basis, config, run_dir=tmp_path, resume=True)


def test_any_side_network_can_be_trained(draw_world: Callable[..., Any]) -> None:
    world = draw_world(200, 1)
    features = world.features(10)
    hidden = features.tap_codes.shape[2]
    basis = OutputBasis.from_matrix(np.random.default_rng(0).standard_normal((40, hidden)).astype(np.float32))
    network = SpaLadder(SpaLadderConfig(num_taps=3, hidden_size=hidden, side_width=6), torch.Generator().manual_seed(0))
    result = tune_side(features, basis, CONFIG, network=network)
    assert result.network is network
    assert nats_per_token(features, network, basis, "parallel") < base_nats(features) - 0.2


def test_the_published_ladder_needs_whole_states(draw_world: Callable[..., Any], output_basis: OutputBasis) -> None:
    features = draw_world(200, 1).features(10)
    config = replace(CONFIG, is_published=True, dropout=0.1)
    with pytest.raises(InputError, match="taps are 8 wide and corrections 12, expected both 6"):
        tune_side(features, output_basis, config)
    whole = replace(features, hidden=np.zeros((200, 8), np.float16))
    basis = OutputBasis.from_matrix(np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32))
    network = tune_side(whole, basis, config).network
    assert isinstance(network, SpaLadder)
    assert (network.config.side_width, network.config.hidden_size, network.config.dropout) == (8, 8, 0.1)
    with pytest.raises(InputError, match="is_published"):
        SideConfig(is_published=True, attention=AttentionShape())


def test_int4_taps_can_be_learnt_from(draw_world: Callable[..., Any], output_basis: OutputBasis) -> None:
    features, heldout = draw_world(600, 1).features(10), draw_world(200, 2).features(10)
    config = replace(CONFIG, loop=LoopConfig(epochs=10, learning_rate=0.02))

    def coarsened(part: FeatureSet) -> FeatureSet:
        codes, scales = quantise_int4(dequantise(part.tap_codes, part.tap_scales))
        return replace(part, tap_codes=codes, tap_scales=scales)

    fine, coarse = (tune_side(part, output_basis, config).network for part in (features, coarsened(features)))
    coarse_heldout = coarsened(heldout)
    served, mismatched = (
        nats_per_token(coarse_heldout, network, output_basis, "parallel") for network in (coarse, fine)
    )
    assert served < mismatched < base_nats(heldout) - 1, "whoever was trained on int4 taps reads them best"


@pytest.mark.parametrize("side_width", [16, 32, 64, 128])
@pytest.mark.parametrize("tap_dim", [8, 6])
def test_every_width_fits_the_same_budget(side_width: int, tap_dim: int) -> None:
    """Shared taps against wider personal ones, at equal parameters."""
    config = TapLadderConfig.for_budget(60_000, num_taps=3, tap_dim=tap_dim, basis_dim=12, side_width=side_width)
    step = 2 * (2 * side_width + 1)
    assert 60_000 - step < config.num_parameters <= 60_000
    assert TapLadder(config).num_parameters == config.num_parameters


def test_features_that_are_not_finite_end_in_a_clear_error(
    draw_world: Callable[..., Any], output_basis: OutputBasis
) -> None:
    features = draw_world(60, 1).features(10)
    features.target_logits[3] = np.nan
    with pytest.raises(NonFiniteLossError):
        tune_side(features, output_basis, CONFIG)


@pytest.mark.parametrize(
    "changes",
    [{"family": "diagonal"}, {"num_batch_positions": 0}, {"weight_decay": -1.0}, {"max_grad_norm": 0.0}],
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        SideConfig(**changes)
