"""Products of LoRA factors merged by any rule, for devices of mixed ranks: all of them in one common basis.

A rule combines vectors of one length, and the factors of two ranks have two. Their products B A have one size, but are
dense. So the columns of all B and the rows of all A are given orthonormal bases, and each device's change becomes the
matrix of its coordinates:

    [B, B_1, ..., B_n] = Q_b (...),    [A; A_1; ...; A_n]^T = Q_a (...),    M_c = Q_b^T (change of device c) Q_a
    merged = B A + Q_b combine(M_1, ..., M_n) Q_a^T

and the SVD of the sum gives the best adapter of a rank, as `cotune.federation.svd_factors` describes.

Symbols: A, B the server's factors before the round; A_c, B_c those that the change of device c is made of. Scales are
left out: all adapters of a federation have the same one.

What it means for rules. Q_b and Q_a are orthonormal and hold all changes, so lengths and distances are those of the
dense matrices, and the mean, clipping, Multi-Krum and Bulyan's choice give exactly what they would give there. The
median and the trimmed mean work coordinate by coordinate, and so depend on the basis: each coordinate of the result
lies within those of the honest devices, in this basis. Where the bases reach a whole side, the unit vectors are taken,
and the coordinates on that side are the weights' own. All layers are one vector, so distances see all of them.

Time of the server: (in + out) K^2 for each layer, K = rank + sum of the changes' ranks. Memory: n k_b k_a numbers for
each layer with k_b = min(out, K) and k_a = min(in, K), which for many devices are the n dense changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.federation.algorithm import Combine
from cotune.federation.lora_factors import Layers, LoraFactors, as_float32
from cotune.federation.svd_factors import SvdMerge, balanced_factors

VANISHED = 1e-6
"""Singular values below this share of the largest are rounding: rules work in float32."""
Svd = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""U, S and V^T."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """b a, a change of a layer.

    Attributes:
        a: float64 (k, in).
        b: float64 (out, k).
    """

    a: NDArray[np.float64]
    b: NDArray[np.float64]


def product_of(factors: LoraFactors) -> LowRank:
    """The product of an adapter's factors, without its scale."""
    return LowRank(factors.a.astype(np.float64), factors.b.astype(np.float64))


def product_change(after: LoraFactors, before: LoraFactors) -> LowRank:
    """B' A' - B A, of any two ranks, as one product.

    Example:
        >>> one = LoraFactors(np.ones((1, 2), np.float32), np.ones((1, 1), np.float32))
        >>> change = product_change(LoraFactors(3 * one.a, one.b), one)
        >>> (change.b @ change.a).tolist()
        [[2.0, 2.0]]
    """
    new, old = product_of(after), product_of(before)
    return LowRank(np.concatenate([new.a, old.a]), np.concatenate([new.b, -old.b], axis=1))


def merge_products(
    before: Layers,
    changes: Sequence[Mapping[str, LowRank]],
    weights: NDArray[np.float64],
    combine: Combine,
) -> SvdMerge:
    """The best adapter, of the rank that each layer has, for what was there and the combined changes.

    Args:
        before: the server's factors, whose scales are left out.
        changes: one for each device, of the same layers; ranks may differ.
        weights: one for each device.
        combine: the rule.

    Raises:
        InputError: the rule refuses, such as for too few replies.

    Example:
        >>> old = {"q": LoraFactors(np.zeros((1, 2), np.float32), np.zeros((2, 1), np.float32))}
        >>> strong = {"q": LowRank(np.array([[1.0, 0.0]]), np.array([[6.0], [0.0]]))}
        >>> weak = {"q": LowRank(np.array([[0.0, 1.0]]), np.array([[0.0], [2.0]]))}
        >>> merged = merge_products(old, [strong, weak], np.ones(2), lambda updates, weights: updates.mean(0))
        >>> merged.layers["q"].product().round(5).tolist(), round(merged.discarded_energy, 5)
        ([[3.0, 0.0], [0.0, 0.0]], 0.1)
    """
    products = combined_products(before, changes, weights, combine)
    layers, energies, discarded = {}, {}, {}
    for layer, (u, s, vt) in products.items():
        rank = before[layer].rank
        energies[layer] = float(np.square(s).sum())
        discarded[layer] = float(np.square(s[rank:]).sum()) / energies[layer] if energies[layer] > 0 else 0.0
        layers[layer] = balanced_factors(u, s, vt, rank, 1.0, vanished=VANISHED)
    return SvdMerge(layers=layers, layer_energies=energies, discarded_energies=discarded)


def combined_products(
    before: Layers,
    changes: Sequence[Mapping[str, LowRank]],
    weights: NDArray[np.float64],
    combine: Combine,
) -> dict[str, Svd]:
    """What was there and the combined changes, whole: the decomposition of each layer.

    Args, errors: as for `merge_products`.

    Returns:
        By layer U (out, k), S (k,) falling and V^T (k, in), the same for any order of the devices.
    """
    bases = {layer: _bases(product_of(own), [change[layer] for change in changes]) for layer, own in before.items()}
    rows = np.stack([_coordinates(bases, change) for change in changes])
    combined = combine(rows, weights)
    products, start = {}, 0
    for layer, (q_b, q_a) in bases.items():
        own = product_of(before[layer])
        shape = (q_b.shape[1], q_a.shape[1])
        size = shape[0] * shape[1]
        core = (q_b.T @ own.b) @ (own.a @ q_a) + combined[start : start + size].astype(np.float64).reshape(shape)
        start += size
        u, s, vt = np.linalg.svd(core, full_matrices=False)
        u, vt = q_b @ u, vt @ q_a.T
        # A decomposition is one up to signs; these make it the same for any order of devices.
        signs = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(axis=1)])
        products[layer] = (u * signs, s, vt * signs[:, None])
    return products


def left_out(product: Svd, rank: int, *, most: int | None = None) -> LoraFactors | None:
    """What the best adapter of a rank leaves out of a layer, strongest direction first; None if that is rounding.

    Args:
        product: from `combined_products`.
        rank: of the adapter.
        most: directions at most.

    Example:
        >>> rest = left_out((np.eye(2), np.array([4.0, 1.0]), np.eye(2)), 1)
        >>> rest.product().tolist()
        [[0.0, 0.0], [0.0, 1.0]]
    """
    u, s, vt = product
    num_found = int((s > VANISHED * s[0]).sum()) if len(s) and s[0] > 0 else 0
    end = num_found if most is None else min(num_found, rank + most)
    if end <= rank:
        return None
    half = np.sqrt(s[rank:end])
    return LoraFactors(as_float32(half[:, None] * vt[rank:end]), as_float32(u[:, rank:end] * half), 1.0)


def _coordinates(
    bases: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], change: Mapping[str, LowRank]
) -> NDArray[np.float32]:
    """M_c of all layers, one after another, float32 (d,)."""
    found = [((q_b.T @ change[layer].b) @ (change[layer].a @ q_a)).reshape(-1) for layer, (q_b, q_a) in bases.items()]
    return np.concatenate(found).astype(np.float32)


def _bases(own: LowRank, changes: Sequence[LowRank]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Q_b (out, k_b) and Q_a (in, k_a)."""
    columns = np.concatenate([own.b, *(change.b for change in changes)], axis=1)
    rows = np.concatenate([own.a, *(change.a for change in changes)])
    return _orthonormal(columns), _orthonormal(rows.T)


def _orthonormal(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal columns that reach all of these."""
    if columns.shape[1] >= columns.shape[0]:
        return np.eye(columns.shape[0])
    q, _ = np.linalg.qr(columns)
    return np.asarray(q, np.float64)
