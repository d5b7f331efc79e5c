"""The cloud's side of one beam search, as a state machine without network, threads or clock.

Its sibling is `cotune.cloud.stream`; a session and the engine work with either. At each position all running beams go
through one pass, and one `BeamStep` says which they are: parents, last tokens, and the taps of those that consult the
device. Where none does, the search goes on at once; else it waits for one `BeamCorrect` with all corrections. The cloud
has the base logits of all beams, so it decides alone which go on, with the same `BeamSearch` as the reference engine.

After a broken connection the device says how far it knows the beams, and is told the steps since then. A cloud that
does not know the session starts the search again: it finds the same texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.cloud.stream import EPOCHS, MAX_PASS_TOKENS, StreamConfig, StreamCounters
from cotune.errors import FrameError
from cotune.generation.beam_cursors import BeamCursors
from cotune.generation.beams import BeamOptions, BeamSearch, Proposal
from cotune.generation.gate import Gate
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import Correction, DecodingBackbone, RowWork, StepAbandonedError, StepFeatures
from cotune.wire.codec import pack_taps
from cotune.wire.frames import BeamCorrect, BeamStep, BeamTokens, Close, End, EndReason, Frame


@dataclass(frozen=True, kw_only=True)
class BeamPlan:
    """What the backbone has to do next for all beams of one search.

    Attributes:
        epoch: of the stream when it was made.
        num_steps: tokens that each beam has.
        truncate_to: tokens that each cursor keeps.
        parents: for each beam which of the cursors of the step before it branches from; None for a piece of the prompt.
        texts: for each beam the tokens to read.
        num_outputs: 1 where the features of the next position are wanted, 0 where the pass only rebuilds a cache.
    """

    epoch: int
    num_steps: int
    truncate_to: int
    parents: tuple[int, ...] | None
    texts: tuple[NDArray[np.int64], ...]
    num_outputs: int

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """All tokens of the pass."""
        return np.concatenate(self.texts)

    @property
    def num_rows(self) -> int:
        """How many sequences it brings into the pass."""
        return len(self.texts)

    def within(self, num_rows: int) -> BeamPlan | None:
        """All of it or nothing: beams go on together."""
        return self if num_rows >= self.num_rows else None

    def begin(self, backbone: DecodingBackbone, num_prompt: int) -> BeamCursors:
        """Places for a search that has none yet."""
        return BeamCursors(backbone.cursor(num_prompt))

    def prepare(self, places: BeamCursors) -> list[RowWork]:
        """Branch, and say what each beam reads. Doing it twice changes nothing.

        Raises:
            StepAbandonedError: the places are not those that this plan was made for.
        """
        if self.parents is None:
            places.shrink_to_root()
        elif places.num_branchings != self.num_steps:
            if max(self.parents) >= len(places.cursors):
                raise StepAbandonedError
            places.branch(self.parents)
            places.num_branchings = self.num_steps
        if len(places.cursors) != len(self.texts):
            raise StepAbandonedError
        for cursor in places.cursors:
            if cursor.length < self.truncate_to:
                raise StepAbandonedError
            if cursor.length > self.truncate_to:
                cursor.truncate(self.truncate_to)
        return [
            RowWork(cursor=cursor, token_ids=tokens, num_outputs=self.num_outputs)
            for cursor, tokens in zip(places.cursors, self.texts, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A running beam whose next token is being searched; `taps` are there where it consults the device."""

    logits: NDArray[np.float32]
    base_token: int
    taps: bytes | None


