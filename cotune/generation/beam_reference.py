"""Beam search in one process: what every transport has to reproduce, token for token and score for score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cotune.errors import InputError
from cotune.generation.beam_cursors import BeamCursors
from cotune.generation.beams import (
    BeamCounters,
    BeamOptions,
    BeamSearch,
    FinishedBeam,
    Proposal,
    check_beams,
    check_memory,
)
from cotune.generation.protocols import DecodingBackbone, RowWork, StepFeatures
from cotune.generation.reference import Personal
from cotune.generation.request import Decision, GenerationRequest
from cotune.generation.stopping import Detokenize, Ending, find_ending


@dataclass(frozen=True, kw_only=True)
class BeamGeneration:
    """What a search found.

    Attributes:
        decisions: of the best text, up to a stop string.
        ending: how it ended.
        beams: all finished texts, the best first.
        counters: how often the device was asked.
    """

    decisions: list[Decision]
    ending: Ending
    beams: tuple[FinishedBeam, ...]
    counters: BeamCounters

    @property
    def token_ids(self) -> list[int]:
        return [decision.token_id for decision in self.decisions]


def cut_at_ending(
    decisions: Sequence[Decision], request: GenerationRequest, detokenize: Detokenize | None
) -> tuple[list[Decision], Ending | None]:
    """The decisions up to the first ending among them, and which that is; None if there is none."""
    token_ids = [decision.token_id for decision in decisions]
    # Without stop strings only the last token can be an end.
    first = 1 if request.stop_strings else len(token_ids)
    for num_tokens in range(first, len(token_ids) + 1):
        ending = find_ending(token_ids[:num_tokens], request, detokenize)
        if ending is not None:
            return list(decisions[:num_tokens]), ending
    return list(decisions), None


def propose(features: StepFeatures, personal: Personal | None, request: GenerationRequest, position: int) -> Proposal:
    """What comes at `position` in one beam, asking the device where the mode and its gate say so.

    Raises:
        InputError: a gated mode without a gate.
    """
    base_token_id = int(features.logits.argmax())
    if personal is None:
        return Proposal(logits=features.logits, base_token_id=base_token_id, consulted=False)
    mode = request.combination
    if mode.is_gated:
        if personal.gate is None:
            raise InputError(f"mode {mode.name} needs a gate, and the plugin has none; tune it with a gate")
        if not personal.gate.consults(features.hidden):
            return Proposal(logits=features.logits, base_token_id=base_token_id, consulted=False)
    # Beams are refused for networks with a memory, so an empty one is all there is.
    correction = personal.corrector.open().correct(position, *features.quantised_taps())
    delta = personal.output_basis.delta(correction)
    return Proposal(logits=mode.combine(features.logits, delta), base_token_id=base_token_id, consulted=True)


def search(
    backbone: DecodingBackbone,
    personal: Personal | None,
    request: GenerationRequest,
    options: BeamOptions,
    detokenize: Detokenize | None = None,
) -> BeamGeneration:
    """Search in this process: a pure function of weights and prompt.

    Args:
        backbone: the frozen model; all beams go through one pass.
        personal: the device's part; None is the base model alone.
        request: what to do; greedy, mode integration or spa.
        options: how wide.
        detokenize: from token ids to text; needed for stop strings.

    Raises:
        InputError: a request that beams cannot serve.
    """
    check_beams(mode=request.mode, schedule="blocking", answer="correction", sampling=request.sampling)
    if personal is not None:
        check_memory(personal.corrector)
    if request.stop_strings and detokenize is None:
        raise InputError("stop_strings needs detokenize, a function from token ids to text")
    beams = BeamSearch(options, max_new_tokens=request.max_new_tokens, stop_token_ids=request.stop_token_ids)
    cursors = BeamCursors(backbone.cursor())
    try:
        features = [cursors.cursors[0].extend(request.prompt_ids)]
        while True:
            beams.advance([propose(one, personal, request, cursors.cursors[0].length) for one in features])
            if beams.is_over:
                break
            cursors.branch([beam.parent for beam in beams.running])
            work = [
                RowWork(cursor=cursor, token_ids=np.array([beam.decisions[-1].token_id], np.int64))
                for cursor, beam in zip(cursors.cursors, beams.running, strict=True)
            ]
            features = [one for (one,) in backbone.extend(work)]
    finally:
        cursors.close()
    decisions, ending = cut_at_ending(beams.finished[0].decisions, request, detokenize)
    assert ending is not None
    return BeamGeneration(decisions=decisions, ending=ending, beams=tuple(beams.finished), counters=beams.counters)
