"""FFA-LoRA (Sun et al., ICLR 2024, arXiv 2403.12313): A is frozen at its start, devices train B alone.

    B <- B + sum_c p_c dB_c

Symbols: as in `cotune.federation.fedit`. Exact, as `cotune.federation.rolora` says, and noise for privacy stays
linear. All depends on A: orthonormal rows bound the gradient of B, and directions of the devices' own activations (EVA)
do best.

Wire: r m numbers up and down; A goes down once. Memory on the device: that of LoRA with B's optimiser state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cotune.federation.algorithm import Combine, Plan, Update, mean_of
from cotune.federation.arrays import Arrays
from cotune.federation.descend import names_like, shapes_like, steps_as_settings
from cotune.federation.local_model import LocalSteps

TRAINED = "*lora_B*"


@dataclass(frozen=True, kw_only=True)
class FfaLora:
    """The server half; `cotune.federation.descend` is the device's."""

    steps: LocalSteps = field(default_factory=LocalSteps)
    """Of each device in each round."""

    def start(self, adapter: Arrays) -> Arrays:
        names_like(adapter, TRAINED)
        return dict(adapter)

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        lacks = state if since is None else {name: state[name] for name in names_like(state, TRAINED)}
        settings = steps_as_settings(self.steps) | {"trained": TRAINED}
        return Plan(work="descend", arrays=lacks, settings=settings, reply=shapes_like(state, TRAINED))

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        change = mean_of(updates, combine, names_like(state, TRAINED))
        return {name: array + change[name] if name in change else array for name, array in state.items()}

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return dict(state)
