"""The device's side of one generation, as a state machine without network, threads or clock.

In the `token` form the device decides: it combines the base logits that it was sent with its own delta, and
answers each consulted position with an acknowledgement or with its own token. In the `correction` form it
answers each consulted position with its correction in the shared output basis, and the cloud decides and
reports the tokens. Either way the tokens are those of `cotune.generation.generate`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cotune.device.drafter import Drafter, LookupDrafter
from cotune.device.drafting import Drafting
from cotune.device.pushed_taps import PushedTaps
from cotune.errors import ConnectionLostError, FrameError, WireError
from cotune.generation.reference import Personal
from cotune.generation.request import DRAFTED_SCHEDULES, Decision, GenerationRequest
from cotune.generation.sampling import PartialLogits, choose_certified
from cotune.generation.stopping import Detokenize, Ending, find_ending
from cotune.wire.frames import (
    Ack,
    AnswerCode,
    Close,
    Correct,
    Draft,
    End,
    EndReason,
    Frame,
    Logits,
    ModeCode,
    More,
    Object,
    Open,
    Opened,
    ScheduleCode,
    Step,
    Taps,
    Tokens,
)

# The second request for logits asks for this many times the first, the third for all.
MORE_FACTOR = 4


class DeviceStream:
    """One generation on the device.

    Args:
        request: what to do.
        personal: the side network, the shared output basis and the gate.
        tap_shape: (num_taps, tap_dim) of the cloud's taps.
        schedule: who waits for whom.
        answer: `token` or `correction`.
        top_k: base logits that each step brings in the token form.
        window: how far the cloud may run ahead.
        deadline_ms: the cloud may go on with its own token where an answer is later than this; 0 for never.
        drafter: continues the text in the schedules `drafted` and `auto`; None looks it up in the text itself.
        detokenize: from token ids to text; needed for stop strings.
    """

    def __init__(
        self,
        request: GenerationRequest,
        personal: Personal,
        *,
        tap_shape: tuple[int, int],
        schedule: str = "optimistic",
        answer: str = "correction",
        top_k: int = 32,
        window: int = 32,
        deadline_ms: int = 0,
        drafter: Drafter | None = None,
        detokenize: Detokenize | None = None,
    ) -> None:
        self.request = request
        self.schedule = schedule
        self.answer = answer
        self.top_k = top_k
        self.window = window
        self.deadline_ms = deadline_ms
        self.decisions: list[Decision] = []
        self.ending: Ending | None = None
        self.cloud_counters: dict[str, object] | None = None
        self.device_s = 0.0
        self.num_corrections = 0
        self.num_certificate_misses = 0
        self.num_drafts = 0
        self.session = 0
        self._personal = personal
        self._taps = PushedTaps(personal.corrector, tap_shape, len(request.prompt_ids))
        self._detokenize = detokenize
        self._ticket: bytes | None = None
        self._is_opening = False
        self._epoch = 0
        self._waiting: deque[Step] = deque()
        self._undecided: tuple[Step, NDArray[np.float32], int] | None = None
        # By epoch and position.
        self._steps: dict[tuple[int, int], tuple[int, int]] = {}
        self._text: list[int] = request.prompt_ids.tolist()
        self._drafting: Drafting | None = None
        if schedule in DRAFTED_SCHEDULES:
            self._drafting = Drafting(drafter or LookupDrafter(), personal.output_basis.vocab_size)

    @property
    def is_done(self) -> bool:
        """The text is complete and the cloud has reported what it cost."""
        return self.ending is not None and self.cloud_counters is not None

    def has_ended(self) -> bool:
        """The text is complete, whether or not the cloud knows."""
        return self.ending is not None

    @property
    def token_ids(self) -> list[int]:
        return [decision.token_id for decision in self.decisions]

    @property
    def num_decided(self) -> int:
        """How many tokens are decided."""
        return len(self.decisions)

    @property
    def next_position(self) -> int:
        return len(self.request.prompt_ids) + len(self.decisions)

    def open_frame(self) -> Open:
        """The frame that starts this generation, or resumes it on a new connection."""
        self._is_opening = True
        gate = self._personal.gate
        needs_gate = self.request.combination.is_gated or self.schedule == "gated"
        return Open(
            session=self.session,
            mode=ModeCode[self.request.mode.upper()],
            schedule=ScheduleCode[self.schedule.upper()],
            answer=AnswerCode[self.answer.upper()],
            prompt_ids=self.request.prompt_ids,
            generated_ids=np.array(self.token_ids, np.int64),
            max_new_tokens=self.request.max_new_tokens,
            resume=self._ticket is not None,
            ticket=self._ticket or bytes(16),
            top_k=self.top_k,
            window=self.window,
            deadline_ms=self.deadline_ms,
            taps_from=self._taps.open(self.next_position),
            seed=self.request.sampling.seed,
            temperature=self.request.sampling.temperature,
            top_p=self.request.sampling.top_p,
            **({} if gate is None or not needs_gate else gate.open_fields()),
        )

    # Between connections, while the cloud is out of reach. The next `open_frame` tells it what became of the text.

    def adopt(self, token_ids: Sequence[int]) -> list[Decision]:
        """Go on with tokens of the device's own, up to the end of the text, which they may bring; gives those taken."""
        num_known = len(self.decisions)
        for token in token_ids:
            if self.ending is None:
                self._append(Decision(token_id=token, base_token_id=token, consulted=False, local=True))
        return self.decisions[num_known:]

    def forget_last(self, num_tokens: int) -> None:
        """Take back the last tokens of a text that has not ended, such as those of half a character."""
        keep = len(self.decisions) - num_tokens
        del self.decisions[keep:]
        del self._text[len(self.request.prompt_ids) + keep :]

    def end_alone(self, reason: str) -> None:
        """The text ends here, for a `reason` of `Ending` that its tokens do not show."""
        self.ending = Ending(reason, len(self.decisions))

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
            return self._opened(frame)
        if frame.session != self.session:
            return []
        if isinstance(frame, End):
            self._finish(frame)
            return []
        if self.ending is not None:
            return []
        if isinstance(frame, Tokens):
            return self._take_tokens(frame)
        if isinstance(frame, Step):
            return self._correct(frame) if self.answer == "correction" else self._take_step(frame)
        if isinstance(frame, Logits):
            return self._take_logits(frame)
        if isinstance(frame, Taps) and frame.epoch == self._epoch:
            self._taps.read(frame.pos, frame.taps)
        return []

    def _opened(self, frame: Opened) -> list[Frame]:
        if not self._is_opening:
            return []
        self._is_opening = False
        if frame.pos != self.next_position:
            raise WireError(
                f"the cloud opened the session at position {frame.pos}, expected {self.next_position}; "
                "is it of the same cotune version?"
            )
        self.session, self._ticket, self._epoch = frame.session, frame.ticket, frame.epoch
        self._waiting.clear()
        self._undecided = None
        self._steps.clear()
        if self.ending is not None and self.ending.reason == "stop_string":
            return [self._close()]
        if self._drafting is None or self.ending is not None:
            return []
        self._drafting.forget()
        return self._draft()

    def _draft(self, frontier: int | None = None, *, is_replaced: bool = False) -> list[Frame]:
        """Say how the text goes on, if there is something new to say.

        Args:
            frontier: the last position that the cloud computed; None for the last decided one.
            is_replaced: the last decided token is not what the cloud went on with.
        """
        if self._drafting is None or self.ending is not None:
            return []
        positions = range(len(self._text), (frontier or 0) + 1)
        steps = [self._steps.get((self._epoch, position)) for position in positions]
        if None in steps:
            return []
        running = [step[1] for step in steps if step is not None]
        expected = self._drafting.next(self._text, running, is_replaced=is_replaced)
        if expected is None:
            return []
        self.num_drafts += 1
        tokens = np.array(expected.tokens, np.int64)
        return [Draft(epoch=self._epoch, session=self.session, pos=expected.pos, tokens=tokens)]

    def _finish(self, frame: End) -> None:
        if self.ending is None and frame.reason is EndReason.SHUTDOWN:
            raise ConnectionLostError("the cloud is shutting down; connect again, there or elsewhere, to go on")
        if self.ending is None:
            raise WireError(
                f"the cloud ended the session ({frame.reason.name.lower()}) after {len(self.decisions)} tokens, "
                "before the text was complete; try again"
            )
        self.cloud_counters = frame.counters

    # The correction form.

    def _correct(self, step: Step) -> list[Frame]:
        if self._is_stale(step) or (step.epoch == self._epoch and self._taps.is_repeated(step.pos)):
            return []
        self._epoch = step.epoch
        self._steps[step.epoch, step.pos] = step.base_token, step.running_token
        if not step.consult:
            self._taps.read(step.pos, step.taps)
            return []
        correction = self._taps.correct(step.pos, step.taps)
        self.num_corrections += 1
        # The draft first: it is there when the correction lets the cloud go on.
        return [
            *self._draft(step.pos),
            Correct(
                epoch=step.epoch,
                session=self.session,
                pos=step.pos,
                codes=correction.codes,
                scale=correction.scale,
            ),
        ]

    def _is_stale(self, step: Step) -> bool:
        # A cloud that branches where it waits has several texts under way, each with an epoch of its own.
        may_branch = self.schedule == "gated" and not self._taps.remembers
        return not may_branch and (step.epoch - self._epoch) & 0xFFFF >= 0x8000

    def _take_tokens(self, frame: Tokens) -> list[Frame]:
        replies: list[Frame] = []
        is_replaced = False
        columns = (frame.tokens, frame.consulted, frame.changed, frame.late)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for position, (token, consulted, changed, late) in enumerate(rows, start=frame.pos):
            if position != self.next_position or self.ending is not None:
                continue
            base_token, running = self._steps.pop((frame.epoch, position), (token, token))
            if running != token:
                is_replaced = True
                self._taps.forget_after(position)
                if frame.epoch == self._epoch:
                    # What still comes of this epoch was sent before the cloud knew.
                    self._epoch = (self._epoch + 1) & 0xFFFF
            base_token = base_token if changed else token
            replies += self._append(Decision(token_id=token, base_token_id=base_token, consulted=consulted, late=late))
        self._steps = {place: step for place, step in self._steps.items() if place[1] >= self.next_position}
        # What the cloud went on with is gone, and what was drafted after it.
        return [*replies, *self._draft(is_replaced=True)] if is_replaced else replies

    # The token form.

    def _take_step(self, step: Step) -> list[Frame]:
        if step.epoch != self._epoch:
            return []
        if self._undecided is not None:
            if step.pos == self.next_position + 1 + len(self._waiting):
                self._waiting.append(step)
            return []
        if step.pos != self.next_position:
            return []
        if not step.consult:
            self._taps.read(step.pos, step.taps)
            base = step.base_token
            return self._append(Decision(token_id=base, base_token_id=base, consulted=False))
        correction = self._taps.correct(step.pos, step.taps)
        self.num_corrections += 1
        delta = self._personal.output_basis.delta(correction)
        partial = PartialLogits(ids=step.ids, logits=step.logits, log_normalizer=step.log_normalizer)
        return self._decide(step, delta, partial, self.top_k)

    def _take_logits(self, frame: Logits) -> list[Frame]:
        if self._undecided is None or frame.epoch != self._epoch or frame.pos != self._undecided[0].pos:
            return []
        step, delta, k = self._undecided
        if len(frame.ids) < min(k, len(delta)):
            return []
        self._undecided = None
        partial = PartialLogits(ids=frame.ids, logits=frame.logits, log_normalizer=frame.log_normalizer)
        replies = self._decide(step, delta, partial, k)
        while self._waiting and self._undecided is None and self.ending is None:
            replies += self._take_step(self._waiting.popleft())
        return replies

    def _decide(self, step: Step, delta: NDArray[np.float32], base: PartialLogits, k: int) -> list[Frame]:
        mode = self.request.combination
        if mode.adds_base and (len(base.ids) == 0 or base.ids[-1] >= len(delta)):
            raise FrameError(
                f"the step at position {step.pos} brings {len(base.ids)} logits of a vocabulary of {len(delta)}, "
                "expected at least one and none beyond it; is the cloud of the same cotune version?"
            )
        token = choose_certified(base, delta, self.request.sampling, step.pos, adds_base=mode.adds_base)
        if token is None:
            wanted = k * MORE_FACTOR if k == self.top_k and k * MORE_FACTOR < len(delta) else 0
            self.num_certificate_misses += k == self.top_k
            self._undecided = (step, delta, wanted or len(delta))
            return [More(epoch=step.epoch, session=self.session, pos=step.pos, num_wanted=wanted)]
        place = {"epoch": step.epoch, "session": self.session}
        decision = Decision(token_id=token, base_token_id=step.base_token, consulted=True)
        answer: Frame = Ack(**place, pos=step.pos + 1)
        if token != step.running_token:
            self._epoch = (self._epoch + 1) & 0xFFFF
            self._waiting.clear()
            answer = Object(**place, pos=step.pos, token=token)
        closing = self._append(decision)
        # The draft first: it is there when the answer lets the cloud go on.
        return [*self._draft(is_replaced=isinstance(answer, Object)), answer, *closing]

    # Both.

    def _append(self, decision: Decision) -> list[Frame]:
        self.decisions.append(decision)
        self._text.append(decision.token_id)
        if self._drafting is not None:
            self._drafting.note(self._text)
        self.ending = find_ending(self.token_ids, self.request, self._detokenize)
        if self.ending is not None and self.ending.reason == "stop_string":
            return [self._close()]
        return []

    def _close(self) -> Close:
        return Close(epoch=self._epoch, session=self.session, pos=self.next_position, reason=EndReason.STOP_STRING)
