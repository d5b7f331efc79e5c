"""The single-process engine: what every transport, schedule and answer form has to reproduce, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.generation.gate import Gate
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import Corrector, Cursor, DecodingBackbone, RowWork, SideState, StepFeatures
from cotune.generation.request import Decision, GenerationRequest
from cotune.generation.sampling import choose
from cotune.generation.side_state import first_position
from cotune.generation.stopping import Detokenize, Ending, find_ending


@dataclass(frozen=True, kw_only=True)
class Personal:
    """What a device adds to a backbone: its side network, the shared basis it speaks in, and its gate."""

    corrector: Corrector
    output_basis: OutputBasis
    gate: Gate | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The decisions of one generation, in order, and how it ended."""

    decisions: list[Decision]
    ending: Ending

    @property
    def token_ids(self) -> list[int]:
        return [decision.token_id for decision in self.decisions]


def decide(
    features: StepFeatures,
    personal: Personal | None,
    request: GenerationRequest,
    position: int,
    side: SideState | None,
) -> Decision:
    """Decide the token at `position` from one step's features.

    Args:
        features: of that position.
        personal: the device's part; None is the base model alone.
        request: what to do.
        position: of the token.
        side: what the side network remembers of the sequence; it reads this position too, consulted or not.

    Raises:
        InputError: a gated mode without a gate, or the side network has not read the positions before.
    """
    base_token_id = choose(features.logits, request.sampling, position)
    unconsulted = Decision(token_id=base_token_id, base_token_id=base_token_id, consulted=False)
    if personal is None or side is None:
        return unconsulted
    mode = request.combination
    if mode.is_gated:
        if personal.gate is None:
            raise InputError(f"mode {mode.name} needs a gate, and the plugin has none; tune it with a gate")
        if not personal.gate.consults(features.hidden):
            if personal.corrector.reads_every_position:
                side.read(position, *features.quantised_taps())
            return unconsulted
    correction = side.correct(position, *features.quantised_taps())
    logits = mode.combine(features.logits, personal.output_basis.delta(correction))
    return Decision(token_id=choose(logits, request.sampling, position), base_token_id=base_token_id, consulted=True)


def read_prompt(
    backbone: DecodingBackbone, prompt_ids: NDArray[np.int64], first: int
) -> tuple[Cursor, list[StepFeatures]]:
    """Read a prompt as the cloud does; a cursor after it, and the features of positions `first` .. len(prompt_ids)."""
    num_prompt = len(prompt_ids)
    cursor = backbone.cursor(num_prompt)
    if first >= num_prompt:
        return cursor, [cursor.extend(prompt_ids)]
    features: list[StepFeatures] = []
    for start in range(0, num_prompt, backbone.prompt_chunk):
        end = min(start + backbone.prompt_chunk, num_prompt)
        # Reading tokens start .. end - 1 gives the features of positions start + 1 .. end.
        num_outputs = min(end - start, max(0, end - first + 1))
        work = RowWork(cursor=cursor, token_ids=prompt_ids[start:end], num_outputs=num_outputs)
        features += backbone.extend([work])[0]
    return cursor, features


def begin(
    backbone: DecodingBackbone, personal: Personal | None, request: GenerationRequest
) -> tuple[Cursor, SideState | None, StepFeatures]:
    """Read the prompt; a cursor after it, what the side network remembers, and the first token's features."""
    num_prompt = len(request.prompt_ids)
    side, first = None, num_prompt
    if personal is not None:
        side, first = personal.corrector.open(), first_position(num_prompt, personal.corrector.prompt_window)
    cursor, (*before, features) = read_prompt(backbone, request.prompt_ids, first)
    if side is not None:
        for position, one in enumerate(before, start=first):
            side.read(position, *one.quantised_taps())
    return cursor, side, features


def stream(backbone: DecodingBackbone, personal: Personal | None, request: GenerationRequest) -> Iterator[Decision]:
    """Decide token after token without end; the caller stops. See `generate`."""
    cursor, side, features = begin(backbone, personal, request)
    while True:
        decision = decide(features, personal, request, cursor.length, side)
        yield decision
        features = cursor.extend(np.array([decision.token_id], np.int64))


def generate(
    backbone: DecodingBackbone,
    personal: Personal | None,
    request: GenerationRequest,
    detokenize: Detokenize | None = None,
) -> Generation:
    """Generate in this process: a pure function of weights, prompt and seed.

    Args:
        backbone: the frozen model.
        personal: the device's part; None is the base model alone.
        request: what to do.
        detokenize: from token ids to text; needed for stop strings.
    """
    if request.stop_strings and detokenize is None:
        raise InputError("stop_strings needs detokenize, a function from token ids to text")
    decisions: list[Decision] = []
    for decision in stream(backbone, personal, request):
        decisions.append(decision)
        ending = find_ending([d.token_id for d in decisions], request, detokenize)
        if ending is not None:
            return Generation(decisions=decisions, ending=ending)
    raise AssertionError("stream never ends by itself")
