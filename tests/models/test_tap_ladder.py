"""The default side network against its equations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cotune.errors import InputError
from cotune.models import TapLadder, TapLadderConfig


def test_it_computes_its_equations() -> None:
    config = TapLadderConfig(num_taps=3, tap_dim=4, basis_dim=6, side_width=2, inner_width=5)
    network = TapLadder(config, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    w = {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}
    t = np.random.default_rng(0).standard_normal((3, 4))

    def relu(x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0)

    u = [w["ladder.mix_weight"][i] @ t[i] + w["ladder.mix_bias"][i] for i in range(3)]
    h = u[0]
    for i in (1, 2):
        h = relu(h)
        inner = relu(w["ladder.up_weight"][i - 1] @ h + w["ladder.up_bias"][i - 1])
        h = u[i] + h + w["ladder.down_weight"][i - 1] @ inner + w["ladder.down_bias"][i - 1]
    s = w["norm_weight"] * h / np.sqrt((h**2).mean() + 1e-6)
    c = w["head_weight"] @ s + w["head_bias"]

    np.testing.assert_allclose(network.side_state(torch.tensor(t)).detach().numpy(), s, rtol=1e-10)
    np.testing.assert_allclose(network(torch.tensor(t)).detach().numpy(), c, rtol=1e-10)


def test_by_hand() -> None:
    """Two taps of width 1, side width 1: u = (2, -1); h = -1 + 2 + relu(2 * 2 - 1) * 3 + 0.5 = 10.5; s = 1; c = -4."""
    config = TapLadderConfig(num_taps=2, tap_dim=1, basis_dim=1, side_width=1, inner_width=1)
    arrays = {
        "ladder.mix_weight": [[[1.0]], [[1.0]]],
        "ladder.mix_bias": [[0.0], [0.0]],
        "ladder.up_weight": [[[2.0]]],
        "ladder.up_bias": [[-1.0]],
        "ladder.down_weight": [[[3.0]]],
        "ladder.down_bias": [[0.5]],
        "norm_weight": [1.0],
        "head_weight": [[-5.0]],
        "head_bias": [1.0],
    }
    network = TapLadder.from_arrays(vars(config), {k: np.array(v, np.float32) for k, v in arrays.items()})
    taps = torch.tensor([[2.0], [-1.0]])
    assert network.ladder(taps).item() == 10.5
    assert network(taps).item() == pytest.approx(-4.0, abs=1e-6)


def test_one_tap_is_a_linear_map_of_it() -> None:
    config = TapLadderConfig(num_taps=1, tap_dim=4, basis_dim=3, side_width=2)
    network = TapLadder(config)
    assert network(torch.ones(5, 1, 4)).shape == (5, 3)
    assert network.num_parameters == config.num_parameters


def test_dropout_works_in_training_alone() -> None:
    network = TapLadder(TapLadderConfig(num_taps=3, tap_dim=4, basis_dim=3, dropout=0.5))
    taps = torch.ones(3, 4)
    assert not torch.equal(network.side_state(taps), network.side_state(taps))
    network.eval()
    assert torch.equal(network.side_state(taps), network.side_state(taps))


@pytest.mark.parametrize("num_taps", [2, 7, 33])
@pytest.mark.parametrize("side_width", [16, 32])
def test_the_budget_is_used_and_not_exceeded(num_taps: int, side_width: int) -> None:
    shape = {"num_taps": num_taps, "tap_dim": 32, "basis_dim": 64, "side_width": side_width}
    config = TapLadderConfig.for_budget(200_000, **shape)
    assert TapLadder(config).num_parameters == config.num_parameters <= 200_000
    wider = TapLadderConfig(**shape, inner_width=config.inner_width + 1)
    assert wider.num_parameters > 200_000


def test_a_budget_too_small_is_an_input_error() -> None:
    shape = {"num_taps": 7, "tap_dim": 32, "basis_dim": 64}
    with pytest.raises(InputError, match="num_parameters is 5000, expected at least"):
        TapLadderConfig.for_budget(5000, **shape)
    with pytest.raises(InputError, match="two taps"):
        TapLadderConfig.for_budget(10**6, **{**shape, "num_taps": 1})
