"""The four ways to combine the base model's logits with the side network's (SPA, sections 3 and 4).

    integration   logits = z + delta                               every position consults the device
    spa           logits = z + sigma delta                         only where the gate sigma is 1
    separation    logits = (1 - sigma) z + sigma delta             only where the gate sigma is 1
    ladder        logits = delta                                   every position consults the device

z: base logits; delta: the side network's contribution through the output basis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Mode:
    """What the output is.

    Attributes:
        name: the word on the command line.
        is_gated: the gate decides which positions consult the device; otherwise all do.
        adds_base: a consulted position keeps the base logits and adds delta; otherwise delta replaces them.
        family: the training that fits: `parallel` (delta corrects z) or `serial` (delta stands alone).
    """

    name: str
    is_gated: bool
    adds_base: bool
    family: str

    def combine(self, base_logits: NDArray[np.float32], delta: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Logits of one position, float32; `delta` is None where the device was not consulted."""
        if delta is None:
            return base_logits
        return base_logits + delta if self.adds_base else delta


MODES = {
    mode.name: mode
    for mode in (
        Mode(name="integration", is_gated=False, adds_base=True, family="parallel"),
        Mode(name="separation", is_gated=True, adds_base=False, family="serial"),
        Mode(name="ladder", is_gated=False, adds_base=False, family="serial"),
        Mode(name="spa", is_gated=True, adds_base=True, family="parallel"),
    )
}


def mode_named(name: str) -> Mode:
    """The mode of that name.

    Raises:
        InputError: there is none.
    """
    if name not in MODES:
        raise InputError(f"mode is {name!r}, expected one of {', '.join(MODES)}")
    return MODES[name]
