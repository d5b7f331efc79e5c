"""The device's side of one beam search, as a state machine without network, threads or clock.

Its sibling is `cotune.device.stream`. Each `BeamStep` says which beams are running; the device keeps their texts by
their parents, answers all that consult it with one `BeamCorrect`, and gets the finished texts at the end. The texts and
their scores are those of `cotune.generation.beam_reference.search`.
"""

from __future__ import annotations

import time

import numpy as np

from cotune.errors import ConnectionLostError, FrameError, InputError, WireError
from cotune.generation.beam_reference import cut_at_ending
from cotune.generation.beams import BeamCounters, BeamOptions, FinishedBeam, check_beams, check_memory
from cotune.generation.reference import Personal
from cotune.generation.request import Decision, GenerationRequest
from cotune.generation.stopping import Detokenize, Ending
from cotune.wire.codec import unpack_taps
from cotune.wire.frames import (
    MAX_BEAM_TOKENS,
    AnswerCode,
    BeamCorrect,
    BeamStep,
    BeamTokens,
    End,
    EndReason,
    Frame,
    ModeCode,
    Open,
    Opened,
    ScheduleCode,
)


class BeamDeviceStream:
    """One beam search on the device.

    Args:
        request: what to do; greedy, mode integration or spa.
        personal: the side network, the shared output basis and the gate.
        options: how wide.
        tap_shape: (num_taps, tap_dim) of the cloud's taps.
        schedule: blocking or gated; with beams both wait where any beam consults the device.
        detokenize: from token ids to text; needed for stop strings, which cut the best text.

    Attributes:
        texts: the running beams as far as known, token ids, the best first.
        beams: the finished texts, the best first; known at the end.
        decisions: of the best one, up to a stop string; known at the end.

    Raises:
        InputError: a request that beams cannot serve.
    """

    num_certificate_misses = 0

    def __init__(
        self,
        request: GenerationRequest,
        personal: Personal,
        options: BeamOptions,
        *,
        tap_shape: tuple[int, int],
        schedule: str = "blocking",
        detokenize: Detokenize | None = None,
    ) -> None:
        check_beams(mode=request.mode, schedule=schedule, answer="correction", sampling=request.sampling)
        check_memory(personal.corrector)
        if request.max_new_tokens > MAX_BEAM_TOKENS:
            raise InputError(
                f"max_new_tokens is {request.max_new_tokens} with beams, expected at most {MAX_BEAM_TOKENS}"
            )
        if request.stop_strings and detokenize is None:
            raise InputError("stop_strings needs detokenize, a function from token ids to text")
        self.request = request
        self.options = options
        self.schedule = schedule
        self.texts: list[list[int]] = [[]]
        self.beams: tuple[FinishedBeam, ...] = ()
        self.decisions: list[Decision] = []
        self.ending: Ending | None = None
        self.cloud_counters: dict[str, object] | None = None
        self.device_s = 0.0
        self.num_corrections = 0
        self.session = 0
        self._personal = personal
        self._tap_shape = tap_shape
        self._detokenize = detokenize
        self._ticket: bytes | None = None
        self._is_opening = False
        self._epoch = 0
        # The position of the last step taken in; None before the first. It may come once more after a reconnect.
        self._last: int | None = None
        self._comes_again = False
        self._parents: tuple[int, ...] = ()
        self._finished: dict[int, FinishedBeam] = {}
        self._num_texts = 0

    @property
    def is_done(self) -> bool:
        """The texts are there and the cloud has reported what they cost."""
        return self.cloud_counters is not None

    @property
    def token_ids(self) -> list[int]:
        return [decision.token_id for decision in self.decisions]

    @property
    def num_decided(self) -> int:
        """How many positions the beams have got past, as far as this device knows."""
        return len(self.texts[0])

    @property
    def counters(self) -> BeamCounters:
        """How often this device was asked, as the cloud counted it; known at the end."""
        cloud = self.cloud_counters or {}
        steps, beam_steps, consulted, trips = (
            int(str(cloud.get(name, 0)))
            for name in ("num_searched", "num_beam_steps", "num_beams_consulted", "num_trips")
        )
        return BeamCounters(num_steps=steps, num_beam_steps=beam_steps, num_consulted=consulted, num_trips=trips)

    def open_frame(self) -> Open:
        """The frame that starts this search, or resumes it on a new connection."""
        self._is_opening = True
        gate = self._personal.gate
        needs_gate = self.request.combination.is_gated or self.schedule == "gated"
        return Open(
            session=self.session,
            mode=ModeCode[self.request.mode.upper()],
            schedule=ScheduleCode[self.schedule.upper()],
            answer=AnswerCode.CORRECTION,
            prompt_ids=self.request.prompt_ids,
            # The best beam says how many steps this device knows.
            generated_ids=np.array(self.texts[0], np.int64),
            max_new_tokens=self.request.max_new_tokens,
            resume=self._ticket is not None,
            ticket=self._ticket or bytes(16),
            top_k=0,
            num_beams=self.options.num_beams,
            length_penalty=self.options.length_penalty,
            **({} if gate is None or not needs_gate else gate.open_fields()),
        )

    def on_frame(self, frame: Frame) -> list[Frame]:
        """Take one frame from the cloud; returns the frames to send. Stale and repeated ones change nothing.

        Raises:
            WireError: the cloud does what no cloud of this protocol does.
        """
        started_s = time.perf_counter()
        try:
            return self._react(frame)
        finally:
            self.device_s += time.perf_counter() - started_s

    def _react(self, frame: Frame) -> list[Frame]:
        if isinstance(frame, Opened):
            self._opened(frame)
            return []
        if frame.session != self.session or frame.epoch != self._epoch or self.is_done:
            return []
        if isinstance(frame, BeamStep):
            return self._take_step(frame)
        if isinstance(frame, BeamTokens):
            self._take_text(frame)
        elif isinstance(frame, End):
            self._finish(frame)
        return []

    def _opened(self, frame: Opened) -> None:
        if not self._is_opening:
            return
        self._is_opening = False
        start = len(self.request.prompt_ids)
        if frame.pos == start:
            # A search from the beginning: a new one, or the cloud does not know this one any more.
            self.texts, self._parents, self._last = [[]], (), None
        elif frame.pos != start + self.num_decided:
            raise WireError(
                f"the cloud opened the session at position {frame.pos}, expected {start + self.num_decided} or "
                f"{start}; is it of the same cotune version?"
            )
        self.session, self._ticket, self._epoch = frame.session, frame.ticket, frame.epoch
        self._comes_again = self._last is not None
        self._finished.clear()

    def _take_step(self, step: BeamStep) -> list[Frame]:
        start = len(self.request.prompt_ids)
        expected = start if self._last is None else self._last + 1
        if step.pos < expected and not (self._comes_again and step.pos == self._last):
            return []
        if step.pos > expected:
            raise FrameError(
                f"beam step frame: position {step.pos} came, expected {expected}; is the cloud of the same version?"
            )
        self._check(step)
        if step.pos == self._last:
            if (step.parents, step.tokens) != (self._parents, tuple(text[-1] for text in self.texts)):
                raise FrameError(f"beam step frame: other beams came for position {step.pos} than before")
        elif step.pos > start:
            pairs = zip(step.parents, step.tokens, strict=True)
            self.texts = [[*self.texts[parent], token] for parent, token in pairs]
        self._comes_again = False
        self._last, self._parents = step.pos, step.parents
        return self._correct(step)

    def _check(self, step: BeamStep) -> None:
        """Refuse beams that cannot be."""
        most = 1 if step.pos == len(self.request.prompt_ids) else self.options.num_beams
        num_before = most if step.pos == self._last else len(self.texts)
        if len(step.parents) > most or max(step.parents) >= num_before:
            raise FrameError(
                f"beam step frame: {len(step.parents)} beams with parents {step.parents} came for position {step.pos}, "
                f"expected at most {most}, of {num_before} at the position before"
            )
        last_of_prompt = int(self.request.prompt_ids[-1])
        if step.pos == len(self.request.prompt_ids) and step.tokens != (last_of_prompt,):
            raise FrameError(f"beam step frame: tokens {step.tokens} end the prompt, expected {last_of_prompt}")
        vocab_size = self._personal.output_basis.vocab_size
        if max(step.tokens) >= vocab_size:
            raise FrameError(f"beam step frame: token {max(step.tokens)} came, expected ids below {vocab_size}")

    def _correct(self, step: BeamStep) -> list[Frame]:
        beams = tuple(i for i, consults in enumerate(step.consult) if consults)
        if not beams:
            return []
        side = self._personal.corrector.open()
        corrections = [side.correct(step.pos, *unpack_taps(taps, *self._tap_shape)) for taps in step.taps]
        self.num_corrections += len(beams)
        return [
            BeamCorrect(
                epoch=self._epoch,
                session=self.session,
                pos=step.pos,
                beams=beams,
                parents=tuple(step.parents[i] for i in beams),
                codes=np.stack([correction.codes for correction in corrections]),
                scales=np.array([correction.scale for correction in corrections], np.float16),
            )
        ]

    def _take_text(self, frame: BeamTokens) -> None:
        vocab_size = self._personal.output_basis.vocab_size
        largest = max(int(frame.tokens.max()), int(frame.base_tokens.max()))
        if frame.pos != len(self.request.prompt_ids) or largest >= vocab_size:
            raise FrameError(
                f"beam tokens frame: a text from position {frame.pos} with ids up to {largest} came, expected position "
                f"{len(self.request.prompt_ids)} and ids below {vocab_size}"
            )
        columns = (frame.tokens, frame.base_tokens, frame.consulted)
        decisions = tuple(
            Decision(token_id=token, base_token_id=base, consulted=consulted)
            for token, base, consulted in zip(*(column.tolist() for column in columns), strict=True)
        )
        self._num_texts = frame.num_texts
        self._finished[frame.rank] = FinishedBeam(decisions=decisions, log_prob=frame.log_prob, score=frame.score)

    def _finish(self, frame: End) -> None:
        if frame.reason is EndReason.SHUTDOWN:
            raise ConnectionLostError("the cloud is shutting down; connect again, there or elsewhere, to go on")
        ranks = range(self._num_texts)
        decisions: list[Decision] = []
        ending: Ending | None = None
        if self._finished and all(rank in self._finished for rank in ranks):
            decisions, ending = cut_at_ending(self._finished[0].decisions, self.request, self._detokenize)
        if ending is None:
            raise WireError(
                f"the cloud ended the session ({frame.reason.name.lower()}) after {self.num_decided} tokens, "
                "before the text was complete; try again"
            )
        self.beams = tuple(self._finished[rank] for rank in ranks)
        self.decisions, self.ending, self.cloud_counters = decisions, ending, frame.counters
