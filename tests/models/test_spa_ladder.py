"""The exact side network of SPA, against its public code's equations and its published size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cotune.models import Projections, SpaLadder, SpaLadderConfig


def test_parameter_count_on_llama_7b() -> None:
    """12,982,304, 0.1927 % of 6.738 billion: the 0.2 % of SPA's Table 1. Down, Adp, In and Out as in its code."""
    with torch.device("meta"):
        network = SpaLadder(SpaLadderConfig.llama_7b())
    assert network.num_parameters == SpaLadderConfig.llama_7b().num_parameters == 12_982_304
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    mix = sizes["ladder.mix_weight"] + sizes["ladder.mix_bias"]
    down = mix * 32 // 33
    adp = sum(sizes[f"ladder.{part}"] for part in ("up_weight", "up_bias", "down_weight", "down_bias"))
    assert (down, mix - down, adp) == (4_195_328, 131_104, 8_520_704)
    assert sizes["head_weight"] + sizes["head_bias"] == 135_168


class PublishedLadder(nn.Module):
    """The forward pass of SPA's public code, written down from its description with one module for each matrix."""

    def __init__(self, hidden: int, layers: int, side: int) -> None:
        super().__init__()
        self.enter = nn.Linear(hidden, side)
        self.down = nn.ModuleList(nn.Linear(hidden, side) for _ in range(layers))
        self.a = nn.ModuleList(nn.Linear(side, hidden) for _ in range(layers))
        self.b = nn.ModuleList(nn.Linear(hidden, side) for _ in range(layers))
        self.out = nn.Linear(side, hidden)

    def forward(self, x: torch.Tensor, y: list[torch.Tensor]) -> torch.Tensor:
        h = self.enter(x)
        for i, down in enumerate(self.down):
            h = F.relu(h)
            h = down(y[i]) + h + self.b[i](F.relu(self.a[i](h)))
        return self.out(F.relu(h))


def test_it_computes_the_published_network() -> None:
    torch.manual_seed(0)
    published = PublishedLadder(hidden=10, layers=3, side=4).double()
    stack = {
        "ladder.mix_weight": [published.enter.weight, *(m.weight for m in published.down)],
        "ladder.mix_bias": [published.enter.bias, *(m.bias for m in published.down)],
        "ladder.up_weight": [m.weight for m in published.a],
        "ladder.up_bias": [m.bias for m in published.a],
        "ladder.down_weight": [m.weight for m in published.b],
        "ladder.down_bias": [m.bias for m in published.b],
    }
    network = SpaLadder(SpaLadderConfig(num_taps=4, hidden_size=10, side_width=4)).double().eval()
    state = {name: torch.stack(parts) for name, parts in stack.items()}
    network.load_state_dict({**state, "head_weight": published.out.weight, "head_bias": published.out.bias})
    taps = torch.randn(6, 4, 10, dtype=torch.float64)
    torch.testing.assert_close(network(taps), published(taps[:, 0], [taps[:, i] for i in (1, 2, 3)]))


def test_the_device_needs_no_language_model_head() -> None:
    """P s + p0 = W_lm (U s + b), with P = W_lm U, in the identity basis."""
    network = SpaLadder(SpaLadderConfig(num_taps=3, hidden_size=8, side_width=4, official_init=True)).eval()
    basis = torch.tensor(Projections.identity(tap_layers=range(3), hidden_size=8).basis)
    w_lm = torch.randn(50, 8)
    s = network.side_state(torch.randn(7, 3, 8))
    u, b = network.head_weight, network.head_bias
    torch.testing.assert_close(s @ (w_lm @ basis @ u).T + w_lm @ basis @ b, F.linear(F.linear(s, u, b), w_lm))


def test_official_init_starts_away_from_the_base_model() -> None:
    taps = torch.randn(2, 3, 8)
    assert (SpaLadder(SpaLadderConfig(num_taps=3, hidden_size=8))(taps) == 0).all()
    official = SpaLadder(SpaLadderConfig(num_taps=3, hidden_size=8, official_init=True))
    assert (official(taps) != 0).all()


def test_dropout_is_a_tenth_by_default() -> None:
    network = SpaLadder(SpaLadderConfig(num_taps=2, hidden_size=8, official_init=True))
    assert network.ladder.dropout.p == pytest.approx(0.1)
