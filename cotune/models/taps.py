"""From the residual stream to taps: hooks that watch it, and the shared projections applied to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cotune.generation.protocols import StepAbandonedError
from cotune.models.projections import RMS_EPS, Projections

# Takes the wanted positions out of (batch, seq, hidden) states, as (..., hidden).
Rows = Callable[[Tensor], Tensor]


class StateRecorder:
    """Hooks that keep the wanted rows of the residual stream while the model runs."""

    def __init__(self, layers: nn.ModuleList, head: nn.Module, tap_layers: tuple[int, ...]) -> None:
        self._rows: Rows | None = None
        self._is_wanted: Callable[[], bool] | None = None
        self._states: list[Tensor] = []
        self._hidden: Tensor | None = None
        for layer in tap_layers:
            if layer == 0:
                layers[0].register_forward_pre_hook(self._on_input)
            else:
                layers[layer - 1].register_forward_hook(self._on_output)
        head.register_forward_pre_hook(self._on_head)

    def start(self, rows: Rows, is_wanted: Callable[[], bool] | None = None) -> None:
        """Watch the next pass; where `is_wanted` says no between two layers, it ends with StepAbandonedError."""
        self._rows = rows
        self._is_wanted = is_wanted
        self._states = []

    def stop(self) -> tuple[Tensor, list[Tensor]]:
        hidden, states = self._hidden, self._states
        self._rows, self._is_wanted, self._hidden, self._states = None, None, None, []
        return hidden, states  # type: ignore[return-value]

    def _on_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._rows is not None:
            self._states.append(self._rows(args[0]))

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._rows is not None:
            if self._is_wanted is not None and not self._is_wanted():
                raise StepAbandonedError
            self._states.append(self._rows(output[0] if isinstance(output, tuple) else output))

    def _on_head(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        if self._rows is None:
            return None
        self._hidden = self._rows(args[0])
        # The head then computes logits for the wanted rows alone.
        return (self._hidden,)


class TapProjector:
    """t = C rmsnorm(y), not yet quantised.

    rmsnorm without affine divides a state by one number, so that it may come after the projection:

        C y / sqrt(|y|^2 / hidden + eps) = (sqrt(hidden) C) y / sqrt(|y|^2 + eps hidden)

    Args:
        projections: C, and whether states are normalised; whole states are not multiplied with anything.
        device: where the states are.
    """

    def __init__(self, projections: Projections, device: torch.device) -> None:
        self._is_identity = projections.has_whole_states
        self._normalise = projections.normalise
        self._eps = RMS_EPS * projections.hidden_size
        self._hidden_root = projections.hidden_size**0.5
        if self._is_identity:
            return
        factor = np.float32(projections.hidden_size**0.5 if self._normalise else 1.0)
        weight = (projections.taps * factor).transpose(0, 2, 1)  # (taps, hidden, tap_dim)
        # A copy in PyTorch's own memory: NumPy's may be unaligned, where products differ in the last bit.
        self._weight_transposed = torch.tensor(weight.copy(), device=device)

    def project(self, states: Tensor) -> Tensor:
        """Taps, float32 (positions, taps, tap_dim), of y (taps, positions, hidden)."""
        states = states.float()
        if self._is_identity:
            if not self._normalise:
                return states.transpose(0, 1)
            size = states.square().sum(dim=-1, keepdim=True).add_(self._eps).rsqrt_()
            return (states * size.mul_(self._hidden_root)).transpose(0, 1)
        taps = torch.bmm(states, self._weight_transposed)
        if self._normalise:
            taps *= states.square().sum(dim=-1, keepdim=True).add_(self._eps).rsqrt_()
        return taps.transpose(0, 1)

    def products(self, like: Tensor) -> list[tuple[Callable[[Tensor], Tensor], int]]:
        """Its matrix product as a function of rows (rows, hidden), with their width; see `row_invariance`."""
        if self._is_identity:
            return []
        num_taps, hidden, _ = self._weight_transposed.shape
        return [(lambda rows: torch.bmm(rows.float().expand(num_taps, -1, -1), self._weight_transposed), hidden)]
