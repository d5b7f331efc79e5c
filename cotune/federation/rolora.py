"""RoLoRA (Chen et al., arXiv 2502.01755): devices train LoRA's B in odd rounds and A in even ones.

    odd:   B <- B + sum_c p_c dB_c        even:  A <- A + sum_c p_c dA_c

Symbols: as in `cotune.federation.fedit`. With one factor the same on all devices, the mean of the products is the
product of the means, so nothing is lost: sum_c p_c (B + dB_c) A = (B + sum_c p_c dB_c) A.

Wire: r m or r n numbers up, and the factor of the round before down: half of FedIT's. A device that missed a round gets
both. Memory on the device: that of LoRA with one factor's optimiser state.
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

FACTORS = ("*lora_B*", "*lora_A*")


def factor_of(round_number: int) -> str:
    """The pattern of the factor that is trained in a round, counted from 1."""
    return FACTORS[(round_number - 1) % 2]


@dataclass(frozen=True, kw_only=True)
class RoLora:
    """The server half; `cotune.federation.descend` is the device's."""

    steps: LocalSteps = field(default_factory=LocalSteps)
    """Of each device in each round."""

    def start(self, adapter: Arrays) -> Arrays:
        for pattern in FACTORS:
            names_like(adapter, pattern)
        return dict(adapter)

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        trained = factor_of(round_number)
        is_new = since is None or since < round_number - 1
        lacks = list(state) if is_new else names_like(state, factor_of(round_number - 1))
        return Plan(
            work="descend",
            arrays={name: state[name] for name in lacks},
            settings=steps_as_settings(self.steps) | {"trained": trained},
            reply=shapes_like(state, trained),
        )

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        change = mean_of(updates, combine, names_like(state, factor_of(round_number)))
        return {name: array + change[name] if name in change else array for name, array in state.items()}

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return dict(state)
