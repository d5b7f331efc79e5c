"""What the decoding loop asks of a backbone and of a side network, wherever they are. NumPy only.

`cotune.models.Backbone` and `cotune.device.SideNetwork` fit these protocols; tests use small fakes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class StepAbandonedError(Exception):
    """A step was given up in the middle, because nobody wanted its outcome any more; the cursor is as before it."""


@dataclass(frozen=True, kw_only=True)
class StepFeatures:
    """What one backbone step says about the next token.

    Attributes:
        logits: float32 (vocab,), base logits z.
        hidden: float32 (hidden,), final hidden state f after the last norm, which z and the gate read.
        taps: float32 (taps, tap_dim), RMS-normalised projected states, not yet quantised.
    """

    logits: NDArray[np.float32]
    hidden: NDArray[np.float32]
    taps: NDArray[np.float32]


class Cursor(Protocol):
    """One sequence in a backbone's KV cache."""

    @property
    def length(self) -> int:
        """How many tokens the cache holds."""
        ...

    def extend(self, token_ids: NDArray[np.int64], is_wanted: Callable[[], bool] | None = None) -> StepFeatures:
        """Append (seq,) tokens in one forward pass; features to predict the token after the last.

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


class DecodingBackbone(Protocol):
    """A frozen model that reads tokens and offers features."""

    def cursor(self) -> Cursor:
        """An empty sequence."""
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


class Corrector(Protocol):
    """A side network: stateless, from the taps of one position to a correction of its logits."""

    def correct(self, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> Correction:
        """Correction for one position from int8 (taps, tap_dim) codes and float16 (taps,) scales."""
        ...
