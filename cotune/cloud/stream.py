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
    auto         as drafted, but runs ahead as optimistic where measured q, R and c make that the faster way

A token that the cloud goes on with before it is confirmed is *assumed*: its own (the base token) or a draft's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cotune.generation.controller import prefers_drafts
from cotune.generation.gate import Gate
from cotune.generation.modes import Mode, mode_named
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import Correction, StepFeatures
from cotune.generation.sampling import Sampling, choose, top_logits
from cotune.wire.codec import pack_taps
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
DRAFTED_SCHEDULES = ("drafted", "auto")
# How fast the running estimates of round trip, step time and disagreement follow: the last ten or so count.
_SMOOTHING = 0.1


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
    """What a stream cost so far; times in seconds."""

    num_steps: int = 0
    num_wasted_steps: int = 0
    num_consulted: int = 0
    num_rollbacks: int = 0
    num_more_trips: int = 0
    num_delayed: int = 0
    num_late: int = 0
    num_drafted: int = 0
    num_drafts_kept: int = 0
    cloud_s: float = 0.0
    stall_s: float = 0.0


@dataclass(kw_only=True)
class _Pending:
    """A position that was sent but not confirmed."""

    base_token: int
    assumed_token: int
    is_drafted: bool
    consulted: bool
    waits: bool
    sent_s: float
    logits: NDArray[np.float32]
    correction: Correction | None = None
    delayed: bool = False
    is_late: bool = False


@dataclass
class _Average:
    """An exponential moving average that starts at its first value."""

    value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + _SMOOTHING * (value - self.value)


