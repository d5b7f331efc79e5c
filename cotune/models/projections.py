"""The frozen matrices that every user of one backbone shares.

Down: the tap t_i = C_i rmsnorm(y_i) of the residual stream after layer i (y_0: the input of the first layer), with
C_i (tap_dim, hidden). Up: the output basis B (hidden, basis_dim), in which a device speaks (`OutputBasis`). Both
live on the cloud and hold nothing personal, so that users can be batched and a token's taps fit in one packet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cotune.errors import InputError
from cotune.generation.output_basis import OutputBasis

FILE_NAME = "projections.safetensors"
KINDS = ("random", "pca", "identity", "whole")
DEFAULT_TAP_DIM = 32
DEFAULT_BASIS_DIM = 96
RMS_EPS = 1e-6
_FORMAT_VERSION = "1"


class StateSource(Protocol):
    """What projections are fitted on; `Backbone` is one."""

    @property
    def tap_layers(self) -> tuple[int, ...]:
        """Which states `read_states` gives."""
        ...

    def read_states(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Raw states float32 (seq, taps, hidden) and final hidden states float32 (seq, hidden) of one sequence."""
        ...


@dataclass(frozen=True, kw_only=True)
class Projections:
    """Shared frozen projections of one backbone.

    Attributes:
        tap_layers: which states are tapped, ascending: 0 is the input of the first layer, i the output of layer i.
        taps: C, float32 (taps, tap_dim, hidden).
        basis: B, float32 (hidden, basis_dim).
        normalise: RMS-normalise the state before projecting it.
        kind: how they were made: `random`, `pca`, `identity` or `whole`.
        seed: of the random ones.
    """

    tap_layers: tuple[int, ...]
    taps: NDArray[np.float32]
    basis: NDArray[np.float32]
    normalise: bool = True
    kind: str
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"projections kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        layers = self.tap_layers
        if not layers or layers[0] < 0 or any(a >= b for a, b in itertools.pairwise(layers)):
            raise InputError(f"tap_layers is {layers}, expected ascending layer indices from 0 on")
        if self.taps.ndim != 3 or self.taps.dtype != np.float32 or len(self.taps) != len(layers):
            raise InputError(
                f"tap projections are {self.taps.dtype} {self.taps.shape}, "
                f"expected float32 ({len(layers)}, tap_dim, hidden)"
            )
        if self.basis.ndim != 2 or self.basis.dtype != np.float32 or len(self.basis) != self.hidden_size:
            raise InputError(
                f"the output basis is {self.basis.dtype} {self.basis.shape}, "
                f"expected float32 ({self.hidden_size}, basis_dim)"
            )

    @classmethod
    def random(
        cls,
        *,
        tap_layers: Iterable[int],
        hidden_size: int,
        tap_dim: int | None = None,
        basis_dim: int | None = None,
        seed: int = 0,
    ) -> Projections:
        """Random orthonormal directions, the same on every machine.

        Args:
            tap_layers: see `Projections`.
            hidden_size: width of the residual stream.
            tap_dim: at most `hidden_size`; min(32, hidden_size) by default.
            basis_dim: at most `hidden_size`; min(96, hidden_size) by default.
            seed: 0 <= seed < 2^32.

        Example:
            >>> p = Projections.random(tap_layers=(0, 1), hidden_size=48)
            >>> p.taps.shape, p.basis.shape
            ((2, 32, 48), (48, 48))
        """
        tap_layers = tuple(tap_layers)
        tap_dim = _dimension("tap_dim", tap_dim, DEFAULT_TAP_DIM, hidden_size)
        basis_dim = _dimension("basis_dim", basis_dim, DEFAULT_BASIS_DIM, hidden_size)
        # The legacy generator: NumPy promises that its stream never changes between versions.
        generator = np.random.RandomState(seed)
        taps = [_orthonormal(generator, hidden_size, tap_dim).T for _ in tap_layers]
        return cls(
            tap_layers=tap_layers,
            taps=np.ascontiguousarray(np.stack(taps)),
            basis=_orthonormal(generator, hidden_size, basis_dim),
            kind="random",
            seed=seed,
        )

    @classmethod
    def fit(
        cls,
        backbone: StateSource,
        sequences: Iterable[NDArray[np.int64]],
        *,
        tap_dim: int | None = None,
        basis_dim: int | None = None,
    ) -> Projections:
        """The leading principal directions of public text: no centring, eigenvectors of the second moment.

        C_i: of the RMS-normalised states of tap i, scaled by one number so that a tap's entries have mean square 1.
        B: of the final hidden states, orthonormal.

        Args:
            backbone: gives the states, at its own tapped layers.
            sequences: int64 (seq,) each; together at least as many positions as the hidden size, better 10 times.
            tap_dim, basis_dim: as for `random`.

        Raises:
            InputError: no sequences.
        """
        tap_moments: NDArray[np.float64] | None = None
        final_moment: NDArray[np.float64] | None = None
        num_positions = 0
        for input_ids in sequences:
            states, final = backbone.read_states(input_ids)
            wide = states.astype(np.float64)
            wide /= np.sqrt((wide * wide).mean(axis=-1, keepdims=True) + RMS_EPS)
            by_tap = wide.transpose(1, 0, 2)  # (taps, positions, hidden)
            tap_moment = by_tap.transpose(0, 2, 1) @ by_tap  # (taps, hidden, hidden)
            final_wide = final.astype(np.float64)
            moment = final_wide.T @ final_wide
            tap_moments = tap_moment if tap_moments is None else tap_moments + tap_moment
            final_moment = moment if final_moment is None else final_moment + moment
            num_positions += len(final)
        if tap_moments is None or final_moment is None:
            raise InputError("no sequences to fit projections on; give at least one")
        hidden_size = final_moment.shape[0]
        tap_dim = _dimension("tap_dim", tap_dim, DEFAULT_TAP_DIM, hidden_size)
        basis_dim = _dimension("basis_dim", basis_dim, DEFAULT_BASIS_DIM, hidden_size)
        taps = []
        for moment in tap_moments / num_positions:
            directions, energies = _leading_directions(moment, tap_dim)
            taps.append(directions.T / np.sqrt(max(energies.mean(), RMS_EPS)))
        basis, _ = _leading_directions(final_moment / num_positions, basis_dim)
        return cls(
            tap_layers=backbone.tap_layers,
            taps=np.stack(taps).astype(np.float32),
            basis=basis.astype(np.float32),
            kind="pca",
        )

    @classmethod
    def identity(cls, *, tap_layers: Iterable[int], hidden_size: int) -> Projections:
        """Raw states, not normalised, and the hidden space itself as output basis: what the exact SPA network reads."""
        tap_layers = tuple(tap_layers)
        eye = np.eye(hidden_size, dtype=np.float32)
        # A view: identity projections are never multiplied with, so they need no memory of their own.
        taps = np.broadcast_to(eye, (len(tap_layers), hidden_size, hidden_size))
        return cls(tap_layers=tap_layers, taps=taps, basis=eye, normalise=False, kind="identity")

    @classmethod
    def whole_states(cls, *, tap_layers: Iterable[int], basis: NDArray[np.float32]) -> Projections:
        """Normalised states as they are, for personal down-projections on the device, and a shared output basis.

        Differs from shared projections in nothing but that C_i is the identity, so that the two can be compared.

        Args:
            tap_layers: see `Projections`.
            basis: B, float32 (hidden, basis_dim), such as other projections'.
        """
        tap_layers, hidden_size = tuple(tap_layers), len(basis)
        taps = np.broadcast_to(np.eye(hidden_size, dtype=np.float32), (len(tap_layers), hidden_size, hidden_size))
        return cls(tap_layers=tap_layers, taps=taps, basis=basis, kind="whole")

    def keep_taps(self, indices: Sequence[int]) -> Projections:
        """The same without all other taps: a cloud with these sends fewer bytes for each token.

        Args:
            indices: of the taps that stay, ascending, counted from 0 among these projections' own.

        Raises:
            InputError: no index, an unknown one, or another order.
        """
        check_tap_indices(indices, self.num_taps)
        layers = tuple(self.tap_layers[i] for i in indices)
        if self.has_whole_states:
            taps = np.broadcast_to(self.taps[0], (len(indices), *self.taps.shape[1:]))
        else:
            taps = np.ascontiguousarray(self.taps[list(indices)])
        return dataclasses.replace(self, tap_layers=layers, taps=taps)

    @property
    def has_whole_states(self) -> bool:
        """Whether C is the identity, and never multiplied with or stored."""
        return self.kind in ("identity", "whole")

    @property
    def num_taps(self) -> int:
        return int(self.taps.shape[0])

    @property
    def tap_dim(self) -> int:
        return int(self.taps.shape[1])

    @property
    def hidden_size(self) -> int:
        return int(self.taps.shape[2])

    @property
    def basis_dim(self) -> int:
        return int(self.basis.shape[1])

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, of everything that changes a tap or a correction."""
        state = hashlib.sha256()
        state.update(repr((self.tap_layers, self.taps.shape, self.basis.shape, self.normalise)).encode())
        if self.has_whole_states:
            state.update(self.kind.encode())
        else:
            state.update(np.ascontiguousarray(self.taps, "<f4").tobytes())
        if self.kind != "identity":
            state.update(np.ascontiguousarray(self.basis, "<f4").tobytes())
        return state.hexdigest()

    def output_basis(self, lm_head_weight: NDArray[np.float32]) -> OutputBasis:
        """Q = W_lm B, quantised.

        Args:
            lm_head_weight: W_lm, float32 (vocab, hidden).
        """
        if lm_head_weight.shape[1:] != (self.hidden_size,):
            raise InputError(f"lm_head_weight has shape {lm_head_weight.shape}, expected (vocab, {self.hidden_size})")
        if self.kind == "identity":
            return OutputBasis.from_matrix(lm_head_weight)
        # In float64, so that another machine's BLAS gives the same codes, and by blocks for memory.
        basis = self.basis.astype(np.float64)
        blocks = [
            (lm_head_weight[i : i + 4096].astype(np.float64) @ basis).astype(np.float32)
            for i in range(0, len(lm_head_weight), 4096)
        ]
        return OutputBasis.from_matrix(np.concatenate(blocks))

    def save(self, path: Path | str) -> None:
        """Write a safetensors file; identity matrices are stored as their shape alone."""
        metadata = {
            "format_version": _FORMAT_VERSION,
            "kind": self.kind,
            "seed": str(self.seed),
            "normalise": str(int(self.normalise)),
        }
        tensors: dict[str, NDArray[np.generic]] = {"tap_layers": np.array(self.tap_layers, np.int64)}
        if self.kind == "identity":
            metadata["hidden_size"] = str(self.hidden_size)
        else:
            tensors["basis"] = np.ascontiguousarray(self.basis)
        if not self.has_whole_states:
            tensors["taps"] = np.ascontiguousarray(self.taps)
        save_file(tensors, Path(path), metadata=metadata)

    @classmethod
    def load(cls, path: Path | str) -> Projections:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or is no such file.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path} is no file, expected saved projections")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format_version") != _FORMAT_VERSION:
                    raise ValueError(f"format_version is {metadata.get('format_version')}, not {_FORMAT_VERSION}")
                tap_layers = tuple(int(i) for i in file.get_tensor("tap_layers"))
                if metadata["kind"] == "identity":
                    return cls.identity(tap_layers=tap_layers, hidden_size=int(metadata["hidden_size"]))
                if metadata["kind"] == "whole":
                    return cls.whole_states(tap_layers=tap_layers, basis=file.get_tensor("basis"))
                return cls(
                    tap_layers=tap_layers,
                    taps=file.get_tensor("taps"),
                    basis=file.get_tensor("basis"),
                    normalise=metadata["normalise"] == "1",
                    kind=metadata["kind"],
                    seed=int(metadata["seed"]),
                )
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path} holds no projections ({error}); write it with Projections.save") from error


def check_tap_indices(indices: Sequence[int], num_taps: int) -> None:
    """Refuse a choice of taps that is empty, unknown or not ascending."""
    is_ascending = all(a < b for a, b in itertools.pairwise(indices))
    if not indices or not is_ascending or indices[0] < 0 or indices[-1] >= num_taps:
        raise InputError(f"tap indices are {tuple(indices)}, expected ascending numbers from 0 to {num_taps - 1}")


def spread_taps(num_taps: int, count: int) -> tuple[int, ...]:
    """`count` of so many taps, evenly spread, the last among them.

    Example:
        >>> spread_taps(33, 8), spread_taps(7, 1)
        ((3, 7, 11, 15, 19, 23, 27, 32), (6,))
    """
    if not 1 <= count <= num_taps:
        raise InputError(f"count is {count}, expected 1 to {num_taps}, the number of taps")
    return tuple(num_taps * (i + 1) // count - 1 for i in range(count))


def _dimension(name: str, value: int | None, default: int, hidden_size: int) -> int:
    if value is None:
        return min(default, hidden_size)
    if not 1 <= value <= hidden_size:
        raise InputError(f"{name} is {value}, expected 1 to the hidden size, {hidden_size}")
    return value


def _orthonormal(generator: np.random.RandomState, rows: int, columns: int) -> NDArray[np.float32]:
    """Orthonormal columns, float32 (rows, columns), to the precision of float16."""
    q, r = np.linalg.qr(generator.standard_normal((rows, columns)))
    q *= np.sign(np.diagonal(r))
    # LAPACK differs between processors in the last bits of float64: rounding here makes the digest the same on all.
    rounded: NDArray[np.float32] = q.astype(np.float16).astype(np.float32)
    return rounded


def _leading_directions(moment: NDArray[np.float64], count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvectors (hidden, count) of the largest eigenvalues, largest first, and these eigenvalues."""
    values, vectors = np.linalg.eigh(moment)
    leading = vectors[:, ::-1][:, :count]
    largest = np.abs(leading).argmax(axis=0)
    signs = np.sign(leading[largest, np.arange(count)])
    return leading * signs, values[::-1][:count]
