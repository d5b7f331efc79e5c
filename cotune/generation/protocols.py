"""What the decoding loop asks of a backbone and of a side network, wherever they are. NumPy only.

`cotune.models.Backbone` and `cotune.device.SideNetwork` fit these protocols; tests use small fakes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cotune.wire.codec import quantise


class StepAbandonedError(Exception):
    """A step was given up in the middle, because nobody wanted its outcome any more; the cursor is as before it."""


@dataclass(frozen=True, kw_only=True)
class StepFeatures:
    """What one backbone step says about the next token.

    Attributes:
        logits: float32 (vocab,), base logits z.
        hidden: float32 (hidden,), final hidden state f after the last norm, which z and the gate read.
        taps: float32 (taps, tap_dim), RMS-normalised projected states, not yet quantised.
        codes, scales: the same, int8 (taps, tap_dim) and float16 (taps,), where a whole pass was quantised at once.
        fires: what the sequence's gate says, where the gates of a whole pass were asked at once.
    """

    logits: NDArray[np.float32]
    hidden: NDArray[np.float32]
    taps: NDArray[np.float32]
    codes: NDArray[np.int8] | None = None
    scales: NDArray[np.float16] | None = None
    fires: bool | None = None

    def quantised_taps(self) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
        """int8 (taps, tap_dim) codes and float16 (taps,) scales, which is what the taps are everywhere."""
        if self.codes is None or self.scales is None:
            return quantise(self.taps)
        return self.codes, self.scales


class Cursor(Protocol):
    """One sequence in a backbone's key-value cache."""

    @property
    def length(self) -> int:
        """How many tokens the cache holds."""
        ...

    def extend(self, token_ids: NDArray[np.int64], is_wanted: Callable[[], bool] | None = None) -> StepFeatures:
        """Append (seq,) tokens; features to predict the token after the last. The first tokens are the prompt.

        Args:
            token_ids: int64 (seq,).
            is_wanted: asked now and then during the pass; False gives it up.

        Raises:
            StepAbandonedError: `is_wanted` said no. A cursor may also finish regardless.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget all tokens from index `length` on, as if they had never been read."""
        ...

    def fork(self) -> Self:
        """A second cursor at the same place; what one of them reads the other does not see."""
        ...

    def close(self) -> None:
        """Give back the memory that it holds; it must not be used any more."""
        ...


@dataclass(frozen=True, kw_only=True)
class RowWork:
    """What one sequence has to read in a pass that it shares with others.

    Attributes:
        cursor: the sequence.
        token_ids: int64 (seq,), its next tokens: one piece of the prompt, or any number of those after it.
        num_outputs: for how many of the last positions features are wanted; 0 for a prompt's earlier pieces.
    """

    cursor: Cursor
    token_ids: NDArray[np.int64]
    num_outputs: int = 1


class DecodingBackbone(Protocol):
    """A frozen model that reads tokens and offers features."""

    @property
    def prompt_chunk(self) -> int:
        """Prompts are read in pieces that end at multiples of this many tokens."""
        ...

    def cursor(self, num_prompt: int | None = None) -> Cursor:
        """An empty sequence. `num_prompt`: how many tokens are its prompt; None for those of the first `extend`."""
        ...

    def extend(self, work: Sequence[RowWork], is_wanted: Callable[[], bool] | None = None) -> list[list[StepFeatures]]:
        """Read the next tokens of many sequences in one pass; features of the last positions of each.

        Raises:
            StepAbandonedError: `is_wanted` said no; no sequence has changed.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What the side network wants to change, in the shared frozen output basis, quantised to int8.

    Attributes:
        codes: int8 (basis_dim,).
        scale: float16 (), value = codes * scale.
    """

    codes: NDArray[np.int8]
    scale: np.float16


class SideState(Protocol):
    """What a side network remembers of one sequence. Position t predicts token t, so there is none before 1."""

    @property
    def next_position(self) -> int | None:
        """The position that comes next without a gap; None where any may come."""
        ...

    def read(self, position: int, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> None:
        """Remember a position without its correction; everything at or after it is forgotten first.

        Args:
            position: at most `next_position`.
            tap_codes: int8 (taps, tap_dim).
            tap_scales: float16 (taps,).

        Raises:
            InputError: a position was left out, or the taps have another shape than the network reads.
        """
        ...

    def correct(self, position: int, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> Correction:
        """As `read`, and the correction of that position: the same bits however the earlier ones came to be known."""
        ...


class Corrector(Protocol):
    """A side network: from the taps of one position, and what it remembers, to a correction of its logits."""

    @property
    def reads_every_position(self) -> bool:
        """Whether it has a memory, and needs each position once and in order, consulted or not."""
        ...

    @property
    def prompt_window(self) -> int:
        """How many positions it reads up to the first generated one, that one included; 0 without a memory."""
        ...

    def open(self) -> SideState:
        """An empty memory, for one sequence."""
        ...
