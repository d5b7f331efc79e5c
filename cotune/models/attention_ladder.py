"""The side network with a memory: a ladder of small transformer blocks on shared, projected, quantised taps.

Ladder Side-Tuning (LST, arXiv 2206.06522) runs a thinner transformer beside the frozen one; QST (arXiv 2401.07004) does
so for Llama's blocks. Here, for the taps t_0 .. t_n that are used, with u_i = A_i t_i + a_i:

    h = u_0 ;  for i = 1 .. n:   h = mu_i h + (1 - mu_i) u_i ,  mu_i = sigmoid(alpha_i / 0.1)
                                 h = h + O_i Attention_i(RMSNorm(h))
                                 h = h + D_i (SiLU(G_i RMSNorm(h)) * U_i RMSNorm(h))
    s = RMSNorm(h) ;  c = R s + r

Attention is grouped-query (Ainslie et al., arXiv 2305.13245), causal, over the last `context` positions, with rotary
embeddings (Su et al., arXiv 2104.09864) of absolute positions, so that nothing shifts where a position is skipped.

Deviations: A_i works on shared taps instead of whole states; heads keep a width of 32 or 16 instead of becoming thinner
with the network; the head starts at zero and ends in the shared output basis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cotune.errors import InputError
from cotune.models.side_network import SideNetwork, config_from, uniform

MIX_TEMPERATURE = 0.1
MAX_CONTEXT = 2**16
_RMS_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class AttentionLadderConfig:
    """Shape of an attention ladder."""

    num_taps: int
    """Taps that come for one position."""
    tap_dim: int
    """Width of a tap."""
    basis_dim: int
    """Length of a correction."""
    side_width: int = 64
    """Width of the side state."""
    ff_width: int = 64
    """Width inside a block's feed-forward layer."""
    head_dim: int = 32
    """Width of an attention head; there are side_width / head_dim of them, at least one."""
    num_kv_heads: int = 1
    """Heads of keys and values; a divisor of the number of heads."""
    context: int = 512
    """A position sees so many, itself included; bounds the device's memory."""
    prompt_window: int = 128
    """Positions read up to the first generated one, that one included."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths."""
    tap_indices: tuple[int, ...] | None = None
    """The taps that are used, ascending, at least two; None for all. Each but the first costs a block."""
    dropout: float = 0.0
    """Probability on what a block's two halves add, in training only."""

    def __post_init__(self) -> None:
        names = ("num_taps", "tap_dim", "basis_dim", "side_width", "ff_width", "head_dim", "num_kv_heads")
        for name in (*names, "context", "prompt_window"):
            value = getattr(self, name)
            largest = MAX_CONTEXT if name in ("context", "prompt_window") else 2**20
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
                raise InputError(f"{name} is {value!r}, expected an integer from 1 to {largest}")
        if self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}, expected an even number: rotations turn pairs")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_kv_heads is {self.num_kv_heads}, expected a divisor of {self.num_heads}, the number of heads "
                f"with side_width {self.side_width} and head_dim {self.head_dim}"
            )
        theta = self.rope_theta
        if not isinstance(theta, int | float) or not (math.isfinite(theta) and theta > 1):
            raise InputError(f"rope_theta is {theta!r}, expected a number above 1")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout is {self.dropout}, expected at least 0 and below 1")
        object.__setattr__(self, "tap_indices", self._checked_indices())

    def _checked_indices(self) -> tuple[int, ...]:
        """All of them spelled out, so that a plugin needs no defaults."""
        indices = tuple(range(self.num_taps) if self.tap_indices is None else self.tap_indices)
        known = all(isinstance(tap, int) and 0 <= tap < self.num_taps for tap in indices)
        if not known or len(indices) < 2 or any(a >= b for a, b in pairwise(indices)):
            raise InputError(
                f"tap_indices is {indices}, expected at least two ascending numbers below num_taps {self.num_taps}"
            )
        return indices

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""
        return max(1, self.side_width // self.head_dim)

    @property
    def num_rungs(self) -> int:
        """Blocks."""
        assert self.tap_indices is not None
        return len(self.tap_indices) - 1

    @property
    def num_parameters(self) -> int:
        """Trainable numbers of this shape."""
        side = self.side_width
        mix = (self.num_rungs + 1) * (self.tap_dim + 1) * side
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim * side
        block = 1 + 2 * side + attention + 3 * self.ff_width * side
        return mix + self.num_rungs * block + side + self.basis_dim * (side + 1)

    @classmethod
    def for_budget(cls, num_parameters: int, **shape: Any) -> Self:
        """The widest feed-forward layers with at most `num_parameters` parameters; `shape` is all but `ff_width`.

        Raises:
            InputError: not even a width of 1 fits.

        Example:
            >>> config = AttentionLadderConfig.for_budget(100_000, num_taps=7, tap_dim=32, basis_dim=64)
            >>> config.ff_width, config.num_parameters
            (5, 99270)
        """
        narrowest = cls(**shape, ff_width=1)
        per_width = 3 * narrowest.side_width * narrowest.num_rungs
        if num_parameters < narrowest.num_parameters:
            raise InputError(
                f"num_parameters is {num_parameters}, expected at least {narrowest.num_parameters} for {shape}; "
                "use fewer taps (tap_indices) or a smaller side_width"
            )
        return cls(**shape, ff_width=1 + (num_parameters - narrowest.num_parameters) // per_width)


class AttentionRungs(nn.Module):
    """The blocks: from taps (sequences, seq, taps, tap_dim) to h (sequences, seq, side); see this module's head.

    Symbols: A_i `mix_weight`, a_i `mix_bias`, alpha_i `mix_gate`, O_i `output_weight`, G_i `gate_weight`,
    U_i `up_weight`, D_i `down_weight`.

    Args:
        config: its shape.
        generator: source of the initial values, U(+-1/sqrt(fan_in)).
    """

    def __init__(self, config: AttentionLadderConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        self._config = config
        rungs, side, width = config.num_rungs, config.side_width, config.ff_width
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        taps = rungs + 1
        self.mix_weight = nn.Parameter(uniform((taps, side, config.tap_dim), config.tap_dim, generator))
        self.mix_bias = nn.Parameter(uniform((taps, side), config.tap_dim, generator))
        self.mix_gate = nn.Parameter(torch.zeros(rungs))
        self.attention_norm = nn.Parameter(torch.ones(rungs, side))
        self.query_weight = nn.Parameter(uniform((rungs, query, side), side, generator))
        self.key_weight = nn.Parameter(uniform((rungs, kv, side), side, generator))
        self.value_weight = nn.Parameter(uniform((rungs, kv, side), side, generator))
        self.output_weight = nn.Parameter(uniform((rungs, side, query), query, generator))
        self.ff_norm = nn.Parameter(torch.ones(rungs, side))
        self.gate_weight = nn.Parameter(uniform((rungs, width, side), side, generator))
        self.up_weight = nn.Parameter(uniform((rungs, width, side), side, generator))
        self.down_weight = nn.Parameter(uniform((rungs, side, width), width, generator))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, taps: Tensor, positions: Tensor) -> Tensor:
        config = self._config
        distance = positions[:, :, None] - positions[:, None, :]
        # Padding on the right has positions of its own after all others, which nobody looks at.
        visible = ((distance >= 0) & (distance < config.context))[:, None]  # (sequences, 1, seq, seq)
        rotation = rotations(positions, config.head_dim, config.rope_theta, taps.dtype)
        used = taps[:, :, list(config.tap_indices or ())]
        mixed = torch.einsum("bsnd,nkd->nbsk", used, self.mix_weight) + self.mix_bias[:, None, None]
        keep = torch.sigmoid(self.mix_gate / MIX_TEMPERATURE)
        h = mixed[0]
        for i in range(config.num_rungs):
            h = keep[i] * h + (1 - keep[i]) * mixed[i + 1]
            h = h + self.dropout(self._attention(i, _rms_norm(h, self.attention_norm[i]), visible, rotation))
            x = _rms_norm(h, self.ff_norm[i])
            inner = F.silu(F.linear(x, self.gate_weight[i])) * F.linear(x, self.up_weight[i])
            h = h + self.dropout(F.linear(inner, self.down_weight[i]))
        return h

    def _attention(self, i: int, x: Tensor, visible: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        heads = [
            F.linear(x, weight[i]).view(*x.shape[:2], -1, self._config.head_dim).transpose(1, 2)
            for weight in (self.query_weight, self.key_weight, self.value_weight)
        ]
        query, key, value = heads  # (sequences, heads or kv_heads, seq, head_dim)
        groups = query.shape[1] // key.shape[1]
        attended = F.scaled_dot_product_attention(
            rotate(query, *rotation), rotate(key, *rotation), value, attn_mask=visible, enable_gqa=groups > 1
        )
        return F.linear(attended.transpose(1, 2).flatten(2), self.output_weight[i])


class AttentionLadder(SideNetwork):
    """h from the blocks; s = RMSNorm(h), with a learned scale; c = R s + r."""

    kind = "attention_ladder"
    reads_every_position = True

    def __init__(self, config: AttentionLadderConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self._config = config
        self.ladder = AttentionRungs(config, generator)
        self.norm_weight = nn.Parameter(torch.ones(config.side_width))
        self.head_weight = nn.Parameter(torch.zeros(config.basis_dim, config.side_width))
        self.head_bias = nn.Parameter(torch.zeros(config.basis_dim))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], generator: torch.Generator | None = None) -> Self:
        return cls(config_from(AttentionLadderConfig, config), generator)

    @property
    def config(self) -> AttentionLadderConfig:
        return self._config

    @property
    def prompt_window(self) -> int:
        return self._config.prompt_window

    def side_state(self, taps: Tensor, positions: Tensor | None = None) -> Tensor:
        """s, float32 (..., seq, side), of whole sequences.

        Args:
            taps: float32 (..., seq, taps, tap_dim); of (taps, tap_dim) alone, one position.
            positions: int64 (..., seq), absolute, ascending; None for 1 .. seq.
        """
        if taps.ndim == 2:
            return self.side_state(taps[None], positions)[0]
        batch, seq = taps.shape[:-3], taps.shape[-3]
        if positions is None:
            positions = torch.arange(1, seq + 1, device=taps.device)
        positions = positions.expand(*batch, seq).reshape(-1, seq)
        h = self.ladder(taps.reshape(-1, *taps.shape[-3:]), positions)
        return _rms_norm(h, self.norm_weight).reshape(*batch, seq, -1)


def rotations(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, (sequences, 1, seq, head_dim / 2), from absolute positions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions[:, None, :, None].double() * theta**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs (x_j, x_{j + head_dim/2}) of (sequences, heads, seq, head_dim)."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


def _rms_norm(h: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(h, weight.shape, weight, eps=_RMS_EPS)
