"""Which positions a side network reads, and the state of those that remember nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import numpy as np
from numpy.typing import NDArray

from cotune.generation.protocols import Correction


def first_position(num_prompt: int, prompt_window: int) -> int:
    """The first position that a side network reads; from there on it reads every one, if it has a memory.

    Args:
        num_prompt: tokens of the prompt; this is also the first generated position.
        prompt_window: of the network.

    Example:
        >>> first_position(20, 8), first_position(3, 8), first_position(20, 0)
        (13, 1, 20)
    """
    return max(1, num_prompt - max(1, prompt_window) + 1)


class StatelessCorrector(ABC):
    """A side network without a memory: a function of one position's taps. Fits `Corrector`."""

    reads_every_position = False
    prompt_window = 0

    @abstractmethod
    def correct(self, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> Correction:
        """Correction for one position from int8 (taps, tap_dim) codes and float16 (taps,) scales."""

    @final
    def open(self) -> StatelessSide:
        """A state with nothing in it."""
        return StatelessSide(self)


@final
class StatelessSide:
    """Fits `SideState` for a network that remembers nothing: any position may come at any time."""

    def __init__(self, corrector: StatelessCorrector) -> None:
        self._corrector = corrector

    @property
    def next_position(self) -> None:
        return None

    def read(self, position: int, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> None:
        """Nothing to remember."""

    def correct(self, position: int, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> Correction:
        return self._corrector.correct(tap_codes, tap_scales)