class BeamStream:
    """One beam search on the cloud. See the module's text.

    Args:
        session: its number on the wire.
        prompt_ids: int64 (prompt,).
        config: what the device asked for; mode, gate, max_new_tokens and stop_token_ids count here.
        options: how wide.
        output_basis: what corrections are in.
    """

    chance = 1.0
    due_s: float | None = None

    def __init__(
        self,
        session: int,
        prompt_ids: NDArray[np.int64],
        config: StreamConfig,
        options: BeamOptions,
        output_basis: OutputBasis,
    ) -> None:
        self.session = session
        self.config = config
        self.options = options
        self.counters = StreamCounters()
        self.epoch = 0
        self.ended: EndReason | None = None
        self.num_prompt = len(prompt_ids)
        self.num_cached = 0
        self.num_confirmed = self.num_prompt
        self.search = BeamSearch(options, max_new_tokens=config.max_new_tokens, stop_token_ids=config.stop_token_ids)
        self._prompt = prompt_ids
        self._basis = output_basis
        self._asked: list[_Asked] | None = None
        # (parent, last token) of the beams of each step, for devices that come back.
        self._steps: list[tuple[tuple[int, int], ...]] = [((0, int(prompt_ids[-1])),)]
        # The cache holds the prompt alone, and no beam has been branched from it.
        self._is_at_root = True
        self._stalled_since_s: float | None = None

    # What the driver asks.

    @property
    def gate(self) -> Gate | None:
        """Whose answer each step needs."""
        return self.config.gate

    @property
    def is_in_prompt(self) -> bool:
        """Whether the prompt is not read yet."""
        return self.num_cached < self.num_prompt

    @property
    def position(self) -> int:
        """The position whose token is being searched."""
        return self.num_prompt + self.search.num_steps

    def wants_step(self) -> bool:
        """Whether the backbone should do `plan()` now."""
        return self.ended is None and self._asked is None and not self.search.is_over

    def plan(self, prompt_chunk: int) -> BeamPlan:
        """The next thing for the backbone to do; prompts are read in pieces that end at multiples of `prompt_chunk`."""
        first = self.num_cached
        parents: tuple[int, ...] | None = None
        if first < self.num_prompt:
            last = min(self.num_prompt, (first // prompt_chunk + 1) * prompt_chunk)
            texts = [self._prompt[first:last]]
        else:
            running = self.search.running
            last = min(self.position, first + max(1, MAX_PASS_TOKENS // len(running)))
            start, end = first - self.num_prompt, last - self.num_prompt
            texts = [np.array(beam.token_ids[start:end], np.int64) for beam in running]
            parents = tuple(0 if self._is_at_root else beam.parent for beam in running)
        return BeamPlan(
            epoch=self.epoch,
            num_steps=self.search.num_steps,
            truncate_to=first,
            parents=parents,
            texts=tuple(texts),
            num_outputs=int(last == self.position),
        )

    # What the driver tells.

    def is_current(self, plan: BeamPlan) -> bool:
        """Whether the outcome of `plan` is still of use."""
        return self.ended is None and (plan.epoch, plan.num_steps, plan.truncate_to) == (
            self.epoch,
            self.search.num_steps,
            self.num_cached,
        )

    def on_step(
        self,
        plan: BeamPlan,
        features: Sequence[StepFeatures] | None,
        seconds: float,
        now_s: float,
        *,
        share: float = 1.0,
    ) -> list[Frame]:
        """Take the outcome of `plan`; returns the frames to send.

        Args:
            plan: what was done; it may be outdated by now.
            features: of each beam; none where the pass only filled the cache; None if it was given up.
            seconds: how long the pass took.
            now_s: the driver's clock.
            share: this stream's part of the pass.
        """
        self.counters.cloud_s += share * seconds
        if features is None or not self.is_current(plan):
            self.counters.num_steps += 1
            self.counters.num_wasted_steps += 1
            return []
        self.num_cached = plan.truncate_to + len(plan.texts[0])
        self._is_at_root = plan.parents is None
        if not features:
            return []
        self.counters.num_steps += 1
        self._asked = [self._ask(one) for one in features]
        frames: list[Frame] = [self._step_frame()]
        num_consulted = sum(asked.taps is not None for asked in self._asked)
        self.counters.num_consulted += num_consulted
        if not num_consulted:
            frames += self._advance({}, now_s)
        return frames

    def on_frame(self, frame: Frame, now_s: float) -> list[Frame]:
        """Take one frame from the device; returns the frames to send. Stale and repeated ones change nothing.

        Raises:
            FrameError: corrections for a place or for beams that the device was not asked about.
        """
        if self.ended is not None:
            return []
        if isinstance(frame, Close):
            return self.end(frame.reason, now_s)
        if not isinstance(frame, BeamCorrect) or frame.epoch != self.epoch or frame.pos < self.position:
            return []
        if frame.pos > self.position or self._asked is None:
            raise FrameError(
                f"beam correct frame: corrections for position {frame.pos} came, expected them for position "
                f"{self.position} once the device is asked"
            )
        self._check(frame, self._asked)
        corrections = {
            beam: Correction(codes=codes, scale=scale)
            for beam, codes, scale in zip(frame.beams, frame.codes, frame.scales, strict=True)
        }
        self._end_stall(now_s)
        return self._advance(corrections, now_s)

    def on_time(self, now_s: float) -> list[Frame]:
        """Nothing is ever late: beams wait for their device."""
        return []

    def note_stall(self, now_s: float) -> None:
        """The driver has nothing to do for this stream until the device answers."""
        if self.ended is None and self._stalled_since_s is None and self._asked is not None:
            self._stalled_since_s = now_s

    def resume(self, generated: list[int], taps_from: int, now_s: float) -> list[Frame]:
        """Go on with a device on a new connection: tell it the steps that it does not know.

        Args:
            generated: the best of the beams that the device holds, so many tokens as it knows steps.
            taps_from: not used; beams send the taps of consulting ones only.
            now_s: the driver's clock.
        """
        self.epoch = (self.epoch + 1) % EPOCHS
        self.ended = None
        self._stalled_since_s = None
        num_known = len(generated)
        if num_known > self.search.num_steps or self._best_at(num_known) != generated:
            num_known = 0
        self.num_confirmed = self.num_prompt + num_known
        frames: list[Frame] = [self._told(step) for step in range(num_known, self.search.num_steps)]
        if self._asked is not None:
            frames.append(self._step_frame())
        return [*frames, *self.end_if_finished(now_s)]

    def end(self, reason: EndReason, now_s: float) -> list[Frame]:
        """End the search and report what it cost."""
        if self.ended is not None:
            return []
        self._end_stall(now_s)
        self.ended = reason
        self.counters.num_delayed = self.search.counters.num_trips
        counters, beams = self.counters, self.search.counters
        return [
            End(
                epoch=self.epoch,
                session=self.session,
                pos=self.position,
                reason=reason,
                counters={
                    "num_steps": counters.num_steps,
                    "num_wasted_steps": counters.num_wasted_steps,
                    "num_rollbacks": 0,
                    "num_more_trips": 0,
                    "num_delayed": counters.num_delayed,
                    "num_late": 0,
                    "num_drafted": 0,
                    "num_drafts_kept": 0,
                    "num_branchings": 0,
                    "num_branches_kept": 0,
                    "num_searched": beams.num_steps,
                    "num_beam_steps": beams.num_beam_steps,
                    "num_beams_consulted": beams.num_consulted,
                    "num_trips": beams.num_trips,
                    "cloud_ms": round(1e3 * counters.cloud_s, 4),
                    "stall_ms": round(1e3 * counters.stall_s, 4),
                },
            )
        ]

    def end_if_finished(self, now_s: float) -> list[Frame]:
        """The finished texts and the end, where the search is over."""
        if not self.search.is_over or self.ended is not None:
            return []
        texts = self.search.finished
        frames: list[Frame] = [
            BeamTokens(
                epoch=self.epoch,
                session=self.session,
                pos=self.num_prompt,
                rank=rank,
                num_texts=len(texts),
                score=text.score,
                log_prob=text.log_prob,
                tokens=np.array(text.token_ids, np.int64),
                base_tokens=np.array([decision.base_token_id for decision in text.decisions], np.int64),
                consulted=np.array([decision.consulted for decision in text.decisions], np.bool_),
            )
            for rank, text in enumerate(texts)
        ]
        is_stopped = texts[0].token_ids[-1] in self.config.stop_token_ids
        return [*frames, *self.end(EndReason.END_TOKEN if is_stopped else EndReason.LENGTH, now_s)]

    def is_for(self, prompt_ids: NDArray[np.int64]) -> bool:
        """Whether this stream goes on from that prompt."""
        return np.array_equal(self._prompt, prompt_ids)

    def forget_cache(self) -> None:
        """The cache is gone: everything has to be read again."""
        self.num_cached = 0

    # Inside.

    def _ask(self, features: StepFeatures) -> _Asked:
        config = self.config
        fires = features.fires
        if fires is None:
            fires = config.gate is None or config.gate.consults(features.hidden)
        consulted = fires or not config.combination.is_gated
        return _Asked(
            logits=features.logits,
            base_token=int(features.logits.argmax()),
            taps=pack_taps(*features.quantised_taps()) if consulted else None,
        )

    def _step_frame(self) -> BeamStep:
        """The beams of this step with their questions."""
        assert self._asked is not None
        taps = [asked.taps for asked in self._asked]
        return self._told(self.search.num_steps, taps)

    def _told(self, step: int, taps: Sequence[bytes | None] = ()) -> BeamStep:
        parents, tokens = zip(*self._steps[step], strict=True)
        return BeamStep(
            epoch=self.epoch,
            session=self.session,
            pos=self.num_prompt + step,
            parents=parents,
            tokens=tokens,
            consult=tuple(one is not None for one in taps) or (False,) * len(parents),
            taps=tuple(one for one in taps if one is not None),
        )

    def _check(self, frame: BeamCorrect, asked: list[_Asked]) -> None:
        beams = tuple(i for i, one in enumerate(asked) if one.taps is not None)
        parents = tuple(self._steps[-1][beam][0] for beam in beams)
        if (frame.beams, frame.parents) != (beams, parents):
            raise FrameError(
                f"beam correct frame: beams {frame.beams} with parents {frame.parents} came for position {frame.pos}, "
                f"expected beams {beams} with parents {parents}"
            )
        if frame.codes.shape[1] != self._basis.dim:
            raise FrameError(
                f"beam correct frame: corrections of {frame.codes.shape[1]} codes, expected {self._basis.dim}"
            )

    def _advance(self, corrections: dict[int, Correction], now_s: float) -> list[Frame]:
        """Go one token further with the corrections of the beams that consulted the device."""
        assert self._asked is not None
        combination = self.config.combination
        proposals: list[Proposal] = []
        for beam, asked in enumerate(self._asked):
            correction = corrections.get(beam)
            delta = None if correction is None else self._basis.delta(correction)
            logits = combination.combine(asked.logits, delta)
            proposals.append(Proposal(logits=logits, base_token_id=asked.base_token, consulted=correction is not None))
        self._asked = None
        self.search.advance(proposals)
        if self.search.is_over:
            return self.end_if_finished(now_s)
        self._steps.append(tuple((beam.parent, beam.decisions[-1].token_id) for beam in self.search.running))
        return []

    def _best_at(self, step: int) -> list[int]:
        """The text of the first beam of a step, back along its parents."""
        text: list[int] = []
        beam = 0
        for rows in reversed(self._steps[1 : step + 1]):
            beam, token = rows[beam]
            text.append(token)
        return text[::-1]

    def _end_stall(self, now_s: float) -> None:
        if self._stalled_since_s is not None:
            self.counters.stall_s += now_s - self._stalled_since_s
            self._stalled_since_s = None
