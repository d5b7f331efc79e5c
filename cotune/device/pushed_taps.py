"""What a side network with a memory reads while a text grows: the taps of every position, each once and in order.

The cloud pushes them (`Open.taps_from`): those of the prompt's last positions in a `Taps` frame, then one of each
position with its `Step`, consulted or not. A position's taps depend on the tokens before it alone, so where a token
is replaced those of its own position stay and all later ones come again.
"""

from __future__ import annotations

from cotune.errors import WireError
from cotune.generation.protocols import Correction, Corrector
from cotune.generation.side_state import first_position
from cotune.wire.codec import Int8Codec, unpack_taps


class PushedTaps:
    """One sequence's taps on their way into a side network.

    Args:
        corrector: with a memory or without; without, any position may come at any time.
        tap_shape: (num_taps, tap_dim) of the cloud's taps.
        num_prompt: tokens of the prompt.

    Attributes:
        remembers: whether the order of positions matters at all.
    """

    def __init__(self, corrector: Corrector, tap_shape: tuple[int, int], num_prompt: int) -> None:
        self._side = corrector.open()
        self._tap_shape = tap_shape
        self.remembers = corrector.reads_every_position
        # The positions before this one are read, and what they were read from still holds.
        self._next = first_position(num_prompt, corrector.prompt_window)

    def open(self, num_known: int) -> int:
        """The first position whose taps are to be pushed on a new connection; 0 where only consulted ones matter.

        Args:
            num_known: tokens that are decided, those of the prompt too.
        """
        if not self.remembers:
            return 0
        self._next = min(self._next, num_known)
        return self._next

    def forget_after(self, position: int) -> None:
        """The token at `position` was replaced: what was read after it was read for nothing."""
        self._next = min(self._next, position + 1)

    def is_repeated(self, position: int) -> bool:
        """Whether this position was read already. Without a memory nobody knows, and nothing depends on it."""
        return self.remembers and position < self._next

    def read(self, position: int, taps: bytes) -> None:
        """Remember consecutive positions from `position` on; those that were read already change nothing.

        Raises:
            WireError: positions are missing before these.
        """
        if not self.remembers:
            return
        size = Int8Codec().num_bytes(*self._tap_shape)
        for start in range(0, len(taps), size):
            if not self.is_repeated(position):
                unpacked = unpack_taps(taps[start : start + size], *self._tap_shape)
                self._advance(position)
                self._side.read(position, *unpacked)
            position += 1

    def correct(self, position: int, taps: bytes) -> Correction:
        """Remember a position, and its correction.

        Raises:
            WireError: positions are missing before it.
        """
        unpacked = unpack_taps(taps, *self._tap_shape)
        self._advance(position)
        return self._side.correct(position, *unpacked)

    def _advance(self, position: int) -> None:
        if not self.remembers:
            return
        if position > self._next:
            raise WireError(
                f"the cloud sent position {position} of the text, expected {self._next}: this side network reads every "
                "position; is the cloud of the same cotune version?"
            )
        self._next = position + 1
