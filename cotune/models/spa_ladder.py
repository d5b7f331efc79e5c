"""The exact side network of SPA (arXiv 2403.07088), after its public code (OceannTwT/SPA, LadderSide).

It reads raw hidden states (`Projections.identity`), its rungs are as wide inside as the backbone, and its Out
speaks in the hidden space itself: c = U relu(h) + b, delta = W_lm c. On Llama-7B: 12,982,304 parameters.

Deviations: U and b start at zero, so that training starts at the base model; `official_init` gives the released
initialisation. Over the network, states and correction pass the int8 codec.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cotune.errors import InputError
from cotune.models.side_network import Ladder, SideNetwork, config_from, uniform


@dataclass(frozen=True, kw_only=True)
class SpaLadderConfig:
    """Shape of SPA's ladder."""

    num_taps: int
    """States read for one position: the backbone's layers and one."""
    hidden_size: int
    """Width of the backbone."""
    side_width: int = 32
    """Width of the side state, `adapter_len` in the public code."""
    dropout: float = 0.1
    """Probability inside a rung, in training only."""
    official_init: bool = False
    """Random U and b, as released, instead of zeros."""

    def __post_init__(self) -> None:
        for name in ("num_taps", "hidden_size", "side_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**20:
                raise InputError(f"{name} is {value!r}, expected an integer from 1 to {2**20}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout is {self.dropout}, expected at least 0 and below 1")

    @classmethod
    def llama_7b(cls) -> Self:
        """Llama-7B, 32 layers of width 4096."""
        return cls(num_taps=33, hidden_size=4096)

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of this shape."""
        d, side = self.hidden_size, self.side_width
        mix = self.num_taps * (d + 1) * side
        rungs = (self.num_taps - 1) * (d * (side + 1) + side * (d + 1))
        return mix + rungs + d * (side + 1)

    @classmethod
    def for_budget(cls, num_parameters: int, *, num_taps: int, hidden_size: int) -> Self:
        """The widest side state with at most `num_parameters` parameters.

        Raises:
            InputError: not even a width of 1 fits.

        Example:
            >>> SpaLadderConfig.for_budget(13_000_000, num_taps=33, hidden_size=4096).side_width
            32
        """
        narrowest = cls(num_taps=num_taps, hidden_size=hidden_size, side_width=1)
        per_width = cls(num_taps=num_taps, hidden_size=hidden_size, side_width=2).num_parameters
        per_width -= narrowest.num_parameters
        if num_parameters < narrowest.num_parameters:
            raise InputError(
                f"num_parameters is {num_parameters}, expected at least {narrowest.num_parameters} for {num_taps} taps "
                f"of width {hidden_size}; raise the budget"
            )
        width = 1 + (num_parameters - narrowest.num_parameters) // per_width
        return cls(num_taps=num_taps, hidden_size=hidden_size, side_width=width)

    @property
    def tap_dim(self) -> int:
        return self.hidden_size

    @property
    def basis_dim(self) -> int:
        return self.hidden_size


class SpaLadder(SideNetwork):
    """h from the ladder; s = relu(h); c = U s + b, with U `head_weight` (hidden, side) and b `head_bias`."""

    kind = "spa_ladder"

    def __init__(self, config: SpaLadderConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self._config = config
        hidden, side = config.hidden_size, config.side_width
        self.ladder = Ladder(
            num_taps=config.num_taps,
            tap_dim=hidden,
            side_width=side,
            inner_width=hidden,
            dropout=config.dropout,
            generator=generator,
        )
        if config.official_init:
            self.head_weight = nn.Parameter(uniform((hidden, side), side, generator))
            self.head_bias = nn.Parameter(uniform((hidden,), side, generator))
        else:
            self.head_weight = nn.Parameter(torch.zeros(hidden, side))
            self.head_bias = nn.Parameter(torch.zeros(hidden))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], generator: torch.Generator | None = None) -> Self:
        return cls(config_from(SpaLadderConfig, config), generator)

    @property
    def config(self) -> SpaLadderConfig:
        return self._config

    def side_state(self, taps: Tensor, positions: Tensor | None = None) -> Tensor:
        return F.relu(self.ladder(taps))
