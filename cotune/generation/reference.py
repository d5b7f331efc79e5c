"""The single-process engine: what every transport, schedule and answer form has to reproduce, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cotune.errors import InputError
from cotune.generation.gate import Gate
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import Corrector, DecodingBackbone, StepFeatures
from cotune.generation.request import Decision, GenerationRequest
from cotune.generation.sampling import choose
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


def decide(features: StepFeatures, personal: Personal | None, request: GenerationRequest, position: int) -> Decision:
    """Decide the token at `position` from one step's features.

    Raises:
        InputError: a gated mode without a gate.
    """
    base_token_id = choose(features.logits, request.sampling, position)
    if personal is None:
        return Decision(token_id=base_token_id, base_token_id=base_token_id, consulted=False)
    mode = request.combination
    if mode.is_gated:
        if personal.gate is None:
            raise InputError(f"mode {mode.name} needs a gate, and the plugin has none; tune it with a gate")
        if not personal.gate.consults(features.hidden):
            return Decision(token_id=base_token_id, base_token_id=base_token_id, consulted=False)
    correction = personal.corrector.correct(*features.quantised_taps())
    logits = mode.combine(features.logits, personal.output_basis.delta(correction))
    return Decision(token_id=choose(logits, request.sampling, position), base_token_id=base_token_id, consulted=True)


def stream(backbone: DecodingBackbone, personal: Personal | None, request: GenerationRequest) -> Iterator[Decision]:
    """Decide token after token without end; the caller stops. See `generate`."""
    cursor = backbone.cursor()
    tokens = request.prompt_ids
    while True:
        features = cursor.extend(tokens)
        decision = decide(features, personal, request, cursor.length)
        yield decision
        tokens = np.array([decision.token_id], np.int64)


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
