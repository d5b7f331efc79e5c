"""The cloud's side of one generation, as a state machine without network, threads or clock.

It knows which tokens the cache may keep, which to feed next, who is waited for, and what to send. A driver
(`cotune.cloud.engine`) feeds it the backbone's steps, `cotune.cloud.session` the device's frames, in whatever order
these come.

The stream runs ahead of the device: `tokens` may hold positions that the device has not answered. A position is
*confirmed* once its token can no longer change. When an answer differs from the token that the cloud went on
with, everything after it is dropped, the cache is truncated to it, and the epoch rises by one, so that answers
still under way to dropped positions are recognised and ignored.

    schedule     the cloud waits for the answer to a consulted position
    blocking     always
    gated        where the gate fires; elsewhere it runs ahead with its own token
    optimistic   never, up to the window; it rolls back when the device disagrees
    drafted      where no draft of the device says how the text goes on; a draft is read in one pass
    auto         as optimistic, and reads drafts too; it waits where running ahead would not pay, from measured q, R, c

A token that the cloud goes on with before it is confirmed is *assumed*: its own (the base token) or a draft's. Where
they differ the schedule drafted takes the draft's, and auto the one that has been right more often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from cotune.cloud.measured import Measured
from cotune.generation.gate import Gate
from cotune.generation.modes import Mode, mode_named
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import Correction, Cursor, DecodingBackbone, RowWork, StepFeatures
from cotune.generation.request import DRAFTED_SCHEDULES
from cotune.generation.sampling import Sampling, choose, likeliest, top_logits
from cotune.wire.codec import pack_taps
from cotune.wire.frame import HEADER_BYTES, MAX_FRAME_BYTES
from cotune.wire.frames import (
    Ack,
    Close,
    Correct,
    Draft,
    End,
    EndReason,
    Frame,
    Logits,
    More,
    Object,
    Step,
    Taps,
    Tokens,
)

EPOCHS = 1 << 16
MAX_PASS_TOKENS = 32
"""The most tokens after the prompt that one stream reads in one pass."""
BRANCH_WINDOW = 32
"""The furthest that a branch runs ahead."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What a device asked of its stream.

    Attributes:
        mode, schedule, answer: words of `cotune.generation`.
        top_k: base logits sent with each consulted step in the token form.
        window: how many positions the cloud may run ahead.
        max_new_tokens: stop after this many.
        sampling: how tokens are drawn.
        stop_token_ids: tokens that end the text.
        gate: which positions consult the device, or where the gated schedule waits.
        deadline_s: confirm the base token where an answer is later than this; None waits for ever. In the correction
            form only, where the cloud decides.
        taps_from: send the taps of every position from this one on; 0 for consulted ones only.
    """

    mode: str
    schedule: str
    answer: str
    top_k: int
    window: int
    max_new_tokens: int
    sampling: Sampling
    stop_token_ids: tuple[int, ...]
    gate: Gate | None
    deadline_s: float | None = None
    taps_from: int = 0

    @property
    def combination(self) -> Mode:
        return mode_named(self.mode)


@dataclass
class StreamCounters:
    """What a stream cost so far; times in seconds.

    Attributes:
        num_steps: passes that computed new positions.
        num_wasted_steps: positions that were computed and dropped.
        num_consulted: positions sent to the device with a question.
        num_rollbacks: positions whose token the device changed after the cloud had assumed another.
        num_more_trips: requests for more logits.
        num_delayed: round trips that held up the text.
        num_late: positions that went on with the base token because the device was late.
        num_drafted, num_drafts_kept: drafted tokens that were read, and those of them that became the text.
        num_branchings, num_branches_kept: waits that branches bridged, and those at which one of them was right.
        cloud_s, stall_s: computing, and waiting for the device.
    """

    num_steps: int = 0
    num_wasted_steps: int = 0
    num_consulted: int = 0
    num_rollbacks: int = 0
    num_more_trips: int = 0
    num_delayed: int = 0
    num_late: int = 0
    num_drafted: int = 0
    num_drafts_kept: int = 0
    num_branchings: int = 0
    num_branches_kept: int = 0
    cloud_s: float = 0.0
    stall_s: float = 0.0


@dataclass(kw_only=True)
class _Pending:
    """A position that was sent but not confirmed."""

    base_token: int
    assumed_token: int
    drafted_token: int | None
    consulted: bool
    sent_s: float
    logits: NDArray[np.float32]
    waits: bool = False
    correction: Correction | None = None
    delayed: bool = False
    is_late: bool = False


class Epochs:
    """Numbers for epochs: each is another one than the last 65,535."""

    def __init__(self) -> None:
        self._next = 0

    def next(self) -> int:
        """One that is not in use."""
        epoch, self._next = self._next, (self._next + 1) % EPOCHS
        return epoch


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What the backbone has to do next: forget from `truncate_to` on, then read `token_ids` in one pass.

    `num_outputs`: for how many of the last positions features are wanted; 0 where the pass only rebuilds a cache.
    """

    epoch: int
    truncate_to: int
    token_ids: NDArray[np.int64]
    num_outputs: int

    num_rows: ClassVar[int] = 1
    """How many sequences it brings into the pass."""

    def within(self, num_rows: int) -> StepPlan | None:
        """As much of it as fits into so many rows."""
        return self if num_rows >= self.num_rows else None

    def begin(self, backbone: DecodingBackbone, num_prompt: int) -> Cursor:
        """A place in the cache for a stream that has none yet."""
        return backbone.cursor(num_prompt)

    def prepare(self, cursor: Cursor) -> list[RowWork]:
        """Make the stream's place in the cache ready for the pass, and say what it reads."""
        # What a dropped step left behind goes too: the plan is the truth, not the cache.
        if cursor.length > self.truncate_to:
            cursor.truncate(self.truncate_to)
        return [RowWork(cursor=cursor, token_ids=self.token_ids, num_outputs=self.num_outputs)]


