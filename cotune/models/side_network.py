"""Side networks: small personal networks that read a frozen backbone's taps and correct its logits.

They are ladders after SPA (arXiv 2403.07088 and its public code), stateless per token, or after Ladder Side-Tuning
(arXiv 2206.06522), with attention over earlier positions. All end in a linear head:

    s = side_state(t)          taps (taps, tap_dim) to the side state (side,)
    c = R s + r                the correction, (basis_dim,), in the shared output basis B

so that the logits change by delta = W_lm B c = P s + p0 with P = W_lm B R and p0 = W_lm B r. R and r are zero at
the start: an untrained plugin is exactly the base model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cotune.errors import InputError

Config = TypeVar("Config")

_FLOAT16_MAX = 65504.0


def fake_quantise(values: Tensor) -> Tensor:
    """What is left of `values` (..., dim) after the int8 codec; gradients pass straight through.

    The value equals `dequantise(*quantise(values))` of `cotune.wire.codec` bit for bit.
    """
    with torch.no_grad():
        largest = values.detach().abs().amax(dim=-1, keepdim=True)
        # A tensor as divisor: with a plain number, CUDA multiplies by the reciprocal and the last bit differs.
        scales = (largest / torch.full_like(largest, 127.0)).clamp(max=_FLOAT16_MAX).half().to(values.dtype)
        safe = torch.where(scales > 0, scales, torch.ones_like(scales))
        codes = (values.detach() / safe).round().clamp(-127.0, 127.0)
        quantised = codes * scales + 0.0  # int8 knows no -0.0, and neither may this
    # Not values + (quantised - values).detach(): that sum rounds, and this form is exact.
    output: Tensor = _StraightThrough.apply(values, quantised)  # type: ignore[no-untyped-call]
    return output


class _StraightThrough(torch.autograd.Function):
    """The second argument forwards, the gradient to the first argument backwards."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, quantised: Tensor) -> Tensor:
        return quantised

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Ladder(nn.Module):
    """The rungs: from taps (..., taps, tap_dim) to h (..., side).

        h = u_0 ;  for i = 1 .. taps-1:  h = u_i + relu(h) + B_i drop(relu(A'_i relu(h) + b1_i)) + b2_i
        u_i = A_i t_i + a_i

    The order is that of SPA's released code: In, then for each layer ReLU, Down_i and the residual adapter.
    Symbols: A_i `mix_weight`, a_i `mix_bias`, A'_i `up_weight`, B_i `down_weight`; b1, b2 their biases.

    Args:
        num_taps: states read, at least 1; there is one rung less.
        tap_dim: width of a tap.
        side_width: width of h.
        inner_width: width inside a rung.
        dropout: probability inside a rung, in training only.
        generator: source of the initial values, PyTorch's default for linear layers, U(+-1/sqrt(fan_in)).
    """

    def __init__(
        self,
        *,
        num_taps: int,
        tap_dim: int,
        side_width: int,
        inner_width: int,
        dropout: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        rungs = num_taps - 1
        self.mix_weight = nn.Parameter(uniform((num_taps, side_width, tap_dim), tap_dim, generator))
        self.mix_bias = nn.Parameter(uniform((num_taps, side_width), tap_dim, generator))
        self.up_weight = nn.Parameter(uniform((rungs, inner_width, side_width), side_width, generator))
        self.up_bias = nn.Parameter(uniform((rungs, inner_width), side_width, generator))
        self.down_weight = nn.Parameter(uniform((rungs, side_width, inner_width), inner_width, generator))
        self.down_bias = nn.Parameter(uniform((rungs, side_width), inner_width, generator))
        self.dropout = nn.Dropout(dropout)

    def forward(self, taps: Tensor) -> Tensor:
        batch = taps.shape[:-2]
        by_tap = taps.reshape(-1, *taps.shape[-2:]).transpose(0, 1)  # (taps, positions, tap_dim)
        # The rung's output bias joins the mixing bias: one addition for all layers.
        bias = torch.cat([self.mix_bias[:1], self.mix_bias[1:] + self.down_bias])
        mixed = torch.baddbmm(bias.unsqueeze(1), by_tap, self.mix_weight.transpose(1, 2))  # (taps, positions, side)
        h, *inputs = mixed.unbind(0)
        rungs = zip(inputs, self.up_weight.unbind(0), self.up_bias.unbind(0), self.down_weight.unbind(0), strict=True)
        for u, up_weight, up_bias, down_weight in rungs:
            h = F.relu(h)
            inner = self.dropout(F.relu(F.linear(h, up_weight, up_bias)))
            h = u + h + F.linear(inner, down_weight)
        return h.reshape(*batch, -1)


class SideNetwork(nn.Module, ABC):
    """A personal network from taps to a correction. Final classes list themselves in `SIDE_NETWORKS`."""

    kind: ClassVar[str]
    reads_every_position: ClassVar[bool] = False
    """Whether a correction depends on earlier positions too."""
    head_weight: nn.Parameter  # R, (basis_dim, side)
    head_bias: nn.Parameter  # r, (basis_dim,)

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], generator: torch.Generator | None = None) -> Self:
        """A fresh network from its configuration as JSON values.

        Raises:
            InputError: an unknown, missing or impossible value.
        """

    @property
    @abstractmethod
    def config(self) -> Any:
        """The frozen configuration dataclass."""

    @property
    def prompt_window(self) -> int:
        """How many positions it reads up to the first generated one, that one included; 0 without a memory."""
        return 0

    @abstractmethod
    def side_state(self, taps: Tensor, positions: Tensor | None = None) -> Tensor:
        """s, float32 (..., side), from float32 (..., taps, tap_dim), and int64 (...,) positions where they matter."""

    def forward(self, taps: Tensor, positions: Tensor | None = None) -> Tensor:
        """c = R s + r, float32 (..., basis_dim), not yet quantised, from float32 (..., taps, tap_dim).

        A network that reads every position takes (..., seq, taps, tap_dim), whole sequences.

        Args:
            taps: as above.
            positions: int64 (..., seq), absolute; None for 1 .. seq.
        """
        return F.linear(self.side_state(taps, positions), self.head_weight, self.head_bias)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def config_dict(self) -> dict[str, Any]:
        """The configuration as JSON values, for `plugin.json`."""
        return asdict(self.config)

    def to_arrays(self) -> dict[str, NDArray[np.float32]]:
        """All parameters by name, float32 copies."""
        return {name: np.array(parameter.detach().cpu().float().numpy()) for name, parameter in self.named_parameters()}

    @classmethod
    def from_arrays(cls, config: Mapping[str, Any], arrays: Mapping[str, NDArray[np.float32]]) -> Self:
        """A network with the given parameters.

        Raises:
            InputError: a parameter is missing, unknown or of another shape.
        """
        network = cls.from_config(config)
        parameters = dict(network.named_parameters())
        if parameters.keys() != arrays.keys():
            raise InputError(
                f"the side network has parameters {sorted(arrays)}, expected {sorted(parameters)} for {cls.kind}"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                if arrays[name].shape != tuple(parameter.shape):
                    raise InputError(
                        f"{name} has shape {arrays[name].shape}, expected {tuple(parameter.shape)} for its config"
                    )
                parameter.copy_(torch.from_numpy(np.array(arrays[name])))
        return network


def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator | None) -> Tensor:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for weight and bias of a linear layer."""
    bound = 1.0 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def config_from(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration from JSON values; unknown or missing keys are an InputError."""
    try:
        return config_class(**values)
    except TypeError as error:
        raise InputError(f"the side network's config does not fit {config_class.__name__}: {error}") from error
