"""EVA as the start of a federation: A from the inputs of each adapted layer, which devices sketch and the server sums.

EVA (Paischer et al., arXiv 2410.07170); the statistics and their formulas are in
`cotune.federation.activation_statistics`:

    round 1:              Y = sum_c X_c^T X_c Omega / t_c        Omega of random signs, the same on all devices
    round 2, if wanted:   the same with an orthonormal basis of Y in the place of Omega
    A = the top right singular vectors of all inputs, B = 0

Symbols: X_c (t_c, in), a layer's inputs on device c without an adapter, for as many tokens as its batches have; each
device counts the same, however many tokens it has.

Wire for each layer: 4 in (rank + oversampling) bytes up; nothing down in round 1, and as much as up in round 2. Memory
on the device: that of inference, and as many bytes twice (float64) as it sends.

A sketch tells more of the texts than a trained adapter does, the more so the fewer tokens it is of. Sum in secret, or
over many tokens. EVA is not repeated later: B A would have to be written in other rows, too few to hold it, and logits
would change; `cotune.federation.update_svd` moves A without doing so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.activation_statistics import (
    DEFAULT_OVERSAMPLING,
    directions_from_sketch,
    next_omega,
    shared_omega,
)
from cotune.federation.algorithm import Done, Job, Plan
from cotune.federation.arrays import Arrays, Shapes
from cotune.federation.catch_up import prefixed, under
from cotune.federation.lora_factors import layer_names
from cotune.federation.number_ranges import check_at_least

SKETCH, OMEGA = "sketch/", "omega/"


@dataclass(frozen=True, kw_only=True)
class EvaStart:
    """A `StartMethod`; `send_sketches` is the device's half.

    Example:
        >>> StartFirst(inner=FfaLora(), method=EvaStart())  # doctest: +SKIP
    """

    num_rounds: int = 1
    """1, or 2 for a sharper sketch where the inputs have many strong directions."""
    oversampling: int = DEFAULT_OVERSAMPLING
    """Columns of a sketch beyond the rank."""
    num_batches: int = 4
    """Of texts, on each device."""
    batch_size: int = 8
    """Texts in one."""
    seed: int = 0
    """Of Omega."""

    def __post_init__(self) -> None:
        if self.num_rounds not in (1, 2):
            raise InputError(f"num_rounds is {self.num_rounds}, expected 1 or 2")
        check_at_least(0, oversampling=self.oversampling)
        check_at_least(1, num_batches=self.num_batches, batch_size=self.batch_size)

    def plan(self, adapter: Arrays, total: Arrays) -> Plan:
        omegas = self._omegas(adapter, total)
        return Plan(
            work="sketch",
            arrays=prefixed(OMEGA, omegas) if total else {},
            settings={
                "oversampling": self.oversampling,
                "num_batches": self.num_batches,
                "batch_size": self.batch_size,
                "omega_seed": self.seed,
            },
            reply={SKETCH + name: omega.shape for name, omega in omegas.items()},
        )

    def rows(self, adapter: Arrays, last: Arrays, total: Arrays) -> dict[str, NDArray[np.float32]]:
        sketches = under(SKETCH, total)
        return {
            name: directions_from_sketch(sketches[name], omega, adapter[name].shape[0])
            for name, omega in self._omegas(adapter, last).items()
        }

    def _omegas(self, adapter: Arrays, total: Arrays) -> dict[str, NDArray[np.float32]]:
        """What devices take for Omega, by the name of A."""
        if total:
            return {name: next_omega(one) for name, one in under(SKETCH, total).items()}
        return random_omegas({n: array.shape for n, array in adapter.items()}, self.oversampling, self.seed)


def random_omegas(shapes: Shapes, oversampling: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Signs (in, rank + oversampling) for each A, the same on all machines.

    Where a layer has no more inputs than that, the identity: the sketch is then the whole X^T X.

    Example:
        >>> random_omegas({"q.lora_A.weight": (2, 4), "q.lora_B.weight": (5, 2)}, 1, 0)["q.lora_A.weight"].shape
        (4, 3)
    """
    found = {}
    for index, names in enumerate(layer_names(sorted(shapes)).values()):
        rank, dim = shapes[names.a]
        width = rank + oversampling
        found[names.a] = shared_omega(dim, width, seed=seed + index) if width < dim else np.eye(dim, dtype=np.float32)
    return found


def send_sketches(job: Job) -> Done:
    """The device's half: run over own texts without an adapter, and send what the layers see."""
    settings = job.settings
    omegas: Arrays = under(OMEGA, job.arrays) or random_omegas(
        job.model.adapter_shapes, int(settings["oversampling"]), int(settings["omega_seed"])
    )
    sketches = job.model.activation_sketches(
        omegas,
        num_batches=int(settings["num_batches"]),
        batch_size=int(settings["batch_size"]),
        seed=job.batch_seed,
    )
    return Done(arrays=prefixed(SKETCH, sketches), loss=float("nan"))
