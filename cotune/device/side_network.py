"""The side network on the device: NumPy, one position at a time, the same numbers as `cotune.models` trains.

The ladder of `cotune.models.side_network.Ladder` in as few calls as possible, since each costs about as much as
the arithmetic in it. Each rung is two matrix-vector products, because biases and the residual ride along:

    inner = relu([A' | b1] [h; 1])        h = relu(h)
    h     = [B | I] [inner; h] + (u + b2)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.device.attention_network import AttentionNetwork
from cotune.device.plugin_tensors import Tensors, check_taps, check_tensors, read_dimension
from cotune.errors import InputError
from cotune.generation.gate import Gate, GateLayer
from cotune.generation.protocols import Correction
from cotune.generation.side_state import StatelessCorrector
from cotune.plugin import Plugin
from cotune.wire.codec import dequantise, quantise

_RMS_EPS = np.float32(1e-6)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    num_taps: int
    tap_dim: int
    basis_dim: int
    side_width: int
    inner_width: int


class SideNetwork(StatelessCorrector):
    """A ladder without a memory, ready to run. Fits `Corrector`.

    It keeps working memory between calls: use one object in one thread.

    Attributes:
        num_taps, tap_dim: shape of the taps that it reads.
        basis_dim: length of its corrections.
    """

    def __init__(self, kind: str, config: dict[str, Any], tensors: Tensors) -> None:
        if kind not in _KINDS:
            raise InputError(
                f"the plugin's kind is {kind!r}, expected one of {', '.join((*_KINDS, AttentionNetwork.kind))}; "
                "update cotune or tune again"
            )
        read_shape, self._side_state, has_norm = _KINDS[kind]
        try:
            shape = read_shape(config)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the plugin's config does not fit {kind} ({error!r}); tune again") from error
        check_tensors(tensors, _expected_shapes(shape, has_norm))
        self.num_taps, self.tap_dim, self.basis_dim = shape.num_taps, shape.tap_dim, shape.basis_dim
        side, inner = shape.side_width, shape.inner_width
        rungs = shape.num_taps - 1
        bias = tensors["ladder.mix_bias"].copy()
        bias[1:] += tensors["ladder.down_bias"]
        self._mix_weight = np.ascontiguousarray(tensors["ladder.mix_weight"])  # (taps, side, tap_dim)
        self._mix_bias = bias[:, :, None]  # (taps, side, 1)
        up = np.concatenate([tensors["ladder.up_weight"], tensors["ladder.up_bias"][:, :, None]], axis=2)
        eye = np.broadcast_to(np.eye(side, dtype=np.float32), (rungs, side, side))
        down = np.concatenate([tensors["ladder.down_weight"], eye], axis=2)
        self._rungs = [(np.ascontiguousarray(up[i]), np.ascontiguousarray(down[i])) for i in range(rungs)]
        self._norm_weight = tensors["norm_weight"] if has_norm else np.ones(side, np.float32)
        self._head_weight = np.ascontiguousarray(tensors["head_weight"])
        self._head_bias = tensors["head_bias"]
        # [inner; h; 1]: the products read overlapping windows of it.
        self._work = np.ones(inner + side + 1, np.float32)
        self._inner = self._work[:inner]
        self._h = self._work[inner:-1]
        self._inner_and_h = self._work[:-1]
        self._h_and_one = self._work[inner:]
        self._mixed = np.empty((shape.num_taps, side, 1), np.float32)

    @classmethod
    def from_plugin(cls, plugin: Plugin) -> SideNetwork:
        """The plugin's ladder; see `open_side_network` for those of any kind.

        Raises:
            InputError: another kind, or tensors that do not fit the config.
        """
        return cls(plugin.kind, plugin.config, plugin.tensors)

    @property
    def size_bytes(self) -> int:
        """Memory of its weights."""
        arrays = [self._mix_weight, self._mix_bias, self._head_weight, self._head_bias, self._norm_weight]
        return sum(array.nbytes for array in [*arrays, *(array for rung in self._rungs for array in rung)])

    def correct(self, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> Correction:
        """Correction for one position from int8 (taps, tap_dim) codes and float16 (taps,) scales.

        Raises:
            InputError: the taps have another shape than the plugin was tuned for.
        """
        check_taps(tap_codes, tap_scales, self.num_taps, self.tap_dim)
        codes, scale = quantise(self.correct_exactly(dequantise(tap_codes, tap_scales)))
        return Correction(codes=codes, scale=np.float16(scale))

    def correct_exactly(self, taps: NDArray[np.float32]) -> NDArray[np.float32]:
        """c = R s + r, float32 (basis_dim,), before quantisation, from float32 (taps, tap_dim)."""
        # BLAS may set the flag for invalid operations over numbers beside the vectors, which it never uses.
        with np.errstate(invalid="ignore"):
            return self._corrected(taps)

    def _corrected(self, taps: NDArray[np.float32]) -> NDArray[np.float32]:
        mixed, h = self._mixed, self._h
        np.matmul(self._mix_weight, taps[:, :, None], out=mixed)
        np.add(mixed, self._mix_bias, out=mixed)
        inputs = mixed[:, :, 0]
        h[:] = inputs[0]
        inner, inner_and_h, h_and_one = self._inner, self._inner_and_h, self._h_and_one
        dot, maximum, zero = np.dot, np.maximum, np.float32(0)
        for i, (up, down) in enumerate(self._rungs, start=1):
            maximum(h, zero, out=h)
            dot(up, h_and_one, out=inner)
            maximum(inner, zero, out=inner)
            np.add(dot(down, inner_and_h), inputs[i], out=h)
        s = self._side_state(h, self._norm_weight)
        correction: NDArray[np.float32] = self._head_weight @ s + self._head_bias
        return correction


def open_side_network(plugin: Plugin) -> SideNetwork | AttentionNetwork:
    """The plugin's side network, of whatever kind.

    Raises:
        InputError: an unknown kind, or tensors that do not fit the config.
    """
    if plugin.kind == AttentionNetwork.kind:
        return AttentionNetwork(plugin.config, plugin.tensors)
    return SideNetwork(plugin.kind, plugin.config, plugin.tensors)


def gate_of(plugin: Plugin) -> Gate | None:
    """The plugin's gate, where it has one."""
    kept = plugin.gate
    if kept is None:
        return None
    layer = None
    if kept.layer is not None and kept.layer_bias is not None:
        layer = GateLayer(weight=kept.layer.astype(np.float16), bias=kept.layer_bias)
    return Gate(weight=kept.weight, bias=kept.bias, threshold=kept.threshold, layer=layer)


