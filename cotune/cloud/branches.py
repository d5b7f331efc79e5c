"""Branching instead of waiting: where a stream waits for its device, the likeliest tokens go on side by side.

Where the gate fires, the schedule `gated` stands still for a round trip R. In rows of the batch that nobody else wants,
the base model's b likeliest tokens for that position are each assumed and continued, in forks of the cache. All their
steps go to the device, which answers them without knowing which is the text. When the answer to the open
position comes, the branch with the right token is the text, with all its answers so far, and the others are
dropped; where none has it, the text goes on from there as if nobody had branched. So a stall becomes (1 - h_b) R, h_b
being the share of open positions whose token is among the b. The tokens are those of every other schedule.

Only in the correction form, where a device answers taps with corrections and decides nothing, and only for side
networks without a memory, which give the same answer in whatever order they are asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.cloud.stream import BRANCH_WINDOW, MAX_PASS_TOKENS, CloudStream, StepPlan, StreamConfig, StreamCounters
from cotune.generation.controller import branches_pay
from cotune.generation.gate import Gate
from cotune.generation.protocols import Cursor, DecodingBackbone, RowWork, StepAbandonedError, StepFeatures
from cotune.wire.frames import Correct, EndReason, Frame


def may_branch(config: StreamConfig) -> bool:
    """Whether this kind of stream can branch; see the module's text."""
    return config.schedule == "gated" and config.answer == "correction" and not config.taps_from


