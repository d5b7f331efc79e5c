"""The side network with attention on the device: NumPy, one position at a time, keys and values kept.

The same numbers as `cotune.models.attention_ladder` trains, up to rounding. On the device itself they are the same to
the last bit whatever happened before: a position's keys and values come from one piece of code whether it is read or
corrected, and always lie alike with respect to memory lines, wherever in the buffers they are.

    norms      folded into the products after them: W (h / rms(h) * w) = (W diag(w)) h / rms(h)
    scores     1 / sqrt(head_dim) is folded into the queries
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.device.plugin_tensors import Tensors, check_taps, check_tensors, read_dimension
from cotune.errors import InputError
from cotune.generation.protocols import Correction
from cotune.wire.codec import dequantise, quantise

MAX_ROLLBACK = 256
"""A memory that is full can go back at least so many positions from the furthest; a cloud's window keeps below."""

_BLOCK = 64  # positions by which the buffers grow, and which a full memory drops at once
_MEMORY_LINE = 64  # bytes
_MAX_CONTEXT = 2**16
_MIX_TEMPERATURE = 0.1
_RMS_EPS = np.float32(1e-6)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    num_taps: int
    tap_dim: int
    basis_dim: int
    side_width: int
    ff_width: int
    head_dim: int
    num_kv_heads: int
    context: int
    prompt_window: int
    rope_theta: float
    tap_indices: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        return max(1, self.side_width // self.head_dim)

    @property
    def num_rungs(self) -> int:
        return len(self.tap_indices) - 1

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Shape:
        """Raises KeyError, TypeError or ValueError for a config that makes no sense."""
        names = (
            "num_taps",
            "tap_dim",
            "basis_dim",
            "side_width",
            "ff_width",
            "head_dim",
            "num_kv_heads",
            "context",
            "prompt_window",
        )
        numbers = {name: read_dimension(config, name) for name in names}
        if numbers["context"] > _MAX_CONTEXT:
            raise ValueError(f"context is {numbers['context']}")
        theta, indices = config["rope_theta"], config["tap_indices"]
        if type(theta) not in (int, float) or not (math.isfinite(theta) and theta > 1):
            raise ValueError(f"rope_theta is {theta!r}")
        taps = tuple(indices)
        ascending = all(type(tap) is int for tap in taps) and list(taps) == sorted(set(taps))
        if not ascending or len(taps) < 2 or not 0 <= taps[0] <= taps[-1] < numbers["num_taps"]:
            raise ValueError(f"tap_indices is {indices!r}")
        shape = cls(**numbers, rope_theta=float(theta), tap_indices=taps)
        if shape.head_dim % 2 or shape.num_heads % shape.num_kv_heads:
            raise ValueError(f"head_dim is {shape.head_dim} and num_kv_heads {shape.num_kv_heads}")
        return shape

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        rungs, side, width = self.num_rungs, self.side_width, self.ff_width
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "ladder.mix_weight": (rungs + 1, side, self.tap_dim),
            "ladder.mix_bias": (rungs + 1, side),
            "ladder.mix_gate": (rungs,),
            "ladder.attention_norm": (rungs, side),
            "ladder.query_weight": (rungs, query, side),
            "ladder.key_weight": (rungs, kv, side),
            "ladder.value_weight": (rungs, kv, side),
            "ladder.output_weight": (rungs, side, query),
            "ladder.ff_norm": (rungs, side),
            "ladder.gate_weight": (rungs, width, side),
            "ladder.up_weight": (rungs, width, side),
            "ladder.down_weight": (rungs, side, width),
            "norm_weight": (side,),
            "head_weight": (self.basis_dim, side),
            "head_bias": (self.basis_dim,),
        }


@dataclass(frozen=True)
class _Rung:
    """One rung's weights, ready to multiply.

    Attributes:
        keep, take: mu and 1 - mu.
        qkv: (heads * head_dim + 2 * kv_heads * head_dim, side).
        output: (side, heads * head_dim).
        gate_and_up: (2 * ff, side).
        down: (side, ff).
    """

    keep: np.float32
    take: np.float32
    qkv: NDArray[np.float32]
    output: NDArray[np.float32]
    gate_and_up: NDArray[np.float32]
    down: NDArray[np.float32]


