"""The single-process engine on a model small enough to follow with a pencil.

The vocabulary has four tokens. After token t the base model likes token t + 1 best (1.0) and t + 2 next (0.5). The
side network reads one tap, +1 after even tokens and -1 after odd ones, and pushes token 3 up by twice the tap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.generation.gate import Gate
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import Correction, StepFeatures
from cotune.generation.reference import Generation, Personal, decide, generate, stream
from cotune.generation.request import Decision, GenerationRequest
from cotune.generation.sampling import Sampling, choose
from cotune.generation.side_state import StatelessCorrector
from cotune.generation.stopping import Ending

VOCAB = 4


class PencilCursor:
    def __init__(self, log: list[list[int]]) -> None:
        self._tokens: list[int] = []
        self._log = log

    @property
    def length(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: NDArray[np.int64], is_wanted: Callable[[], bool] | None = None) -> StepFeatures:
        self._log.append(token_ids.tolist())
        self._tokens += token_ids.tolist()
        last = self._tokens[-1]
        logits = np.zeros(VOCAB, np.float32)
        logits[(last + 1) % VOCAB], logits[(last + 2) % VOCAB] = 1.0, 0.5
        sign = 1.0 if last % 2 == 0 else -1.0
        return StepFeatures(
            logits=logits, hidden=np.array([sign], np.float32), taps=np.array([[sign * 0.5]], np.float32)
        )

    def truncate(self, length: int) -> None:
        raise AssertionError("the reference never looks back")


class PencilBackbone:
    def __init__(self) -> None:
        self.log: list[list[int]] = []

    def cursor(self, num_prompt: int | None = None) -> PencilCursor:
        return PencilCursor(self.log)


class PencilCorrector(StatelessCorrector):
    """c = 4 t: a tap of 0.5 becomes a correction of 2."""

    def correct(self, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> Correction:
        assert tap_codes.tolist() in ([[127]], [[-127]])
        return Correction(codes=tap_codes[0], scale=np.float16(4 * tap_scales[0]))


def personal(gate: Gate | None = None) -> Personal:
    basis = OutputBasis.from_matrix(np.array([[0.0], [0.0], [0.0], [1.0]], np.float32))
    return Personal(corrector=PencilCorrector(), output_basis=basis, gate=gate)


# Fires after even tokens.
GATE = Gate(weight=np.array([1.0], np.float32))


def run(who: Personal | None, mode: str = "integration", **changes: Any) -> Generation:
    request = GenerationRequest(prompt_ids=np.array([2, 0]), mode=mode, **{"max_new_tokens": 5, **changes})
    return generate(PencilBackbone(), who, request)


def test_the_base_model_counts() -> None:
    made = run(None)
    assert made.token_ids == [1, 2, 3, 0, 1]
    assert made.ending == Ending("length", 5)
    assert not any(decision.consulted or decision.changed for decision in made.decisions)


def test_integration_by_hand() -> None:
    """After 0: z = [0 1 .5 0], delta_3 = 2, so 3. After 3: z = [1 .5 0 0], delta_3 = -2, so 0. And round again."""
    made = run(personal())
    assert made.token_ids == [3, 0, 3, 0, 3]
    assert [decision.base_token_id for decision in made.decisions] == [1, 0, 1, 0, 1]
    assert [decision.changed for decision in made.decisions] == [True, False, True, False, True]
    assert all(decision.consulted for decision in made.decisions)


def test_ladder_by_hand() -> None:
    """delta alone: after 0 it is [0 0 0 2], so 3; after 3 it is [0 0 0 -2], so 0, the first of the largest."""
    made = run(personal(), "ladder")
    assert made.token_ids == [3, 0, 3, 0, 3]
    assert [decision.base_token_id for decision in made.decisions] == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("mode", ["spa", "separation"])
def test_gated_modes_ask_where_the_gate_fires(mode: str) -> None:
    """After 0 the gate fires and the device says 3; after 3 it is shut and the base model says 0."""
    made = run(personal(GATE), mode)
    assert made.token_ids == [3, 0, 3, 0, 3]
    assert [decision.consulted for decision in made.decisions] == [True, False, True, False, True]


@pytest.mark.parametrize("mode", ["spa", "separation"])
def test_a_gate_that_is_shut_leaves_the_base_model(mode: str) -> None:
    shut = Gate(weight=np.array([1.0], np.float32), threshold=2.0)
    assert run(personal(shut), mode).decisions == run(None).decisions


def test_a_gate_that_is_open_makes_spa_integration_and_separation_a_ladder() -> None:
    wide = Gate(weight=np.array([1.0], np.float32), threshold=-2.0)
    assert run(personal(wide), "spa").decisions == run(personal()).decisions
    assert run(personal(wide), "separation").decisions == run(personal(), "ladder").decisions


@pytest.mark.parametrize("mode", ["spa", "separation"])
def test_a_gated_mode_without_a_gate_is_refused(mode: str) -> None:
    with pytest.raises(InputError, match=f"mode {mode} needs a gate"):
        run(personal(), mode)


def test_the_prompt_is_read_once_and_then_token_by_token() -> None:
    backbone = PencilBackbone()
    generate(backbone, None, GenerationRequest(prompt_ids=np.array([2, 0]), max_new_tokens=3))
    assert backbone.log == [[2, 0], [1], [2]]


def test_an_end_token_ends_and_stays() -> None:
    made = run(None, stop_token_ids=(3,))
    assert made.token_ids == [1, 2, 3]
    assert made.ending == Ending("end_token", 3)


def test_a_stop_string_ends() -> None:
    def spell(token_ids: Sequence[int]) -> str:
        return "".join("wxyz"[token_id] for token_id in token_ids)

    request = GenerationRequest(prompt_ids=np.array([2, 0]), stop_strings=("yz",))
    made = generate(PencilBackbone(), None, request, spell)
    assert made.token_ids == [1, 2, 3]
    assert made.ending == Ending("stop_string", 3, 1)
    with pytest.raises(InputError, match="stop_strings needs detokenize"):
        generate(PencilBackbone(), None, request)


def test_sampling_is_keyed_by_the_position_in_the_whole_sequence() -> None:
    sampling = Sampling(temperature=1.5, seed=11)
    made = run(None, sampling=sampling)
    last = 0
    for position, decision in enumerate(made.decisions, start=2):
        logits = np.zeros(VOCAB, np.float32)
        logits[(last + 1) % VOCAB], logits[(last + 2) % VOCAB] = 1.0, 0.5
        assert decision.token_id == choose(logits, sampling, position)
        last = decision.token_id
    assert run(None, sampling=sampling).decisions == made.decisions
    others = [run(None, sampling=Sampling(temperature=1.5, seed=seed)).token_ids for seed in range(8)]
    assert len({tuple(ids) for ids in others}) > 1


def test_base_and_personal_draws_share_their_noise() -> None:
    """Where the correction is zero, both draws are the same draw."""

    class Silent(PencilCorrector):
        def correct(self, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> Correction:
            return Correction(codes=np.zeros(1, np.int8), scale=np.float16(0))

    silent = Personal(corrector=Silent(), output_basis=personal().output_basis)
    for seed in range(5):
        sampling = Sampling(temperature=2.0, top_p=0.9, seed=seed)
        made = run(silent, sampling=sampling)
        assert made.token_ids == run(None, sampling=sampling).token_ids
        assert not any(decision.changed for decision in made.decisions)


def test_taps_and_corrections_pass_the_wire_codec() -> None:
    """A tap of 0.3 is not a multiple of its float16 scale: the corrector sees what the wire would bring."""
    seen: list[tuple[NDArray[np.int8], NDArray[np.float16]]] = []

    class Watching(PencilCorrector):
        def correct(self, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> Correction:
            seen.append((tap_codes, tap_scales))
            return Correction(codes=np.zeros(1, np.int8), scale=np.float16(0))

    features = StepFeatures(
        logits=np.zeros(VOCAB, np.float32),
        hidden=np.zeros(1, np.float32),
        taps=np.array([[0.3, -0.1]], np.float32),
    )
    watching = Personal(corrector=Watching(), output_basis=personal().output_basis)
    decide(features, watching, GenerationRequest(prompt_ids=np.array([0])), 1, watching.corrector.open())
    [(codes, scales)] = seen
    assert codes.dtype == np.int8 and scales.dtype == np.float16
    assert scales.tolist() == [np.float16(np.float32(0.3) / np.float32(127))]
    assert codes.tolist() == [[127, -42]]  # -0.1 / 0.3 * 127 = -42.3


def test_the_stream_has_no_end_of_its_own() -> None:
    request = GenerationRequest(prompt_ids=np.array([2, 0]), max_new_tokens=1, stop_token_ids=(1,))
    endless = stream(PencilBackbone(), None, request)
    assert [next(endless).token_id for _ in range(6)] == [1, 2, 3, 0, 1, 2]
    assert isinstance(next(endless), Decision)
