"""FlexLoRA: the best adapter of one rank for the mean of the updates, for devices of mixed ranks.

FlexLoRA (Bai et al., arXiv 2402.11505): W = sum_c p_c s_c B_c A_c = U S V^T, and its first r singular triples are the
adapter. W (out, in) is never built. As in FLoRIST, the decomposition runs in the space of the stacked factors:

    B = [p_c s_c B_c] = Q_b R_b,    A^T = [A_c^T] = Q_a R_a,    R_b R_a^T = u S v^T,    U = Q_b u,    V = Q_a v

Symbols: R = sum_c r_c, so that R_b R_a^T is at most (R, R); s the scale of the result, which is split evenly:

    B' = U_r (S_r / s)^(1/2),    A' = (S_r / s)^(1/2) V_r^T

By Eckart and Young no adapter of rank r is nearer to W in the Frobenius norm. What is lost of its square is
`discarded_energy`. Directions that W lacks have B' = 0 and an A' of unit rows, so that they can still learn; with both
at zero they never would.

Bytes in float32 for each layer: 4 r_c (in + out) up, 4 r (in + out) down. Time: (in + out) R^2 + R^3. Memory of the
server: all adapters, twice in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.lora_factors import Layers, LoraFactors, as_float32, matching_layers, normalised_weights
from cotune.federation.number_ranges import check_positive
from cotune.federation.orthonormal_rows import further_rows
from cotune.federation.stack_factors import stacked_pair

_VANISHED = 1e-12
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SvdMerge:
    """An adapter and what it leaves out.

    Attributes:
        layers: the factors, by layer, strongest direction first.
        layer_energies: by layer, the squared Frobenius norm of the mean of the updates.
        discarded_energies: by layer, the share of it that is lost, 0 to 1.
    """

    layers: dict[str, LoraFactors]
    layer_energies: dict[str, float]
    discarded_energies: dict[str, float]

    @property
    def discarded_energy(self) -> float:
        """The share of the squared Frobenius norm of all layers together that is lost."""
        whole = sum(self.layer_energies.values())
        lost = sum(self.discarded_energies[layer] * energy for layer, energy in self.layer_energies.items())
        return lost / whole if whole > 0 else 0.0


def svd_factors(
    adapters: Sequence[Layers],
    weights: NDArray[np.float64] | Sequence[float],
    *,
    rank: int | None = None,
    scale: float = 1.0,
) -> SvdMerge:
    """The best adapter of a rank.

    Args:
        adapters: one for each device, of the same layers; ranks and scales may differ.
        weights: one for each device, at least 0, in any unit.
        rank: of the result in each layer; None takes the largest rank of the devices in that layer. `cut_rank` gives
            smaller devices theirs.
        scale: s of the result.

    Raises:
        InputError: adapters or weights do not match, or the rank or the scale is out of range.

    Example:
        >>> strong = LoraFactors(np.array([[1.0, 0.0]], np.float32), np.array([[6.0], [0.0]], np.float32))
        >>> weak = LoraFactors(np.array([[0.0, 1.0]], np.float32), np.array([[0.0], [2.0]], np.float32))
        >>> merge = svd_factors([{"q": strong}, {"q": weak}], [1, 1], rank=1)
        >>> merge.layers["q"].product().round(5).tolist(), round(merge.discarded_energy, 5)
        ([[3.0, 0.0], [0.0, 0.0]], 0.1)
    """
    names = matching_layers(adapters)
    shares = normalised_weights(weights, len(adapters))
    check_positive(scale=scale)
    layers, energies, discarded = {}, {}, {}
    for layer in names:
        own = [adapter[layer] for adapter in adapters]
        wanted = max(factors.rank for factors in own) if rank is None else rank
        width = own[0].a.shape[1]
        if not 1 <= wanted <= width:
            raise InputError(f"rank is {wanted} for layer '{layer}', expected 1 to {width}, the size of its input")
        u, s, vt = thin_svd(*stacked_pair(own, shares))
        energies[layer] = float(np.square(s).sum())
        discarded[layer] = float(np.square(s[wanted:]).sum()) / energies[layer] if energies[layer] > 0 else 0.0
        layers[layer] = balanced_factors(u, s, vt, wanted, scale)
    return SvdMerge(layers=layers, layer_energies=energies, discarded_energies=discarded)


def cut_rank(factors: LoraFactors, rank: int, *, scale: float) -> LoraFactors:
    """The first `rank` directions of a layer from `svd_factors`, for a device of less memory: the best of that rank.

    Args:
        factors: strongest direction first.
        rank: at most that of the factors.
        scale: of the device; it differs where alpha / rank does.

    Raises:
        InputError: rank or scale is out of range.

    Example:
        >>> layer = LoraFactors(np.eye(2, dtype=np.float32), np.diag([4, 1]).astype(np.float32), 1.0)
        >>> cut_rank(layer, 1, scale=4.0).product().tolist()
        [[4.0, 0.0], [0.0, 0.0]]
    """
    if not 1 <= rank <= factors.rank:
        raise InputError(f"rank is {rank}, expected 1 to {factors.rank}, the rank of the factors")
    check_positive(scale=scale)
    half = float(np.sqrt(factors.scale / scale))
    return LoraFactors(as_float32(half * factors.a[:rank]), as_float32(half * factors.b[:, :rank]), scale)


def thin_svd(
    a: NDArray[np.float64], b: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """U (out, k), S (k,), V^T (k, in) of b a, from a (R, in) and b (out, R), without building it; k <= R.

    Example:
        >>> u, s, vt = thin_svd(np.array([[3.0, 4.0]]), np.array([[2.0], [0.0], [0.0]]))
        >>> s.tolist(), np.abs(vt).round(3).tolist()
        ([10.0], [[0.6, 0.8]])
    """
    q_b, r_b = np.linalg.qr(b)  # (out, min(out, R)), (min(out, R), R)
    q_a, r_a = np.linalg.qr(a.T)  # (in, min(in, R)), (min(in, R), R)
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T


def balanced_factors(
    u: NDArray[np.float64],
    s: NDArray[np.float64],
    vt: NDArray[np.float64],
    rank: int,
    scale: float,
    *,
    vanished: float = _VANISHED,
) -> LoraFactors:
    """A' and B' of a rank from a decomposition, with unit rows and zero columns where there is no direction.

    Args:
        u, s, vt: (out, k), (k,) falling, (k, in).
        rank: of the result, at most in.
        scale: s of the result.
        vanished: singular values below this share of the largest are rounding.

    Example:
        >>> one = balanced_factors(np.eye(2), np.array([4.0, 0.0]), np.eye(2), 2, 1.0)
        >>> one.a.tolist(), one.b.tolist()
        ([[2.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]])
    """
    num_found = min(rank, int((s > vanished * s[0]).sum()) if s[0] > 0 else 0)
    half = np.sqrt(s[:num_found] / scale)
    a = np.concatenate([half[:, None] * vt[:num_found], further_rows(vt[:num_found], rank - num_found)])
    b = np.zeros((u.shape[0], rank))
    b[:, :num_found] = u[:, :num_found] * half
    return LoraFactors(as_float32(a), as_float32(b), scale)
