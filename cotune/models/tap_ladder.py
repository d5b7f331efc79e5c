"""The default side network: SPA's ladder on shared, projected, quantised taps, with personal mixing matrices.

Deviations from SPA (arXiv 2403.07088), after its public code: personal down-projections of whole hidden states
become personal mixing matrices A_i (side, tap_dim) on shared taps; the inner width of a rung is a choice; the side
state is RMS-normalised; the head starts at zero and ends in the shared output basis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cotune.errors import InputError
from cotune.models.side_network import Ladder, SideNetwork, config_from


@dataclass(frozen=True, kw_only=True)
class TapLadderConfig:
    """Shape of a tap ladder."""

    num_taps: int
    """Taps read for one position."""
    tap_dim: int
    """Width of a tap."""
    basis_dim: int
    """Length of a correction."""
    side_width: int = 32
    """Width of the side state."""
    inner_width: int = 128
    """Width inside a rung."""
    dropout: float = 0.0
    """Probability inside a rung, in training only."""

    def __post_init__(self) -> None:
        for name in ("num_taps", "tap_dim", "basis_dim", "side_width", "inner_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**20:
                raise InputError(f"{name} is {value!r}, expected an integer from 1 to {2**20}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout is {self.dropout}, expected at least 0 and below 1")

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of this shape."""
        side, inner = self.side_width, self.inner_width
        mix = self.num_taps * (self.tap_dim + 1) * side
        rungs = (self.num_taps - 1) * (inner * (side + 1) + side * (inner + 1))
        return mix + rungs + side + self.basis_dim * (side + 1)

    @classmethod
    def for_budget(
        cls, num_parameters: int, *, num_taps: int, tap_dim: int, basis_dim: int, side_width: int = 32
    ) -> Self:
        """The widest rungs with at most `num_parameters` parameters.

        Raises:
            InputError: not even an inner width of 1 fits, or there is no rung to widen.

        Example:
            >>> config = TapLadderConfig.for_budget(100_000, num_taps=7, tap_dim=32, basis_dim=64)
            >>> config.inner_width, config.num_parameters
            (231, 99818)
        """
        shape = {"num_taps": num_taps, "tap_dim": tap_dim, "basis_dim": basis_dim, "side_width": side_width}
        narrowest = cls(**shape, inner_width=1)
        per_width = cls(**shape, inner_width=2).num_parameters - narrowest.num_parameters
        if num_parameters < narrowest.num_parameters or per_width == 0:
            raise InputError(
                f"num_parameters is {num_parameters}, expected at least {narrowest.num_parameters} and two taps "
                f"for {shape}; take fewer taps or a smaller side_width"
            )
        return cls(**shape, inner_width=1 + (num_parameters - narrowest.num_parameters) // per_width)


class TapLadder(SideNetwork):
    """h from the ladder; s = RMSNorm(h), with a learned scale; c = R s + r."""

    kind = "tap_ladder"

    def __init__(self, config: TapLadderConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self._config = config
        self.ladder = Ladder(
            num_taps=config.num_taps,
            tap_dim=config.tap_dim,
            side_width=config.side_width,
            inner_width=config.inner_width,
            dropout=config.dropout,
            generator=generator,
        )
        self.norm_weight = nn.Parameter(torch.ones(config.side_width))
        self.head_weight = nn.Parameter(torch.zeros(config.basis_dim, config.side_width))
        self.head_bias = nn.Parameter(torch.zeros(config.basis_dim))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], generator: torch.Generator | None = None) -> Self:
        return cls(config_from(TapLadderConfig, config), generator)

    @property
    def config(self) -> TapLadderConfig:
        return self._config

    def side_state(self, taps: Tensor, positions: Tensor | None = None) -> Tensor:
        return F.rms_norm(self.ladder(taps), self.norm_weight.shape, self.norm_weight, eps=1e-6)
