"""Beam search: the likeliest texts instead of one token after the other (SPA, arXiv 2403.07088, decodes with it).

`BeamSearch` is the search itself, without backbone, network or clock: the reference engine
(`cotune.generation.beam_reference`) and the cloud (`cotune.cloud.beam_stream`) feed it the logits of all running beams,
step after step, so both find the same texts.

    score of a finished text   log P(text | prompt) / length ** length_penalty
    ties                       the earlier beam, then the lower token id
    end                        as `generate(num_beams=B, early_stopping=False)` of transformers: B texts are finished,
                               and the best running beam, divided by its length now ** length_penalty, is not above
                               the worst of them; or max_new_tokens
    candidates                 as there: the best max(2, 1 + number of stop tokens) * B; a text is finished where a
                               stop token is among the best B of these

log P sums float64 log-softmax of z + sigma delta over the whole vocabulary, so beams that the device was asked about
and beams that it was not are comparable. A stop string ends no beam: the best text is cut before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.generation.modes import mode_named
from cotune.generation.protocols import Corrector
from cotune.generation.request import Decision
from cotune.generation.sampling import Sampling

MAX_BEAMS = 8
MAX_LENGTH_PENALTY = 10.0
BEAM_MODES = ("integration", "spa")
BEAM_SCHEDULES = ("blocking", "gated")


@dataclass(frozen=True, kw_only=True)
class BeamOptions:
    """How wide to search.

    Attributes:
        num_beams: B, 2 to 8.
        length_penalty: exponent of the length; above 0 favours long texts, below 0 short ones; -10 to 10.
    """

    num_beams: int
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.num_beams <= MAX_BEAMS:
            raise InputError(f"num_beams is {self.num_beams}, expected 2 to {MAX_BEAMS}; leave it out for no beams")
        if not abs(self.length_penalty) <= MAX_LENGTH_PENALTY:
            raise InputError(
                f"length_penalty is {self.length_penalty}, expected -{MAX_LENGTH_PENALTY:g} to {MAX_LENGTH_PENALTY:g}"
            )

    def score(self, log_prob: float, length: int) -> float:
        """What finished texts are ranked by."""
        return float(log_prob / length**self.length_penalty)


def check_beams(*, mode: str, schedule: str, answer: str, sampling: Sampling) -> None:
    """Refuse what beams cannot be combined with.

    Raises:
        InputError: another mode than integration or spa, a schedule that does not wait, the token form, or sampling.
    """
    mode_named(mode)
    if mode not in BEAM_MODES:
        raise InputError(
            f"mode is {mode} with beams, expected {' or '.join(BEAM_MODES)}, whose scores can be compared between "
            "beams; use one of these, or no beams"
        )
    if schedule not in BEAM_SCHEDULES:
        raise InputError(
            f"schedule is {schedule} with beams, expected {' or '.join(BEAM_SCHEDULES)}: which beams go on is known "
            "only once the device has answered, so there is nothing to run ahead with; use schedule blocking"
        )
    if answer != "correction":
        raise InputError(
            f"answer is {answer} with beams, expected correction: the cloud ranks all beams by their whole "
            "distributions, and a token says too little; use answer correction"
        )
    if not sampling.is_greedy:
        raise InputError(
            f"temperature is {sampling.temperature} with beams, expected 0: beam search draws no tokens; "
            "use temperature 0, or no beams"
        )


def check_memory(corrector: Corrector) -> None:
    """Refuse a side network with a memory: beams that split would need copies of it.

    Raises:
        InputError: it has one.
    """
    if corrector.reads_every_position:
        raise InputError(
            "the side network remembers earlier positions, expected one without a memory for beams; "
            "use one beam, or a plugin tuned with --side ladder"
        )


@dataclass(frozen=True, kw_only=True)
class Beam:
    """A text that may still go on.

    Attributes:
        decisions: its tokens after the prompt. A token's base token is the backbone's first choice at that place where
            the device was consulted, and the token itself where it was not, since the device had no part in it.
        log_prob: log P of these tokens, float64.
        parent: which of the beams of the step before it goes on from.
    """

    decisions: tuple[Decision, ...] = ()
    log_prob: float = 0.0
    parent: int = 0

    @property
    def token_ids(self) -> list[int]:
        return [decision.token_id for decision in self.decisions]


@dataclass(frozen=True, kw_only=True)
class FinishedBeam:
    """A complete text.

    Attributes:
        decisions: as in `Beam`.
        log_prob: log P of its tokens.
        score: log_prob / length ** length_penalty.
    """

    decisions: tuple[Decision, ...]
    log_prob: float
    score: float

    @property
    def token_ids(self) -> list[int]:
        return [decision.token_id for decision in self.decisions]


@dataclass
class BeamCounters:
    """How often the device is asked, with beams.

    Attributes:
        num_steps: positions searched.
        num_beam_steps: beams at these positions, all together.
        num_consulted: of these, how many consulted the device.
        num_trips: steps at which at least one beam did: one message each.
    """

    num_steps: int = 0
    num_beam_steps: int = 0
    num_consulted: int = 0
    num_trips: int = 0

    @property
    def trips_per_step(self) -> float:
        """M per step: the share of steps with at least one transfer."""
        return self.num_trips / max(1, self.num_steps)

    @property
    def consult_rate(self) -> float:
        """p: the share of beams, step by step, that consult the device."""
        return self.num_consulted / max(1, self.num_beam_steps)

    def predicted_trips_per_step(self, num_beams: int) -> float:
        """1 - (1 - p)^B: M per step if the gates of B beams were independent.

        Example:
            >>> round(BeamCounters(num_beam_steps=100, num_consulted=62).predicted_trips_per_step(4), 3)
            0.979
        """
        return float(1.0 - (1.0 - self.consult_rate) ** num_beams)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What comes next in one beam.

    Attributes:
        logits: float32 (vocab,), z + sigma delta.
        base_token_id: the backbone's first choice.
        consulted: sigma.
    """

    logits: NDArray[np.float32]
    base_token_id: int
    consulted: bool