def _rms_norm(h: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    mean_square = np.dot(h, h) / np.float32(len(h))
    normalised: NDArray[np.float32] = h * (weight / np.sqrt(mean_square + _RMS_EPS))
    return normalised


def _relu(h: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.maximum(h, np.float32(0))


def _tap_ladder_shape(config: dict[str, Any]) -> _Shape:
    names = ("num_taps", "tap_dim", "basis_dim", "side_width", "inner_width")
    return _Shape(**{name: read_dimension(config, name) for name in names})


def _spa_ladder_shape(config: dict[str, Any]) -> _Shape:
    hidden = read_dimension(config, "hidden_size")
    return _Shape(
        num_taps=read_dimension(config, "num_taps"),
        tap_dim=hidden,
        basis_dim=hidden,
        side_width=read_dimension(config, "side_width"),
        inner_width=hidden,
    )


# kind: how to read its shape, its side state from h, and whether that has a learned scale.
_KINDS: dict[
    str,
    tuple[
        Callable[[dict[str, Any]], _Shape],
        Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]],
        bool,
    ],
] = {
    "tap_ladder": (_tap_ladder_shape, _rms_norm, True),
    "spa_ladder": (_spa_ladder_shape, _relu, False),
}


def _expected_shapes(shape: _Shape, has_norm: bool) -> dict[str, tuple[int, ...]]:
    rungs, side, inner = shape.num_taps - 1, shape.side_width, shape.inner_width
    norm = {"norm_weight": (side,)} if has_norm else {}
    return {
        "ladder.mix_weight": (shape.num_taps, side, shape.tap_dim),
        "ladder.mix_bias": (shape.num_taps, side),
        "ladder.up_weight": (rungs, inner, side),
        "ladder.up_bias": (rungs, inner),
        "ladder.down_weight": (rungs, side, inner),
        "ladder.down_bias": (rungs, side),
        "head_weight": (shape.basis_dim, side),
        "head_bias": (shape.basis_dim,),
        **norm,
    }
