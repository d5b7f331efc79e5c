"""FlexLoRA (Bai et al., arXiv 2402.11505): each device at the rank that it can hold, merged by SVD of the products.

    server:    B A of rank R, strongest direction first; device c gets the first r_c directions, its best truncation
    device:    trains them, and sends what has changed in its r_c rows of A and columns of B
    server:    W = B A + combine_c(B_c A_c - B A), which with the mean is the paper's sum_c p_c B_c A_c
               B' A' = the best adapter of rank R for W

Symbols: A_c, B_c what device c has after its steps; p_c its weight. A device's rank is in the table `ranks`, by its
name or by a pattern of names, so that a class of devices of one memory needs one line; all others have R. What of W is
lost is `discarded_energy` in every round's record: the share of its squared Frobenius norm, of all layers together.

As published, a device of low rank says nothing of the directions that it did not get, and the mean counts that as zero:
where many devices are small, what only large ones hold decays. The rule sees products in a common basis, see
`cotune.federation.product_merge`, so any rule works with mixed ranks.

Wire: r_c (m + n) numbers up and down for each layer (m, n). Memory on the device: what `LocalModel` holds is LoRA of
rank R, of which R - r_c directions are zero; a trainer whose adapter has rank r_c holds that of rank r_c.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cotune.federation.algorithm import SHOWN, Combine, Done, Job, Plan, Update
from cotune.federation.arrays import Arrays, add, difference, shapes_of
from cotune.federation.descend import steps_as_settings, steps_of
from cotune.federation.device_table import check_table, of_device
from cotune.federation.local_model import LocalSteps
from cotune.federation.lora_factors import join_layers, layer_names, split_layers
from cotune.federation.mixed_ranks import check_adapter, filled_up, first_directions, rank_in
from cotune.federation.product_merge import merge_products, product_change
from cotune.federation.svd_factors import SvdMerge, svd_factors

ENERGY = SHOWN + "discarded_energy"


@dataclass(frozen=True, kw_only=True)
class FlexLora:
    """The server half; `descend_truncated` is the device's.

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
        names = layer_names(sorted(adapter))
        if not any(adapter[one.b].any() for one in names.values()):
            return dict(adapter) | {ENERGY: np.zeros(1, np.float32)}
        # Tuned before: only of a decomposition are the first directions the best.
        return with_energy(svd_factors([split_layers(adapter, 1.0)], [1.0]), adapter)

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        adapter = self.adapter(state)
        own = first_directions(adapter, of_device(self.ranks, device))
        settings = steps_as_settings(self.steps) | {"rank": rank_in(adapter)}
        return Plan(work="flexlora", arrays=own, settings=settings, reply=shapes_of(own))

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        adapter = self.adapter(state)
        before = split_layers(adapter, 1.0)
        changes = []
        for one in updates:
            sent = first_directions(adapter, rank_in(one.arrays))
            after = split_layers(add(sent, one.arrays), 1.0)
            changes.append({layer: product_change(after[layer], before[layer]) for layer in before})
        weights = np.array([one.weight for one in updates], np.float64)
        return with_energy(merge_products(before, changes, weights, combine), adapter)

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return {name: array for name, array in state.items() if name != ENERGY}


def with_energy(merged: SvdMerge, like: Arrays) -> dict[str, NDArray[np.float32]]:
    """The merged adapter as a state, with the share of the energy that it leaves out."""
    arrays = join_layers(merged.layers, layer_names(sorted(like)))
    return arrays | {ENERGY: np.array([merged.discarded_energy], np.float32)}


def descend_truncated(job: Job) -> Done:
    """The device's half: fill up to the model's rank, train, and send what has changed in its own directions."""
    # What a device was sent in an earlier round is replaced as a whole.
    own, rank = dict(job.arrays), rank_in(job.arrays)
    whole = filled_up(own, int(job.settings["rank"]))
    trained = job.model.descend(whole, sorted(whole), steps_of(job.settings), seed=job.batch_seed)
    return Done(arrays=difference(first_directions(trained.arrays, rank), own), loss=trained.loss)