class BeamSearch:
    """One search. See the module's text.

    Args:
        options: how wide.
        max_new_tokens: texts end here at the latest.
        stop_token_ids: tokens that end a text and are kept as its last.

    Attributes:
        running: the beams whose next token is wanted, the best first; one at the start.
        finished: complete texts, the best first, at most num_beams; ranked for good once `is_over`.
    """

    def __init__(self, options: BeamOptions, *, max_new_tokens: int, stop_token_ids: Sequence[int]) -> None:
        self.options = options
        self.counters = BeamCounters()
        self.running: list[Beam] = [Beam()]
        self.finished: list[FinishedBeam] = []
        self.is_over = False
        self._max_new_tokens = max_new_tokens
        self._stop_token_ids = frozenset(stop_token_ids)
        self._num_candidates = max(2, 1 + len(self._stop_token_ids)) * options.num_beams

    @property
    def num_steps(self) -> int:
        """How many tokens each running beam has."""
        return self.counters.num_steps

    def advance(self, proposals: Sequence[Proposal]) -> None:
        """Go one token further.

        Args:
            proposals: one for each running beam, in their order.
        """
        assert not self.is_over and len(proposals) == len(self.running)
        num_consulted = sum(proposal.consulted for proposal in proposals)
        self.counters.num_steps += 1
        self.counters.num_beam_steps += len(proposals)
        self.counters.num_consulted += num_consulted
        self.counters.num_trips += num_consulted > 0

        length, num_beams = self.num_steps, self.options.num_beams
        running: list[Beam] = []
        for rank, (log_prob, parent, token_id) in enumerate(self._candidates(proposals)):
            beam = self._child(parent, token_id, log_prob, proposals[parent])
            if token_id not in self._stop_token_ids and length < self._max_new_tokens:
                running.append(beam)
            elif rank < num_beams:
                score = self.options.score(log_prob, length)
                self.finished.append(FinishedBeam(decisions=beam.decisions, log_prob=log_prob, score=score))
        # Stable: of equal scores the earlier text comes first.
        self.finished.sort(key=lambda text: -text.score)
        del self.finished[num_beams:]
        self.running = running[:num_beams]
        self.is_over = not self.running or not self._can_improve()

    def _candidates(self, proposals: Sequence[Proposal]) -> list[tuple[float, int, int]]:
        """(log_prob, beam, token id) of the best continuations, the best first."""
        columns: list[tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]] = []
        for i, (beam, proposal) in enumerate(zip(self.running, proposals, strict=True)):
            log_probs = _log_softmax(proposal.logits)
            last = len(log_probs) - min(self._num_candidates, len(log_probs))
            ids = np.flatnonzero((log_probs >= np.partition(log_probs, last)[last]) & np.isfinite(log_probs))
            columns.append((beam.log_prob + log_probs[ids], np.full(len(ids), i, np.int64), ids.astype(np.int64)))
        scores, beams, tokens = (np.concatenate(column) for column in zip(*columns, strict=True))
        order = np.lexsort((tokens, beams, -scores))[: self._num_candidates]
        return list(zip(scores[order].tolist(), beams[order].tolist(), tokens[order].tolist(), strict=True))

    def _child(self, parent: int, token_id: int, log_prob: float, proposal: Proposal) -> Beam:
        base = proposal.base_token_id if proposal.consulted else token_id
        decision = Decision(token_id=token_id, base_token_id=base, consulted=proposal.consulted)
        return Beam(decisions=(*self.running[parent].decisions, decision), log_prob=log_prob, parent=parent)

    def _can_improve(self) -> bool:
        if len(self.finished) < self.options.num_beams:
            return True
        return self.options.score(self.running[0].log_prob, self.num_steps) > self.finished[-1].score


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    largest = wide.max()
    shifted: NDArray[np.float64] = wide - (largest + math.log(np.exp(wide - largest).sum()))
    return shifted
