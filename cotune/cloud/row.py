"""What the engine asks of a sequence that it generates for: a device's session, or a plain completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cotune.errors import CotuneError
from cotune.generation.gate import Gate
from cotune.generation.protocols import DecodingBackbone, RowWork, StepFeatures


class Places(Protocol):
    """What a row has in the cache: one cursor, or one for each of its beams."""

    def close(self) -> None:
        """Give back the memory."""
        ...


class Plan(Protocol):
    """What a row wants of a pass: `cotune.cloud.stream.StepPlan`, `beam_stream.BeamPlan` or `branches.BranchPlan`."""

    @property
    def num_rows(self) -> int:
        """How many sequences it brings into the pass."""
        ...

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """All tokens that it reads."""
        ...

    def within(self, num_rows: int) -> Plan | None:
        """The part of it that fits into so many rows; None where nothing of use does."""
        ...

    def begin(self, backbone: DecodingBackbone, num_prompt: int) -> Places:
        """Places in the cache for a row that has none yet. In the engine's thread."""
        ...

    def prepare(self, places: Any, /) -> list[RowWork]:
        """Make those places ready for the pass, and say what each reads. In the engine's thread.

        Raises:
            StepAbandonedError: they are not those that the plan was made for.
        """
        ...


class Steps(Protocol):
    """The text of one row, as far as computing it goes; `cotune.cloud.stream.CloudStream` is one."""

    @property
    def num_prompt(self) -> int:
        """Tokens of its prompt."""
        ...

    @property
    def gate(self) -> Gate | None:
        """Which steps consult its device; None for all, or none."""
        ...

    @property
    def chance(self) -> float:
        """How likely its next step is of use: 1 where nothing that it is built on can change any more."""
        ...

    @property
    def is_in_prompt(self) -> bool:
        """Whether its prompt is not read yet."""
        ...

    def wants_step(self) -> bool:
        """Whether the backbone should do `plan()` now."""
        ...

    def plan(self, prompt_chunk: int) -> Plan:
        """The next thing for the backbone to do."""
        ...

    def is_current(self, plan: Any) -> bool:
        """Whether the outcome of `plan`, one of its own, is still of use."""
        ...

    def forget_cache(self) -> None:
        """The cache is gone: everything has to be read again."""
        ...


class Row(Protocol):
    """One sequence in the engine."""

    @property
    def steps(self) -> Steps: ...

    @property
    def place(self) -> Place:
        """The engine's own notes about the row."""
        ...

    @property
    def is_blocked(self) -> bool:
        """Whether whoever reads its output cannot keep up, so that more of it must wait."""
        ...

    @property
    def due_s(self) -> float | None:
        """When `on_time` should be called, on the monotonic clock; None for never."""
        ...

    def on_step(
        self, plan: Any, features: Sequence[StepFeatures] | None, seconds: float, now_s: float, share: float
    ) -> None:
        """Take the outcome of a pass: the features of all its sequences, one after the other."""
        ...

    def on_time(self, now_s: float) -> None:
        """The time that `due_s` said has come."""
        ...

    def on_idle(self, now_s: float) -> None:
        """There is nothing to compute for it until somebody else acts."""
        ...

    def on_failure(self, error: CotuneError) -> None:
        """It cannot go on."""
        ...


@dataclass
class Place:
    """Where a row's computation stands.

    Attributes:
        cursor: its keys and values; None before the first pass and after it was put out.
        num_blocks: blocks of the cache that are set aside for it.
        last_pass: number of the last pass that it was in.
        wanting_since_s: since when it has had something to compute, on the monotonic clock.
    """

    cursor: Places | None = None
    num_blocks: int = 0
    last_pass: int = field(default=-1)
    wanting_since_s: float | None = None