class AttentionNetwork:
    """A side network with a memory, ready to run. Fits `Corrector`.

    It keeps working memory between calls, which all its open sequences share: use one object in one thread.

    Attributes:
        num_taps, tap_dim: shape of the taps that it is given.
        basis_dim: length of its corrections.
        context: a position sees this many, itself included.
        prompt_window: how many positions it reads up to the first generated one, that one included.

    Raises:
        InputError: tensors that do not fit the config.
    """

    kind = "attention_ladder"
    reads_every_position = True

    def __init__(self, config: Mapping[str, Any], tensors: Tensors) -> None:
        try:
            shape = _Shape.of(config)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the plugin's config does not fit {self.kind} ({error!r}); tune again") from error
        check_tensors(tensors, shape.tensor_shapes())
        self._shape = shape
        self.num_taps, self.tap_dim, self.basis_dim = shape.num_taps, shape.tap_dim, shape.basis_dim
        self.context, self.prompt_window = shape.context, shape.prompt_window
        self._taps = np.array(shape.tap_indices)
        self._mix_weight = _aligned_copy(tensors["ladder.mix_weight"])
        self._mix_bias = _aligned_copy(tensors["ladder.mix_bias"][:, :, None])
        self._rungs = [_read_rung(shape, tensors, i) for i in range(shape.num_rungs)]
        self._head_weight = _aligned_copy(tensors["head_weight"] * tensors["norm_weight"])
        self._head_bias = tensors["head_bias"]
        exponents = np.arange(0, shape.head_dim, 2) / shape.head_dim
        self._frequencies = shape.rope_theta**-exponents
        self._work = _Work(shape)

    @property
    def size_bytes(self) -> int:
        """Memory of its weights; each open sequence has its own, see `AttentionState.size_bytes`."""
        arrays = [self._mix_weight, self._mix_bias, self._head_weight, self._head_bias]
        for rung in self._rungs:
            arrays += [rung.qkv, rung.output, rung.gate_and_up, rung.down]
        return sum(array.nbytes for array in arrays)

    def open(self) -> AttentionState:
        """An empty memory, for one sequence."""
        return AttentionState(self)

    def remember(
        self, memory: _Memory, position: int, taps: NDArray[np.float32], *, to_the_end: bool
    ) -> NDArray[np.float32] | None:
        """Append one position's keys and values; c before quantisation, or None if `to_the_end` is false.

        Args:
            memory: of the sequence; its next position is this one.
            position: absolute, for the rotation of queries and keys.
            taps: float32 (taps, tap_dim), all that the network is given.
        """
        work, dot = self._work, np.dot
        h, qkv, attended, gate_and_up, inner = work.h, work.qkv, work.attended, work.gate_and_up, work.inner
        gate, up = gate_and_up[: len(inner)], gate_and_up[len(inner) :]
        # BLAS may set the flag for invalid operations over numbers beside the vectors; exp(-gate) may overflow to inf.
        with np.errstate(invalid="ignore", over="ignore"):
            work.taps[:, :, 0] = taps[self._taps]
            inputs = (np.matmul(self._mix_weight, work.taps) + self._mix_bias)[:, :, 0]
            angles = position * self._frequencies
            cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
            slot = memory.append()
            h[:] = inputs[0]
            for i, rung in enumerate(self._rungs):
                np.multiply(h, rung.keep, out=h)
                h += rung.take * inputs[i + 1]
                dot(rung.qkv, h, out=qkv)
                qkv *= _inverse_rms(h)
                self._write(memory, i, slot, cosines, sines)
                if i == len(self._rungs) - 1 and not to_the_end:
                    return None
                self._attend(memory, i)
                h += dot(rung.output, attended)
                dot(rung.gate_and_up, h, out=gate_and_up)
                gate_and_up *= _inverse_rms(h)
                np.negative(gate, out=inner)
                np.exp(inner, out=inner)
                inner += 1
                np.divide(gate, inner, out=inner)
                inner *= up
                h += dot(rung.down, inner)
            correction: NDArray[np.float32] = dot(self._head_weight, h) * _inverse_rms(h) + self._head_bias
        return correction

    def _write(
        self, memory: _Memory, index: int, slot: int, cosines: NDArray[np.float32], sines: NDArray[np.float32]
    ) -> None:
        """Rotate queries and keys, and put the position's key and value into their slot."""
        work, num_heads = self._work, self._shape.num_heads
        pairs, rotated = work.pairs, work.rotated
        np.multiply(pairs, cosines, out=rotated)
        rotated[:, 0] -= pairs[:, 1] * sines
        rotated[:, 1] += pairs[:, 0] * sines
        memory.keys[index, :, slot] = work.rotated_heads[num_heads:]
        memory.values[index, :, slot] = work.value

    def _attend(self, memory: _Memory, index: int) -> None:
        """What the newest position takes from those that it sees, itself included."""
        work, seen = self._work, memory.seen
        shape = (*work.query.shape[:2], seen.stop - seen.start)
        scores = work.scores[: math.prod(shape)].reshape(shape)
        np.matmul(work.query, memory.keys[index, :, seen].transpose(0, 2, 1), out=scores)
        scores -= scores.max(axis=2, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=2, keepdims=True)
        np.matmul(scores, memory.values[index, :, seen], out=work.attended_heads)


