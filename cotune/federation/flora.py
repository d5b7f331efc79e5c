"""FLoRA (Wang et al., arXiv 2409.05976): fresh adapters in every round, stacked, so that the mean is exact.

    device:    W + B A in the frozen weights; a fresh adapter of rank r_c beside them, A_c of orthonormal rows, B_c = 0;
               trains it, and sends A_c and B_c whole
    server:    change = combine_c(B_c A_c), which with the mean is the paper's stack, [p_c B_c] [A_c], exactly
               B' A' = the best adapter of rank R for B A + change

Symbols: B, A what was learnt in all earlier rounds, at the adapter's rank R; p_c the weight of device c. A device's
rank is in the table `ranks`, by its name or by a pattern of names; all others have R. `cotune.federation.product_merge`
says how robust rules see changes of mixed ranks.

What differs from the paper: there each stack is merged into the weights of all devices for good, so that what was
learnt may have any rank, devices that were away need every stack since, and the result is a whole model. Here what was
learnt is one adapter of rank R, so that it can be judged, sent in one piece to whoever was away, and saved. Up to rank
R nothing is lost; beyond it `discarded_energy` in every round's record is the share of its squared Frobenius norm that
the round cut off. Take an adapter of large rank and give devices small ones to lose little. A's rows begin orthonormal
instead of Gaussian.

Wire: r_c (m + n) numbers up for each layer (m, n), R (m + n) down; the paper's stack is sum_c r_c (m + n) down. Memory
on the device: that of LoRA, and the adapted layers' weights once more while they hold W + B A, so that W comes back bit
for bit. Needs whole weights: those of 4 or 8 bits take no sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cotune.federation.algorithm import Combine, Done, Job, Plan, Update
from cotune.federation.arrays import Arrays, shapes_of
from cotune.federation.descend import steps_as_settings, steps_of
from cotune.federation.device_table import check_table, of_device
from cotune.federation.flexlora import ENERGY, with_energy
from cotune.federation.local_model import LocalSteps
from cotune.federation.lora_factors import layer_names, split_layers
from cotune.federation.mixed_ranks import check_adapter, filled_up, first_directions, rank_in
from cotune.federation.orthonormal_rows import orthonormal_rows
from cotune.federation.product_merge import merge_products, product_of

MAX_LAYERS = 4096
"""Layers of an adapter whose seeds differ."""


@dataclass(frozen=True, kw_only=True)
class Flora:
    """The server half; `descend_afresh` is the device's.

    The state is the adapter, and `shown/discarded_energy` (1,) of the last round.
    """

    steps: LocalSteps = field(default_factory=LocalSteps)
    """Of each device in each round."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Rank by device name or pattern, such as `phone-*`; all others have the adapter's."""

    def __post_init__(self) -> None:
        check_table(self.ranks, "ranks", at_least=1)

    def start(self, adapter: Arrays) -> Arrays:
        check_adapter(adapter, self.ranks)
        return dict(adapter) | {ENERGY: np.zeros(1, np.float32)}

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        adapter = self.adapter(state)
        own = first_directions(adapter, of_device(self.ranks, device))
        settings = steps_as_settings(self.steps) | {"rank": rank_in(own)}
        return Plan(work="flora", arrays=adapter, settings=settings, reply=shapes_of(own))

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        adapter = self.adapter(state)
        adapters = [split_layers(one.arrays, 1.0) for one in updates]
        changes = [{layer: product_of(own) for layer, own in one.items()} for one in adapters]
        weights = np.array([one.weight for one in updates], np.float64)
        return with_energy(merge_products(split_layers(adapter, 1.0), changes, weights, combine), adapter)

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return {name: array for name, array in state.items() if name != ENERGY}


def fresh_adapter(like: Arrays, rank: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Orthonormal rows of A and a B of zeros, of that rank.

    Example:
        >>> like = {"q.lora_A.weight": np.zeros((2, 3), np.float32), "q.lora_B.weight": np.zeros((4, 2), np.float32)}
        >>> {name: array.shape for name, array in fresh_adapter(like, 1, seed=0).items()}
        {'q.lora_A.weight': (1, 3), 'q.lora_B.weight': (4, 1)}
    """
    found: dict[str, NDArray[np.float32]] = {}
    for index, names in enumerate(layer_names(sorted(like)).values()):
        found[names.a] = orthonormal_rows(rank, like[names.a].shape[1], seed * MAX_LAYERS + index)
        found[names.b] = np.zeros((like[names.b].shape[0], rank), np.float32)
    return found


def descend_afresh(job: Job) -> Done:
    """The device's half: what was learnt goes into the frozen weights, and a fresh adapter is trained beside it."""
    rank = int(job.settings["rank"])
    # The seed differs from device to device and from round to round, so that the stack reaches many directions.
    fresh = filled_up(fresh_adapter(job.arrays, rank, job.batch_seed), rank_in(job.arrays))
    with job.model.folded(job.arrays):
        trained = job.model.descend(fresh, sorted(fresh), steps_of(job.settings), seed=job.batch_seed)
    return Done(arrays=first_directions(trained.arrays, rank), loss=trained.loss)