def extra_tokens(block_size: int) -> int:
    """Room in the cache that each branch needs: whole blocks for what it runs ahead, and one that it splits."""
    return (-(-BRANCH_WINDOW // block_size) + 1) * block_size


class BranchPlaces:
    """The places in a backbone's cache of a text and its branches, by number."""

    def __init__(self, trunk: int, cursor: Cursor) -> None:
        self.cursors: dict[int, Cursor] = {trunk: cursor}

    def close(self) -> None:
        """Give all blocks back."""
        for cursor in self.cursors.values():
            cursor.close()
        self.cursors.clear()


@dataclass(frozen=True, kw_only=True)
class LinePlan:
    """One line's part of a pass: `parent` is the line that it forks from where it has no place yet."""

    line: int
    parent: int
    step: StepPlan


@dataclass(frozen=True, kw_only=True)
class BranchPlan:
    """What the backbone has to do next for a text, or for its branches.

    Attributes:
        trunk: number of the line that is the text.
        alive: numbers of all lines; others give their places back.
        lines: those that read something.
    """

    trunk: int
    alive: frozenset[int]
    lines: tuple[LinePlan, ...]

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """All tokens of the pass."""
        return np.concatenate([line.step.token_ids for line in self.lines])

    @property
    def num_rows(self) -> int:
        """How many sequences it brings into the pass."""
        return len(self.lines)

    def within(self, num_rows: int) -> BranchPlan | None:
        """The part of it that fits into so many rows: the likeliest branches; None for nothing."""
        if num_rows < 1:
            return None
        return BranchPlan(trunk=self.trunk, alive=self.alive, lines=self.lines[:num_rows])

    def begin(self, backbone: DecodingBackbone, num_prompt: int) -> BranchPlaces:
        """Places for a text that has none yet."""
        return BranchPlaces(self.trunk, backbone.cursor(num_prompt))

    def prepare(self, places: BranchPlaces) -> list[RowWork]:
        """Drop what is over, fork what is new, and say what each line reads.

        Raises:
            StepAbandonedError: the places are not those that the plan was made for.
        """
        cursors = places.cursors
        for part in self.lines:
            if part.line not in cursors:
                if part.parent not in cursors:
                    raise StepAbandonedError
                cursors[part.line] = cursors[part.parent].fork()
        for line in [line for line in cursors if line not in self.alive]:
            cursors.pop(line).close()
        return [work for part in self.lines for work in part.step.prepare(cursors[part.line])]


class BranchingStream:
    """A text that branches where it waits. Has all that sessions and the engine ask of a `CloudStream`.

    Args:
        stream: the text.
        max_branches: at most so many tokens side by side.
    """

    def __init__(self, stream: CloudStream, max_branches: int) -> None:
        self._text = stream
        self._config = stream.config
        self._max_branches = max_branches
        self._trunk = 0
        self._parents = {0: 0}
        # The text waits at this position, and these are its branches, by number.
        self._position: int | None = None
        self._branches: dict[int, CloudStream] = {}
        self._num_delayed = 0

    # The text.

    @property
    def session(self) -> int:
        return self._text.session

    @session.setter
    def session(self, number: int) -> None:
        self._text.session = number

    @property
    def config(self) -> StreamConfig:
        return self._config

    @property
    def counters(self) -> StreamCounters:
        return self._text.counters

    @property
    def epoch(self) -> int:
        return self._text.epoch

    @property
    def ended(self) -> EndReason | None:
        return self._text.ended

    @property
    def tokens(self) -> list[int]:
        return self._text.tokens

    @property
    def num_prompt(self) -> int:
        return self._text.num_prompt

    @property
    def num_confirmed(self) -> int:
        return self._text.num_confirmed

    @property
    def num_branches(self) -> int:
        """How many go on now."""
        return len(self._branches)

    # What the engine asks.

    @property
    def gate(self) -> Gate | None:
        return self._text.gate

    @property
    def is_in_prompt(self) -> bool:
        return self._text.is_in_prompt

    @property
    def chance(self) -> float:
        """Of the text's next step; of the branches, one at most is right."""
        if self._text.wants_step() or not self._branches:
            return self._text.chance
        return self._text.measured.branch_kept.value / len(self._branches)

    @property
    def due_s(self) -> float | None:
        return self._text.due_s

    def wants_step(self) -> bool:
        return self._text.wants_step() or any(branch.wants_step() for branch in self._branches.values())

    def plan(self, prompt_chunk: int, max_tokens: int = MAX_PASS_TOKENS) -> BranchPlan:
        """The text's next step, or those of its branches, the likeliest first."""
        wanting = {self._trunk: self._text} if self._text.wants_step() else self._branches
        return BranchPlan(
            trunk=self._trunk,
            alive=frozenset((self._trunk, *self._branches)),
            lines=tuple(
                LinePlan(line=number, parent=self._parents[number], step=line.plan(prompt_chunk, max_tokens))
                for number, line in wanting.items()
                if line.wants_step()
            ),
        )

    def is_current(self, plan: BranchPlan) -> bool:
        """Whether the outcome of any part of it is still of use."""
        return any((line := self._line(part.line)) is not None and line.is_current(part.step) for part in plan.lines)

    # What the engine and the session tell.

    def on_step(
        self,
        plan: BranchPlan,
        features: Sequence[StepFeatures] | None,
        seconds: float,
        now_s: float,
        *,
        share: float = 1.0,
    ) -> list[Frame]:
        """Take the outcome of a pass: the features of all its lines, one after the other."""
        frames: list[Frame] = []
        start = 0
        for part in plan.lines:
            end = start + part.step.num_outputs
            own = None if features is None else features[start:end]
            start = end
            line = self._line(part.line)
            if line is None:
                self.counters.num_steps += 1
                self.counters.num_wasted_steps += 1
            else:
                frames += line.on_step(part.step, own, seconds, now_s, share=share / len(plan.lines))
        return [*frames, *self._settle(now_s)]

    def on_frame(self, frame: Frame, now_s: float) -> list[Frame]:
        """Take one frame from the device, for whichever line it answers."""
        for branch in self._branches.values():
            if isinstance(frame, Correct) and frame.epoch == branch.epoch:
                return branch.on_frame(frame, now_s)
        return [*self._text.on_frame(frame, now_s), *self._settle(now_s)]

    def on_time(self, now_s: float) -> list[Frame]:
        return [*self._text.on_time(now_s), *self._settle(now_s)]

    def note_stall(self, now_s: float) -> None:
        self._text.note_stall(now_s)

    def resume(self, generated: list[int], taps_from: int, now_s: float) -> list[Frame]:
        self._drop_all()
        return self._text.resume(generated, taps_from, now_s)

    def end(self, reason: EndReason, now_s: float) -> list[Frame]:
        self._drop_all()
        return self._text.end(reason, now_s)

    def end_if_finished(self, now_s: float) -> list[Frame]:
        return self._text.end_if_finished(now_s)

    def is_for(self, prompt_ids: NDArray[np.int64]) -> bool:
        return self._text.is_for(prompt_ids)

    def forget_cache(self) -> None:
        self._drop_all()
        self._text.forget_cache()

    # Inside.

    def _line(self, number: int) -> CloudStream | None:
        return self._text if number == self._trunk else self._branches.get(number)

    def _settle(self, now_s: float) -> list[Frame]:
        """Begin, keep or end branching, as the text now stands; returns the frames to send."""
        frames: list[Frame] = []
        if self._position is not None and self._text.waiting_position != self._position:
            frames = self._close(self._position, now_s)
        if self._position is None and self._text.waiting_position is not None:
            self._open(self._text.waiting_position)
        return frames

    def _open(self, position: int) -> None:
        text = self._text
        measured = text.measured.branch_kept.value
        num = self._max_branches
        while num > 1 and not branches_pay(kept=measured, num_branches=num):
            num -= 1
        # The token at `position` is not the last that may be generated.
        if num < 2 or position + 1 - text.num_prompt >= text.config.max_new_tokens:
            return
        first = max(self._parents) + 1
        self._branches = {number: text.branch(token) for number, token in enumerate(text.candidates(num), start=first)}
        # Those of lines that are over are forgotten.
        self._parents = {self._trunk: self._parents[self._trunk], **dict.fromkeys(self._branches, self._trunk)}
        self._position = position
        self._num_delayed = self.counters.num_delayed
        self.counters.num_branchings += 1

    def _close(self, position: int, now_s: float) -> list[Frame]:
        """The text waits there no longer: go on with the branch that has its token, if one has."""
        text, branches = self._text, self._branches
        self._position, self._branches = None, {}
        is_decided = text.num_confirmed > position
        right = None
        if is_decided and text.ended is None:
            right = next((n for n, line in branches.items() if line.tokens[position] == text.tokens[position]), None)
        for number, line in branches.items():
            if number != right:
                line.drop()
        if is_decided:
            text.measured.branch_kept.add(right is not None)
        if right is None:
            # The branches kept the row busy, but the text did wait for this trip.
            self.counters.num_delayed += is_decided and self.counters.num_delayed == self._num_delayed
            return []
        self.counters.num_branches_kept += 1
        self._trunk, self._text = right, branches[right]
        return [*self._text.release(self._config, now_s), *self._settle(now_s)]

    def _drop_all(self) -> None:
        for line in self._branches.values():
            line.drop()
        self._position, self._branches = None, {}
