"""What every side network promises, and the codec's rounding inside training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import Correction
from cotune.models import SIDE_NETWORKS, Projections, SideNetwork, fake_quantise, load_side_network
from cotune.wire.codec import dequantise, quantise

CONFIGS: dict[str, dict[str, Any]] = {
    "tap_ladder": {"num_taps": 4, "tap_dim": 5, "basis_dim": 6, "side_width": 3, "inner_width": 7},
    "spa_ladder": {"num_taps": 4, "hidden_size": 9, "side_width": 3},
    "attention_ladder": {
        "num_taps": 4,
        "tap_dim": 5,
        "basis_dim": 6,
        "side_width": 4,
        "ff_width": 7,
        "head_dim": 2,
    },
}


@pytest.fixture(params=list(SIDE_NETWORKS))
def network(request: pytest.FixtureRequest) -> SideNetwork:
    generator = torch.Generator().manual_seed(1)
    return SIDE_NETWORKS[request.param].from_config(CONFIGS[request.param], generator).eval()


def random_taps(network: SideNetwork, *batch: int, seed: int = 2) -> torch.Tensor:
    shape = (*batch, network.config.num_taps, network.config.tap_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shake(network: SideNetwork) -> None:
    """Random values for all parameters, the head's too."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_kinds_are_listed_under_their_names() -> None:
    assert {kind: cls.kind for kind, cls in SIDE_NETWORKS.items()} == {kind: kind for kind in CONFIGS}


def test_an_untrained_network_corrects_nothing(network: SideNetwork) -> None:
    correction = network(random_taps(network, 8))
    assert correction.shape == (8, network.config.basis_dim)
    assert (correction == 0).all()
    basis = OutputBasis.from_matrix(np.ones((11, network.config.basis_dim), np.float32))
    codes, scales = quantise(correction.detach().numpy())
    assert (basis.delta(Correction(codes=codes[0], scale=scales[0])) == 0).all()


def test_the_first_step_moves_the_head(network: SideNetwork) -> None:
    network(random_taps(network, 8)).sum().backward()
    assert network.head_weight.grad is not None and (network.head_weight.grad != 0).any()


def test_every_parameter_takes_part(network: SideNetwork) -> None:
    shake(network)
    network(random_taps(network, 64)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and (parameter.grad != 0).any(), name


def test_sequences_are_independent_and_positions_too_without_a_memory(network: SideNetwork) -> None:
    shake(network)
    taps = random_taps(network, 2, 3)
    together = network(taps)
    assert together.shape == (2, 3, network.config.basis_dim)
    torch.testing.assert_close(together[1], network(taps[1]))
    assert torch.allclose(together[1, 2], network(taps[1, 2])) != network.reads_every_position
    assert (network.prompt_window > 0) == network.reads_every_position


def test_the_head_is_linear_in_the_side_state(network: SideNetwork) -> None:
    """delta = W_lm B (R s + r) = P s + p0, with P = W_lm B R and p0 = W_lm B r."""
    shake(network)
    generator = torch.Generator().manual_seed(4)
    w_lm = torch.randn(17, 9, generator=generator, dtype=torch.float64)
    basis = torch.randn(9, network.config.basis_dim, generator=generator, dtype=torch.float64)
    taps = random_taps(network, 5).double()
    network = network.double()
    s = network.side_state(taps)
    p, p0 = w_lm @ basis @ network.head_weight, w_lm @ basis @ network.head_bias
    torch.testing.assert_close(s @ p.T + p0, network(taps) @ basis.T @ w_lm.T)


def test_arrays_and_back(network: SideNetwork) -> None:
    shake(network)
    arrays = network.to_arrays()
    again = load_side_network(network.kind, network.config_dict(), arrays).eval()
    assert again.config == network.config
    assert sum(array.size for array in arrays.values()) == network.num_parameters
    taps = random_taps(network, 3)
    assert torch.equal(again(taps), network(taps))
    with torch.no_grad():
        network.head_bias.add_(1.0)
    assert torch.equal(again(taps), load_side_network(network.kind, network.config_dict(), arrays).eval()(taps))


def test_initial_values_come_from_the_generator_alone(network: SideNetwork) -> None:
    state = torch.random.get_rng_state()
    same, other = (
        type(network).from_config(network.config_dict(), torch.Generator().manual_seed(seed)) for seed in (1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(same.ladder.mix_weight, network.ladder.mix_weight)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(other.ladder.mix_weight, network.ladder.mix_weight)  # type: ignore[union-attr, arg-type]


def test_bad_configs_and_arrays_are_input_errors(network: SideNetwork) -> None:
    cls, config, arrays = type(network), network.config_dict(), network.to_arrays()
    for wrong in ({"colour": 1}, {"num_taps": 0}, {"side_width": 2.5}, {"num_taps": True}, {"dropout": "much"}):
        with pytest.raises(InputError):
            cls.from_config({**config, **wrong})
    with pytest.raises(InputError, match="missing"):
        cls.from_config({})
    for dropout in (-0.1, 1.0):
        with pytest.raises(InputError, match="dropout"):
            cls.from_config({**config, "dropout": dropout})
    with pytest.raises(InputError, match="has shape"):
        cls.from_arrays(config, {**arrays, "head_bias": np.zeros(2, np.float32)})
    with pytest.raises(InputError, match="expected"):
        cls.from_arrays(config, {**arrays, "extra": np.zeros(2, np.float32)})
    with pytest.raises(InputError, match="expected one of tap_ladder, spa_ladder, attention_ladder"):
        load_side_network("nonsense", config, arrays)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None)
@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=7), elements=FLOATS))
def test_fake_quantise_equals_the_codec_bit_for_bit(values: NDArray[np.float32]) -> None:
    with np.errstate(over="ignore"):
        expected = dequantise(*quantise(values))
    got = fake_quantise(torch.tensor(values)).numpy()
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_fake_quantise_equals_the_codec_on_ordinary_values() -> None:
    values = np.random.default_rng(0).standard_normal((2000, 64)).astype(np.float32)
    values *= np.exp(np.random.default_rng(1).uniform(-16, 12, (2000, 1))).astype(np.float32)
    got = fake_quantise(torch.tensor(values)).numpy()
    np.testing.assert_array_equal(got.view(np.uint32), dequantise(*quantise(values)).view(np.uint32))


def test_fake_quantise_lets_gradients_through() -> None:
    values = torch.tensor([[0.3, -1.0, 0.004]], requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0]])
    (fake_quantise(values) * upstream).sum().backward()
    assert values.grad is not None and torch.equal(values.grad, upstream)


def test_training_on_quantised_corrections_sees_what_decoding_sees(network: SideNetwork) -> None:
    shake(network)
    projections = Projections.random(tap_layers=(0,), hidden_size=24, tap_dim=5, basis_dim=network.config.basis_dim)
    head = np.random.default_rng(0).standard_normal((40, 24)).astype(np.float32)
    basis = projections.output_basis(head)
    correction = network(random_taps(network)).detach()
    in_training = fake_quantise(correction).numpy() @ basis.matrix().T
    codes, scale = quantise(correction.numpy())
    in_decoding = basis.delta(Correction(codes=codes, scale=np.float16(scale)))
    np.testing.assert_allclose(in_training, in_decoding, atol=1e-5)