class CloudStream:
    """One generation on the cloud. See the module's text.

    Args:
        session: its number on the wire.
        prompt_ids: int64 (prompt,).
        generated: tokens that the device already holds (a resumed stream), all confirmed.
        config: what the device asked for.
        output_basis: for the correction form.
        epochs: gives numbers that no other line of the same text has.
        counters, measured: of the text so far, where this is a branch of it.
    """

    def __init__(
        self,
        session: int,
        prompt_ids: NDArray[np.int64],
        generated: list[int],
        config: StreamConfig,
        output_basis: OutputBasis,
        *,
        epochs: Epochs | None = None,
        counters: StreamCounters | None = None,
        measured: Measured | None = None,
    ) -> None:
        self.session = session
        self.config = config
        self.counters = counters or StreamCounters()
        self._epochs = epochs or Epochs()
        self.epoch = self._epochs.next()
        self.is_held = False
        self.ended: EndReason | None = None
        self.tokens: list[int] = [*map(int, prompt_ids), *generated]
        self.num_prompt = len(prompt_ids)
        self.num_confirmed = len(self.tokens)
        self.num_decoded = len(self.tokens)
        self.num_cached = 0
        self.num_taps_sent = max(1, config.taps_from) if config.taps_from else 0
        self._draft: Draft | None = None
        self._basis = output_basis
        self._pending: dict[int, _Pending] = {}
        self.measured = measured or Measured()
        self._stalled_since_s: float | None = None

    # What the driver asks.

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt whose features have been computed or that are confirmed."""
        return self.num_decoded - self.num_prompt

    @property
    def gate(self) -> Gate | None:
        """Whose answer each step needs."""
        return self.config.gate

    @property
    def is_in_prompt(self) -> bool:
        """Whether the prompt is not read yet."""
        return self.num_cached < self.num_prompt

    @property
    def chance(self) -> float:
        """How likely everything that was assumed is right."""
        return math.prod(map(self._chance, self._pending.values()))

    @property
    def num_ahead(self) -> int:
        """How far the cloud has run ahead of what is confirmed."""
        return self.num_decoded - self.num_confirmed

    def wants_step(self) -> bool:
        """Whether the backbone should do `plan()` now."""
        if self.ended is not None or self.num_generated >= self.config.max_new_tokens:
            return False
        if not self._pending:
            return True
        if self._may_have_ended():
            return False
        if len(self.tokens) > self.num_decoded:
            return self.num_ahead < self.config.window
        return self.num_ahead < self._window() and not self._pending[self.num_decoded - 1].waits

    def plan(self, prompt_chunk: int, max_tokens: int = MAX_PASS_TOKENS) -> StepPlan:
        """The next thing for the backbone to do.

        Args:
            prompt_chunk: prompts are read in pieces that end at its multiples.
            max_tokens: the most tokens after the prompt in one pass.
        """
        first = self.num_cached
        if first < self.num_prompt:
            last = min(self.num_prompt, (first // prompt_chunk + 1) * prompt_chunk)
        else:
            last = max(first + 1, min(first + max_tokens, self._num_worth_reading()))
        # Token i gives the features of position i + 1.
        wanted_from = self.num_taps_sent or self.num_decoded
        return StepPlan(
            epoch=self.epoch,
            truncate_to=first,
            token_ids=np.array(self.tokens[first:last], np.int64),
            num_outputs=max(0, last - max(first, min(wanted_from, self.num_decoded) - 1)),
        )

    # What the driver tells.

    def is_current(self, plan: StepPlan) -> bool:
        """Whether the outcome of `plan` is still of use."""
        return plan.epoch == self.epoch and self.ended is None

    def on_step(
        self,
        plan: StepPlan,
        features: Sequence[StepFeatures] | None,
        seconds: float,
        now_s: float,
        *,
        share: float = 1.0,
    ) -> list[Frame]:
        """Take the outcome of `plan`; returns the frames to send.

        Args:
            plan: what was done; it may be outdated by now.
            features: what the backbone said of the last `num_outputs` positions; None if it gave up in the middle.
            seconds: how long the pass took.
            now_s: the driver's clock.
            share: this stream's part of the pass, which other streams may have been in.
        """
        self.counters.cloud_s += share * seconds
        if features is None or not self.is_current(plan):
            self.counters.num_steps += 1
            self.counters.num_wasted_steps += 1
            return []
        self.num_cached = plan.truncate_to + len(plan.token_ids)
        self.counters.num_steps += self.num_cached >= self.num_decoded
        step_s = self.measured.step_s
        if len(plan.token_ids) == 1 or (step_s.num_values == 0 and plan.truncate_to >= self.num_prompt):
            # A pass over a few tokens takes hardly longer, and is better than no measurement.
            step_s.add(seconds)
        frames: list[Frame] = []
        earlier: list[tuple[int, bytes]] = []
        position = self.num_cached - plan.num_outputs + 1
        for one in features:
            if position < self.num_decoded:
                if position >= self.num_taps_sent > 0:
                    earlier.append((position, pack_taps(*one.quantised_taps())))
                    self.num_taps_sent = position + 1
            elif self._goes_on_at(position):
                frames += self._emit(one, now_s)
            else:
                self.counters.num_wasted_steps += 1
            position += 1
        # Frames of their own, before those of the positions that are still to be decided.
        return [*self._pushed(earlier), *frames]

    def on_frame(self, frame: Frame, now_s: float) -> list[Frame]:
        """Take one frame from the device; returns the frames to send. Stale and repeated ones change nothing."""
        if self.ended is not None:
            return []
        before = self._stalled_since_s
        replies = self._take_draft(frame) if isinstance(frame, Draft) else self._answer(frame, now_s)
        if before is not None and self.wants_step():
            self._end_stall(now_s)
        return replies

    def note_stall(self, now_s: float) -> None:
        """The driver has nothing to do for this stream until the device answers."""
        if self.ended is None and self._stalled_since_s is None and self._pending:
            self._stalled_since_s = now_s
            awaited = self._pending[self.num_confirmed]
            if not awaited.delayed:
                awaited.delayed = True
                self.counters.num_delayed += 1

    @property
    def due_s(self) -> float | None:
        """When the device's next answer will be too late, on the driver's clock; None for never."""
        deadline_s = self.config.deadline_s if self.config.answer == "correction" else None
        pending = self._pending.get(self.num_confirmed)
        if deadline_s is None or pending is None or not pending.consulted or self.ended is not None:
            return None
        return pending.sent_s + deadline_s

    def on_time(self, now_s: float) -> list[Frame]:
        """Confirm the base token where the device is late; returns the frames to send."""
        frames: list[Frame] = []
        while (due_s := self.due_s) is not None and due_s <= now_s:
            self._pending[self.num_confirmed].is_late = True
            self.counters.num_late += 1
            frames += self._confirm_corrected(now_s)
        if frames and self.wants_step():
            self._end_stall(now_s)
        return frames

    def resume(self, generated: list[int], taps_from: int, now_s: float) -> list[Frame]:
        """Go on from the device's own history, on a new connection: the device knows best what it holds."""
        history = [*self.tokens[: self.num_prompt], *generated]
        same = 0
        for ours, theirs in zip(self.tokens, history, strict=False):
            if ours != theirs:
                break
            same += 1
        self.counters.num_wasted_steps += len(self._pending)
        self._pending.clear()
        self._draft = None
        self.tokens = history
        self.num_taps_sent = taps_from
        # The features of the next position are gone with the old connection: read the last token again.
        needed = min(taps_from or len(history), len(history)) - 1
        self.num_cached = min(self.num_cached, same, needed)
        if self.num_cached < self.num_prompt:
            # A prompt is read in the same pieces every time.
            self.num_cached = 0
        self.num_confirmed = self.num_decoded = len(history)
        self.epoch = self._epochs.next()
        self._stalled_since_s = None
        self.ended = None
        return self.end_if_finished(now_s)

    def end(self, reason: EndReason, now_s: float) -> list[Frame]:
        """End the stream and report what it cost."""
        if self.ended is not None:
            return []
        self._end_stall(now_s)
        self.ended = reason
        self.counters.num_wasted_steps += len(self._pending)
        self._pending.clear()
        counters = self.counters
        return [
            End(
                epoch=self.epoch,
                session=self.session,
                pos=self.num_confirmed,
                reason=reason,
                counters={
                    "num_steps": counters.num_steps,
                    "num_wasted_steps": counters.num_wasted_steps,
                    "num_rollbacks": counters.num_rollbacks,
                    "num_more_trips": counters.num_more_trips,
                    "num_delayed": counters.num_delayed,
                    "num_late": counters.num_late,
                    "num_drafted": counters.num_drafted,
                    "num_drafts_kept": counters.num_drafts_kept,
                    "num_branchings": counters.num_branchings,
                    "num_branches_kept": counters.num_branches_kept,
                    "cloud_ms": round(1e3 * counters.cloud_s, 4),
                    "stall_ms": round(1e3 * counters.stall_s, 4),
                },
            )
        ]

    def end_if_finished(self, now_s: float) -> list[Frame]:
        """End where the confirmed text is complete."""
        if self.config.answer == "token":
            self._confirm_unconsulted()
        generated = self.num_confirmed - self.num_prompt
        if generated and self.tokens[self.num_confirmed - 1] in self.config.stop_token_ids:
            return self.end(EndReason.END_TOKEN, now_s)
        if generated >= self.config.max_new_tokens:
            return self.end(EndReason.LENGTH, now_s)
        return []

    def is_for(self, prompt_ids: NDArray[np.int64]) -> bool:
        """Whether this stream goes on from that prompt."""
        return np.array_equal(self.tokens[: self.num_prompt], prompt_ids)

    def forget_cache(self) -> None:
        """The cache is gone: everything has to be read again."""
        self.num_cached = 0

    # Where the text branches; see `cotune.cloud.branches`.

    @property
    def waiting_position(self) -> int | None:
        """Where the stream stands still until the device answers, with everything before it read; None for nowhere."""
        last = self.num_decoded - 1
        pending = self._pending.get(last)
        if pending is None or not pending.waits or self.ended is not None or self.num_cached != last:
            return None
        return last

    def branch(self, token: int) -> CloudStream:
        """The text as it would be with `token` where this one waits; it decides nothing until it is released."""
        position = self.num_decoded - 1
        line = CloudStream(
            self.session,
            np.array(self.tokens[: self.num_prompt], np.int64),
            [*self.tokens[self.num_prompt : position], token],
            replace(self.config, window=min(self.config.window, BRANCH_WINDOW)),
            self._basis,
            epochs=self._epochs,
            counters=self.counters,
            measured=self.measured,
        )
        line.num_cached = position
        line.is_held = True
        return line

    def candidates(self, num: int) -> list[int]:
        """The likeliest tokens where the stream waits, the base token first; none that would end the text."""
        pending = self._pending[self.num_decoded - 1]
        tokens = likeliest(pending.logits, self.config.sampling, self.num_decoded - 1, num)
        return [token for token in tokens if token not in self.config.stop_token_ids]

    def release(self, config: StreamConfig, now_s: float) -> list[Frame]:
        """This branch is the text: decide what was held back; returns the frames to send."""
        self.is_held = False
        self.config = config
        return self._confirm_corrected(now_s)

    def drop(self) -> None:
        """This branch is not the text."""
        self.counters.num_wasted_steps += len(self._pending)
        self._pending.clear()

    # Inside.

    def _window(self) -> int:
        """How far ahead is useful: what one round trip can hide, with room for steps and trips that are late.

        Half a round trip more costs only steps that a rollback may waste; a window that is too small costs a stall.
        """
        round_trip_s, step_s = self.measured.round_trip_s.value, self.measured.step_s.value
        if not round_trip_s or not step_s:
            return self.config.window
        return min(self.config.window, math.ceil(1.5 * round_trip_s / step_s) + 4)

    def _emit(self, features: StepFeatures, now_s: float) -> list[Frame]:
        config = self.config
        position = self.num_decoded
        base_token = choose(features.logits, config.sampling, position)
        fires = features.fires
        if fires is None:
            fires = config.gate is None or config.gate.consults(features.hidden)
        consulted = fires or not config.combination.is_gated
        drafted = self.tokens[position] if position < len(self.tokens) else None
        self.counters.num_drafted += drafted is not None
        if drafted is not None and drafted != base_token and not (consulted and self._prefers_draft()):
            # The base token it is, where nobody is asked for certain.
            self._cut(position)
        if position == len(self.tokens):
            self.tokens.append(base_token)
        self.num_decoded = position + 1
        assumed = self.tokens[position]
        pending = self._pending[position] = _Pending(
            base_token=base_token,
            assumed_token=assumed,
            drafted_token=drafted,
            consulted=consulted,
            sent_s=now_s,
            logits=features.logits,
        )
        pending.waits = consulted and self._should_wait(fires)
        self.counters.num_consulted += consulted
        pushes = self.num_taps_sent > 0
        if pushes:
            self.num_taps_sent = position + 1
        self._apply_draft()
        if config.answer == "correction" and not consulted and not pushes:
            return self._confirm_corrected(now_s)
        taps = pack_taps(*features.quantised_taps()) if consulted or pushes else b""
        sends_logits = consulted and config.answer == "token" and config.combination.adds_base
        top = top_logits(features.logits, config.top_k, config.sampling) if sends_logits else None
        step = Step(
            epoch=self.epoch,
            session=self.session,
            pos=position,
            base_token=base_token,
            assumed_token=assumed if assumed != base_token else None,
            consult=consulted,
            provisional_end=assumed in config.stop_token_ids,
            ids=top.ids if top else np.empty(0, np.int64),
            logits=top.logits if top else np.empty(0, np.float32),
            log_normalizer=top.log_normalizer if top else None,
            taps=taps,
        )
        if config.answer == "correction" and not consulted:
            return [step, *self._confirm_corrected(now_s)]
        return [step, *self.end_if_finished(now_s)]

    def _pushed(self, earlier: Sequence[tuple[int, bytes]]) -> list[Frame]:
        """Consecutive positions and their taps, in as few frames as their size allows."""
        if not earlier:
            return []
        num_each = max(1, (MAX_FRAME_BYTES - HEADER_BYTES) // len(earlier[0][1]))
        return [
            Taps(
                epoch=self.epoch,
                session=self.session,
                pos=part[0][0],
                num_positions=len(part),
                taps=b"".join(taps for _, taps in part),
            )
            for part in (earlier[i : i + num_each] for i in range(0, len(earlier), num_each))
        ]

    def _should_wait(self, fires: bool) -> bool:
        schedule = self.config.schedule
        if schedule == "gated":
            return fires
        if schedule in ("blocking", "drafted"):
            return True
        outlook = self.measured.outlook
        if outlook is None:
            return False
        if schedule == "auto":
            return outlook.running_ahead_s(self.chance) < 0.0
        return replace(outlook, draft_kept=0.0).running_ahead_s(1.0 - outlook.disagree) < 0.0

    def _chance(self, pending: _Pending) -> float:
        """How likely the assumed token is right, where all before it are."""
        if not pending.consulted:
            return 1.0
        return self.measured.chance(
            drafted=pending.drafted_token, base=pending.base_token, assumed=pending.assumed_token
        )

    def _prefers_draft(self) -> bool:
        """Whether to go on with the draft's token at the next position, where it is not the base token."""
        measured, outlook = self.measured, self.measured.outlook
        if self.config.schedule == "drafted" or outlook is None:
            return True
        return outlook.prefers_draft(
            self.chance,
            drafted=measured.drafted_alone.value,
            base=measured.base_alone.value,
            num_free=self.num_cached - self.num_decoded,
        )

    def _num_worth_reading(self) -> int:
        """How many of the tokens it pays to read: what comes after them is wanted, and within the window."""
        config = self.config
        # Token i gives the features of position i + 1.
        most = min(self.num_confirmed + config.window, self.num_prompt + config.max_new_tokens) - 1
        is_end_drafted = len(self.tokens) > self.num_decoded and self.tokens[-1] in config.stop_token_ids
        return min(len(self.tokens) - is_end_drafted, most)

    def _answer(self, frame: Frame, now_s: float) -> list[Frame]:
        if isinstance(frame, Close):
            self._confirm_up_to(min(frame.pos, self.num_decoded))
            return self.end(frame.reason, now_s)
        # An acknowledgement covers every position before its own.
        position = frame.pos - 1 if isinstance(frame, Ack) else frame.pos
        if frame.epoch != self.epoch or position not in self._pending:
            return []
        pending = self._pending[position]
        if isinstance(frame, More):
            self.counters.num_more_trips += 1
            k = frame.num_wanted or len(pending.logits)
            top = top_logits(pending.logits, k, self.config.sampling)
            return [
                Logits(
                    epoch=self.epoch,
                    session=self.session,
                    pos=position,
                    ids=top.ids,
                    logits=top.logits,
                    log_normalizer=top.log_normalizer or 0.0,
                )
            ]
        if isinstance(frame, Correct):
            if pending.consulted and pending.correction is None and frame.codes.shape == (self._basis.dim,):
                self.measured.round_trip_s.add(now_s - pending.sent_s)
                pending.correction = Correction(codes=frame.codes, scale=frame.scale)
                return self._confirm_corrected(now_s)
            return []
        if self.config.answer != "token":
            return []
        if isinstance(frame, Ack):
            self.measured.round_trip_s.add(now_s - pending.sent_s)
            self._confirm_up_to(position + 1)
            return self.end_if_finished(now_s)
        if isinstance(frame, Object) and frame.token < len(pending.logits):
            self.measured.round_trip_s.add(now_s - pending.sent_s)
            self._confirm_up_to(position)
            if frame.token != pending.assumed_token:
                self._replace(position, frame.token)
            self._confirm_up_to(position + 1)
            return self.end_if_finished(now_s)
        return []

    def _confirm_corrected(self, now_s: float) -> list[Frame]:
        """Decide, in order, every position whose correction is there, is late, or is not needed."""
        if self.is_held:
            return []
        # The report is about steps of the epoch in which they were sent, also where its last token begins another one.
        first, epoch = self.num_confirmed, self.epoch
        decided: list[_Pending] = []
        while (pending := self._pending.get(self.num_confirmed)) is not None:
            position, token = self.num_confirmed, pending.base_token
            if pending.consulted and not pending.is_late:
                if pending.correction is None:
                    break
                delta = self._basis.delta(pending.correction)
                logits = self.config.combination.combine(pending.logits, delta)
                token = choose(logits, self.config.sampling, position)
            if token != pending.assumed_token:
                self._replace(position, token)
            decided.append(pending)
            self._confirm_up_to(position + 1)
        if not decided:
            return []
        tokens = self.tokens[first : self.num_confirmed]
        report = Tokens(
            epoch=epoch,
            session=self.session,
            pos=first,
            tokens=np.array(tokens, np.int64),
            consulted=np.array([pending.consulted for pending in decided]),
            changed=np.array([token != pending.base_token for token, pending in zip(tokens, decided, strict=True)]),
            late=np.array([pending.is_late for pending in decided]),
        )
        return [report, *self.end_if_finished(now_s)]

    def _take_draft(self, frame: Draft) -> list[Frame]:
        """Remember what the device expects, and go on with it where it fits what is there."""
        if self.config.schedule in DRAFTED_SCHEDULES and int(frame.tokens.max()) < self._basis.vocab_size:
            self._draft = frame
            last = self._pending.get(self.num_decoded - 1)
            # In the correction form the device only guesses this token, and its answer is right behind the draft.
            if last is None or not last.waits or self.config.answer == "token":
                self._apply_draft()
        return []

    def _apply_draft(self) -> None:
        """Assume the draft's tokens after the last decoded position, if the draft agrees up to there."""
        draft = self._draft
        if draft is None:
            return
        if draft.pos + len(draft.tokens) <= self.num_confirmed:
            self._draft = None
            return
        if len(self.tokens) > self.num_decoded or self.ended is not None or self._may_have_ended():
            return
        if draft.pos > len(self.tokens):
            return
        known, drafted = self.tokens[draft.pos :], draft.tokens.tolist()
        if drafted[: len(known)] != known:
            return
        room = self.num_prompt + self.config.max_new_tokens - len(self.tokens)
        for token in drafted[len(known) :][: max(0, room)]:
            self.tokens.append(token)
            if token in self.config.stop_token_ids:
                break

    def _goes_on_at(self, position: int) -> bool:
        """Whether features of `position`, just computed, are of use: what they are built on still holds."""
        is_next = position == self.num_decoded <= self.num_cached
        is_over = self.ended is not None or self.num_generated >= self.config.max_new_tokens
        return is_next and not is_over and not self._may_have_ended()

    def _may_have_ended(self) -> bool:
        """Whether the last decoded token, confirmed or not, ends the text. A prompt may end with such a token."""
        return self.num_decoded > self.num_prompt and self.tokens[self.num_decoded - 1] in self.config.stop_token_ids

    def _replace(self, position: int, token: int) -> None:
        """Another token than the assumed one: drop what was built on that."""
        pending = self._pending[position]
        dropped = [p for p in self._pending if p > position]
        for p in dropped:
            del self._pending[p]
        self.counters.num_wasted_steps += len(dropped)
        self.counters.num_rollbacks += 1
        # In a stall this is the trip that is being waited for, and it is counted; so is a wait that branches bridge.
        if not pending.delayed and not pending.waits and self._stalled_since_s is None:
            pending.delayed = True
            self.counters.num_delayed += 1
        self._cut(position)
        self.tokens.append(token)
        self.num_decoded = position + 1
        self.epoch = self._epochs.next()

    def _cut(self, position: int) -> None:
        """Forget the tokens from `position` on, those that only a draft assumed too."""
        del self.tokens[position:]
        self.num_cached = min(self.num_cached, position)
        if self.num_taps_sent:
            self.num_taps_sent = min(self.num_taps_sent, position + 1)

    def _confirm_up_to(self, position: int) -> None:
        while self.num_confirmed < position:
            pending = self._pending.pop(self.num_confirmed)
            token = self.tokens[self.num_confirmed]
            drafted, base = pending.drafted_token, pending.base_token
            self.counters.num_drafts_kept += token == drafted
            if pending.consulted and not pending.is_late:
                self.measured.add_token(token, drafted=drafted, base=base)
            self.num_confirmed += 1
        self._apply_draft()

    def _confirm_unconsulted(self) -> None:
        """Positions that no device was asked about need no answer once all before them are confirmed."""
        while (pending := self._pending.get(self.num_confirmed)) is not None and not pending.consulted:
            self._confirm_up_to(self.num_confirmed + 1)

    def _end_stall(self, now_s: float) -> None:
        if self._stalled_since_s is not None:
            self.counters.stall_s += now_s - self._stalled_since_s
            self._stalled_since_s = None
