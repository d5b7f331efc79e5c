"""LoRA-GA's A for a federation: the row space of the whole gradient, which devices sketch and the server sums.

LoRA-GA (Wang et al., arXiv 2407.05000) starts A and B with singular vectors of the first gradient G = dL/dW of each
adapted weight, and takes B A out of the weight again. A base that all devices share, and that stays as it is, allows
the half of it that changes no logit: A of G's strongest right directions, B = 0.

    device c:  A = 0 and B = Psi, so B A = 0;  dL/dA = s Psi^T G_c
    server:    A = the right singular vectors of sum_c Psi^T G_c, (rank, in)

Symbols: Psi (out, rank) of random signs, the same on all devices; s LoRA's scale, which turns nothing. This is the
randomised range finder of Halko, Martinsson and Tropp (arXiv 0909.4061) without oversampling. With such an A the first
step of B moves the weight by -lr s^2 G A^T A, the best that this rank can do with the directions that were found.

Wire for each layer: 4 rank in bytes up, nothing down. Memory on the device: that of LoRA with A's gradient.

PiSSA's start, the singular vectors of W itself, is not here: with B = 0 it is no PiSSA, and with PiSSA's B the base
would have to move on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.federation.activation_statistics import shared_omega
from cotune.federation.algorithm import Done, Job, Plan
from cotune.federation.arrays import Arrays, Shapes
from cotune.federation.catch_up import prefixed, under
from cotune.federation.lora_factors import layer_names
from cotune.federation.number_ranges import check_at_least
from cotune.federation.orthonormal_rows import check_rank, further_rows

GRADIENT = "gradient/"
_VANISHED = 1e-6
"""Singular values below this share of the largest are rounding of float32."""


@dataclass(frozen=True, kw_only=True)
class GradientStart:
    """A `StartMethod`; `send_gradient_sketches` is the device's half."""

    num_batches: int = 4
    """Of texts, on each device."""
    batch_size: int = 8
    """Texts in one."""
    seed: int = 0
    """Of Psi."""

    def __post_init__(self) -> None:
        check_at_least(1, num_batches=self.num_batches, batch_size=self.batch_size)

    @property
    def num_rounds(self) -> int:
        return 1

    def plan(self, adapter: Arrays, total: Arrays) -> Plan:
        names = [one.a for one in layer_names(sorted(adapter)).values()]
        return Plan(
            work="gradient_sketch",
            arrays={},
            settings={"num_batches": self.num_batches, "batch_size": self.batch_size, "psi_seed": self.seed},
            reply={GRADIENT + name: adapter[name].shape for name in names},
        )

    def rows(self, adapter: Arrays, last: Arrays, total: Arrays) -> dict[str, NDArray[np.float32]]:
        return {name: right_rows(one) for name, one in under(GRADIENT, total).items()}


def right_rows(sketch: NDArray[np.float32]) -> NDArray[np.float32]:
    """Orthonormal rows that span those of a matrix, strongest first; where it has fewer directions, any others.

    Args:
        sketch: (rank, in).

    Raises:
        InputError: the rank is larger than in.

    Example:
        >>> np.abs(right_rows(np.array([[0, 3, 0], [0, 0, 0]], np.float32))).tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    rank, dim = sketch.shape
    check_rank(rank, dim)
    _, s, vt = np.linalg.svd(sketch.astype(np.float64), full_matrices=False)
    rows = vt[: int((s > _VANISHED * s[0]).sum())]
    return np.ascontiguousarray(np.concatenate([rows, further_rows(rows, rank - len(rows))]), np.float32)


def probing_adapter(shapes: Shapes, seed: int) -> dict[str, NDArray[np.float32]]:
    """A = 0 and B = Psi, which change no logit; Psi is [I 0] where a layer has no more outputs than the rank."""
    found = {}
    for index, names in enumerate(layer_names(sorted(shapes)).values()):
        (rank, dim), num_out = shapes[names.a], shapes[names.b][0]
        found[names.a] = np.zeros((rank, dim), np.float32)
        # With no more outputs than rank, G itself fits.
        found[names.b] = (
            shared_omega(num_out, rank, seed=seed + index)
            if rank < num_out
            else np.eye(num_out, rank, dtype=np.float32)
        )
    return found


def send_gradient_sketches(job: Job) -> Done:
    """The device's half: one gradient of A, at an adapter that changes nothing."""
    settings = job.settings
    params = probing_adapter(job.model.adapter_shapes, int(settings["psi_seed"]))
    names = [one.a for one in layer_names(sorted(params)).values()]
    gradients = job.model.gradient(
        params,
        names,
        num_batches=int(settings["num_batches"]),
        batch_size=int(settings["batch_size"]),
        seed=job.batch_seed,
    )
    return Done(arrays=prefixed(GRADIENT, gradients), loss=float("nan"))