@dataclass(kw_only=True)
class _Measured:
    """Running estimates: round trip with device time, one cloud step, shares of tokens changed and of drafts kept."""

    round_trip_s: _Average = field(default_factory=_Average)
    step_s: _Average = field(default_factory=_Average)
    disagree: _Average = field(default_factory=_Average)
    draft_kept: _Average = field(default_factory=_Average)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What the backbone has to do next: forget from `truncate_to` on, then read `token_ids` in one pass.

    `num_outputs`: for how many of the last positions features are wanted; 0 where the pass only rebuilds a cache.
    """

    epoch: int
    truncate_to: int
    token_ids: NDArray[np.int64]
    num_outputs: int


class CloudStream:
    """One generation on the cloud. See the module's text.

    Args:
        session: its number on the wire.
        prompt_ids: int64 (prompt,).
        generated: tokens that the device already holds (a resumed stream), all confirmed.
        config: what the device asked for.
        output_basis: for the correction form.
    """

    def __init__(
        self,
        session: int,
        prompt_ids: NDArray[np.int64],
        generated: list[int],
        config: StreamConfig,
        output_basis: OutputBasis,
    ) -> None:
        self.session = session
        self.config = config
        self.counters = StreamCounters()
        self.epoch = 0
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
        self._measured = _Measured()
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
    def num_ahead(self) -> int:
        """How far the cloud has run ahead of what is confirmed."""
        return self.num_decoded - self.num_confirmed

    def wants_step(self) -> bool:
        """Whether the backbone should do `plan()` now."""
        if self.ended is not None or self.num_generated >= self.config.max_new_tokens:
            return False
        if not self._pending:
            return True
        if self.num_ahead >= self._window():
            return False
        last = self._pending[self.num_decoded - 1]
        if last.assumed_token in self.config.stop_token_ids:
            return False
        return len(self.tokens) > self.num_decoded or not last.waits

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
            room = self.num_confirmed + self._window() if self._pending else len(self.tokens)
            last = max(first + 1, min(len(self.tokens), first + max_tokens, room))
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
        if len(plan.token_ids) == 1:
            self._measured.step_s.add(seconds)
        frames: list[Frame] = []
        prompt_taps: list[bytes] = []
        position = self.num_cached - plan.num_outputs + 1
        for one in features:
            if position < self.num_decoded:
                if position >= self.num_taps_sent > 0:
                    prompt_taps.append(pack_taps(*one.quantised_taps()))
                    self.num_taps_sent = position + 1
            elif self._goes_on_at(position):
                frames += self._emit(one, now_s)
            position += 1
        if prompt_taps:
            start = self.num_taps_sent - len(prompt_taps)
            # A frame of its own, before those of the positions after the prompt.
            taps = Taps(
                epoch=self.epoch,
                session=self.session,
                pos=start,
                num_positions=len(prompt_taps),
                taps=b"".join(prompt_taps),
            )
            frames.insert(0, taps)
        return frames

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
        pending = self._pending.get(self.num_confirmed)
        if self.config.deadline_s is None or pending is None or not pending.consulted or self.ended is not None:
            return None
        return pending.sent_s + self.config.deadline_s

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
        self.epoch = (self.epoch + 1) % EPOCHS
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

    # Inside.

    def _window(self) -> int:
        """How far ahead is useful: what one round trip can hide, with room for steps and trips that are late.

        Half a round trip more costs only steps that a rollback may waste; a window that is too small costs a stall.
        """
        round_trip_s, step_s = self._measured.round_trip_s.value, self._measured.step_s.value
        if round_trip_s is None or not step_s:
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
        is_drafted = position < len(self.tokens)
        if is_drafted and not consulted and self.tokens[position] != base_token:
            # Nobody is asked here, so the base token it is.
            is_drafted = False
            self.counters.num_drafted += 1
            self._cut(position)
        if not is_drafted:
            self.tokens.append(base_token)
        self.num_decoded = position + 1
        assumed = self.tokens[position]
        self._pending[position] = _Pending(
            base_token=base_token,
            assumed_token=assumed,
            is_drafted=is_drafted,
            consulted=consulted,
            waits=consulted and self._should_wait(fires),
            sent_s=now_s,
            logits=features.logits,
        )
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

    def _should_wait(self, fires: bool) -> bool:
        schedule = self.config.schedule
        if schedule == "blocking":
            return True
        if schedule == "gated":
            return fires
        if schedule == "drafted":
            return True
        # Running ahead costs q of a step where the answer comes sooner than the step ends; waiting costs a round
        # trip. On a near network waiting is the cheaper of the two, and where drafts hold better than base tokens.
        measured = self._measured
        round_trip_s, step_s, disagree = (
            measured.round_trip_s.value,
            measured.step_s.value,
            measured.disagree.value,
        )
        if round_trip_s is None or step_s is None or disagree is None:
            return False
        if schedule == "auto" and self._draft is not None and measured.draft_kept.value is not None:
            return prefers_drafts(disagree=disagree, draft_kept=measured.draft_kept.value)
        return round_trip_s < disagree * step_s

    def _answer(self, frame: Frame, now_s: float) -> list[Frame]:
        if isinstance(frame, Close):
            self._confirm_up_to(min(frame.pos, len(self.tokens)))
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
                self._measured.round_trip_s.add(now_s - pending.sent_s)
                pending.correction = Correction(codes=frame.codes, scale=frame.scale)
                return self._confirm_corrected(now_s)
            return []
        if self.config.answer != "token":
            return []
        if isinstance(frame, Ack):
            self._measured.round_trip_s.add(now_s - pending.sent_s)
            self._confirm_up_to(position + 1)
            return self.end_if_finished(now_s)
        if isinstance(frame, Object) and frame.token < len(pending.logits):
            self._measured.round_trip_s.add(now_s - pending.sent_s)
            self._confirm_up_to(position)
            if frame.token != pending.assumed_token:
                self._replace(position, frame.token)
            self._confirm_up_to(position + 1)
            return self.end_if_finished(now_s)
        return []

    def _confirm_corrected(self, now_s: float) -> list[Frame]:
        """Decide, in order, every position whose correction is there, is late, or is not needed."""
        first = self.num_confirmed
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
            epoch=self.epoch,
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
            self._apply_draft()
        return []

    def _apply_draft(self) -> None:
        """Assume the draft's tokens after the last decoded position, if the draft agrees up to there."""
        draft = self._draft
        if draft is None or len(self.tokens) > self.num_decoded or self.ended is not None or self._may_have_ended():
            return
        known = self.tokens[draft.pos :] if draft.pos <= len(self.tokens) else None
        drafted = draft.tokens.tolist()
        if known is None or drafted[: len(known)] != known:
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
        """Whether the last token, confirmed or not, ends the text. A prompt may end with such a token."""
        return len(self.tokens) > self.num_prompt and self.tokens[-1] in self.config.stop_token_ids

    def _replace(self, position: int, token: int) -> None:
        """Another token than the assumed one: drop what was built on that."""
        pending = self._pending[position]
        dropped = [p for p in self._pending if p > position]
        for p in dropped:
            del self._pending[p]
        self.counters.num_wasted_steps += len(dropped)
        self.counters.num_rollbacks += 1
        if not pending.delayed:
            pending.delayed = True
            self.counters.num_delayed += 1
        self._cut(position)
        self.tokens.append(token)
        self.num_decoded = position + 1
        self.epoch = (self.epoch + 1) % EPOCHS

    def _cut(self, position: int) -> None:
        """Forget the tokens from `position` on, those that only a draft assumed too."""
        del self.tokens[position:]
        self.num_cached = min(self.num_cached, position)
        if self.num_taps_sent:
            self.num_taps_sent = min(self.num_taps_sent, position + 1)

    def _confirm_up_to(self, position: int) -> None:
        measured = self._measured
        while self.num_confirmed < position:
            pending = self._pending.pop(self.num_confirmed)
            token = self.tokens[self.num_confirmed]
            if pending.consulted and not pending.is_late:
                measured.disagree.add(float(token != pending.base_token))
            if pending.is_drafted:
                kept = token == pending.assumed_token
                self.counters.num_drafted += 1
                self.counters.num_drafts_kept += kept
                measured.draft_kept.add(float(kept))
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