class _Work:
    """Working memory of one position: vectors that products read always lie in the same place."""

    def __init__(self, shape: _Shape) -> None:
        heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        rotated = heads + kv_heads
        self.taps = _aligned((len(shape.tap_indices), shape.tap_dim, 1))
        self.h = _aligned((shape.side_width,))
        self.qkv = _aligned(((rotated + kv_heads) * head_dim,))
        self.pairs = self.qkv[: rotated * head_dim].reshape(rotated, 2, head_dim // 2)
        self.value = self.qkv[rotated * head_dim :].reshape(kv_heads, head_dim)
        self.rotated = _aligned((rotated, 2, head_dim // 2))
        self.rotated_heads = self.rotated.reshape(rotated, head_dim)
        self.query = self.rotated_heads[:heads].reshape(kv_heads, heads // kv_heads, head_dim)
        self.scores = _aligned((heads * shape.context,))
        self.attended = _aligned((heads * head_dim,))
        self.attended_heads = self.attended.reshape(kv_heads, heads // kv_heads, head_dim)
        self.gate_and_up = _aligned((2 * shape.ff_width,))
        self.inner = _aligned((shape.ff_width,))


class _Memory:
    """Keys and values of the last positions, (rungs, kv_heads, slots, head_dim); slot 0 is the oldest that is kept."""

    def __init__(self, shape: _Shape) -> None:
        self._shape = shape
        self._most = -(-(shape.context + MAX_ROLLBACK) // _BLOCK) * _BLOCK + _BLOCK
        self.length = 0
        self.keys = self._room(0)
        self.values = self._room(0)

    def _room(self, slots: int) -> NDArray[np.float32]:
        shape = self._shape
        return _aligned((shape.num_rungs, shape.num_kv_heads, slots, shape.head_dim))

    @property
    def seen(self) -> slice:
        """The slots that the newest position sees."""
        return slice(max(0, self.length - self._shape.context), self.length)

    @property
    def is_full(self) -> bool:
        """The next position will drop the oldest ones."""
        return self.length == self._most

    def append(self) -> int:
        """A slot for one more position."""
        slots = self.keys.shape[2]
        if self.length == slots:
            dropped = _BLOCK if self.is_full else 0
            grown = slots if self.is_full else slots + _BLOCK
            for name in ("keys", "values"):
                old, new = getattr(self, name), self._room(grown)
                new[:, :, : slots - dropped] = old[:, :, dropped:]
                setattr(self, name, new)
            self.length -= dropped
        self.length += 1
        return self.length - 1


class AttentionState:
    """What an attention network remembers of one sequence. Fits `SideState`."""

    def __init__(self, network: AttentionNetwork) -> None:
        self._network = network
        self._memory = _Memory(network._shape)
        self._first = 0  # the position that was read first
        self._next: int | None = None

    @property
    def next_position(self) -> int | None:
        """The position that comes next without a gap; None before the first."""
        return self._next

    @property
    def size_bytes(self) -> int:
        """Memory that it holds now."""
        return self._memory.keys.nbytes + self._memory.values.nbytes

    def read(self, position: int, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> None:
        """Remember a position without its correction; everything at or after it is forgotten first.

        Raises:
            InputError: a position was left out, what it needs is forgotten, or the taps have another shape.
        """
        self._advance(position, tap_codes, tap_scales, to_the_end=False)

    def correct(self, position: int, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> Correction:
        """As `read`, and the correction of that position."""
        exact = self._advance(position, tap_codes, tap_scales, to_the_end=True)
        assert exact is not None
        codes, scale = quantise(exact)
        return Correction(codes=codes, scale=np.float16(scale))

    def correct_exactly(
        self, position: int, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]
    ) -> NDArray[np.float32]:
        """As `correct`, float32 (basis_dim,), before quantisation."""
        exact = self._advance(position, tap_codes, tap_scales, to_the_end=True)
        assert exact is not None
        return exact

    def _advance(
        self, position: int, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16], *, to_the_end: bool
    ) -> NDArray[np.float32] | None:
        check_taps(tap_codes, tap_scales, self._network.num_taps, self._network.tap_dim)
        self._go_to(position)
        self._next = position + 1
        taps = dequantise(tap_codes, tap_scales)
        return self._network.remember(self._memory, position, taps, to_the_end=to_the_end)

    def _go_to(self, position: int) -> None:
        """Forget everything at or after `position`."""
        if position < 1:
            raise InputError(f"position is {position}, expected at least 1: position t predicts token t")
        if self._next is not None and position > self._next:
            raise InputError(
                f"position is {position}, expected at most {self._next}: this side network reads every position; "
                "read those between first"
            )
        if self._next is None or position <= self._first:
            self._first = position
            self._memory.length = 0
            return
        oldest = self._next - self._memory.length
        if oldest > self._first and position < oldest + self._network.context - 1:
            raise InputError(
                f"position is {position}, expected at least {oldest + self._network.context - 1}: what it needs is "
                f"forgotten; read again from position {self._first} on"
            )
        self._memory.length = position - oldest


def _read_rung(shape: _Shape, tensors: Tensors, i: int) -> _Rung:
    attention_norm, ff_norm = tensors["ladder.attention_norm"][i], tensors["ladder.ff_norm"][i]
    query = tensors["ladder.query_weight"][i] / np.float32(math.sqrt(shape.head_dim))
    qkv = np.concatenate([query, tensors["ladder.key_weight"][i], tensors["ladder.value_weight"][i]])
    gate_and_up = np.concatenate([tensors["ladder.gate_weight"][i], tensors["ladder.up_weight"][i]])
    keep = 1 / (1 + math.exp(-float(tensors["ladder.mix_gate"][i]) / _MIX_TEMPERATURE))
    return _Rung(
        keep=np.float32(keep),
        take=np.float32(1 - keep),
        qkv=_aligned_copy(qkv * attention_norm),
        output=_aligned_copy(tensors["ladder.output_weight"][i]),
        gate_and_up=_aligned_copy(gate_and_up * ff_norm),
        down=_aligned_copy(tensors["ladder.down_weight"][i]),
    )


def _inverse_rms(h: NDArray[np.float32]) -> np.float32:
    inverse: np.float32 = 1 / np.sqrt(np.dot(h, h) / np.float32(len(h)) + _RMS_EPS)
    return inverse


def _aligned(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Zeros that begin at a memory line: kernels may round differently elsewhere."""
    num = math.prod(shape)
    room = np.zeros(num + _MEMORY_LINE // 4, np.float32)
    start = -room.ctypes.data % _MEMORY_LINE // 4
    return room[start : start + num].reshape(shape)


def _aligned_copy(array: NDArray[np.float32]) -> NDArray[np.float32]:
    copy = _aligned(array.shape)
    copy[...] = array
    return copy
