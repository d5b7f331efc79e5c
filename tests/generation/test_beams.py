"""Beam search on a model small enough to follow with a pencil, and the rules of scores, ties and ends.

Three tokens; 0 ends a text. The prompt is the one token 9. What comes next depends on the last token alone:

    after 9   0.1  0.5  0.4
    after 1   0.2  0.4  0.4
    after 2   0.9  0.05 0.05
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.generation.beam_cursors import BeamCursors
from cotune.generation.beam_reference import BeamGeneration, search
from cotune.generation.beams import BeamCounters, BeamOptions, BeamSearch, Proposal, check_beams
from cotune.generation.gate import Gate
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import Correction, RowWork, StepFeatures
from cotune.generation.reference import Personal
from cotune.generation.request import Decision, GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.generation.side_state import StatelessCorrector
from cotune.generation.stopping import Ending

NEXT = {9: (0.1, 0.5, 0.4), 1: (0.2, 0.4, 0.4), 2: (0.9, 0.05, 0.05), 0: (1 / 3, 1 / 3, 1 / 3)}


class PencilCursor:
    def __init__(self, backbone: PencilBackbone, tokens: Sequence[int] = ()) -> None:
        self.tokens = list(tokens)
        self.backbone = backbone
        backbone.num_open += 1

    @property
    def length(self) -> int:
        return len(self.tokens)

    def extend(self, token_ids: NDArray[np.int64], is_wanted: Callable[[], bool] | None = None) -> StepFeatures:
        self.tokens += token_ids.tolist()
        last = self.tokens[-1]
        return StepFeatures(
            logits=np.log(np.array(NEXT[last], np.float32)),
            hidden=np.array([-1.0 if last == 2 else 1.0], np.float32),
            taps=np.ones((1, 1), np.float32),
        )

    def truncate(self, length: int) -> None:
        raise AssertionError("the reference never looks back")

    def fork(self) -> PencilCursor:
        return PencilCursor(self.backbone, self.tokens)

    def close(self) -> None:
        self.backbone.num_open -= 1


class PencilBackbone:
    def __init__(self) -> None:
        self.num_open = 0
        self.passes: list[int] = []

    def cursor(self, num_prompt: int | None = None) -> PencilCursor:
        return PencilCursor(self)

    def extend(self, work: Sequence[RowWork], is_wanted: Callable[[], bool] | None = None) -> list[list[StepFeatures]]:
        self.passes.append(len(work))
        return [[item.cursor.extend(item.token_ids)] for item in work]


class Pusher(StatelessCorrector):
    """Pushes token 0 by a fixed number of logits."""

    def __init__(self, push: float) -> None:
        self.push = push

    def correct(self, tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16]) -> Correction:
        return Correction(codes=np.array([127], np.int8), scale=np.float16(self.push / 127))


def personal_of(push: float) -> Personal:
    basis = OutputBasis.from_matrix(np.array([[1.0], [0.0], [0.0]], np.float32))
    return Personal(corrector=Pusher(push), output_basis=basis, gate=Gate(weight=np.ones(1, np.float32)))


def by_pencil(length_penalty: float = 1.0, personal: Personal | None = None, **changes: Any) -> BeamGeneration:
    request = GenerationRequest(**{"prompt_ids": np.array([9]), "max_new_tokens": 3, "stop_token_ids": (0,), **changes})
    backbone = PencilBackbone()
    found = search(backbone, personal, request, BeamOptions(num_beams=2, length_penalty=length_penalty))
    assert backbone.num_open == 0  # every cursor was closed once
    return found


def test_two_beams_by_hand() -> None:
    """Step 1: 1 (.5), 2 (.4). Step 2: 2 0 ends (.36); 1 1 and 1 2 go on (.2, the tie by id). Step 3 is the last."""
    found = by_pencil()
    assert [text.token_ids for text in found.beams] == [[2, 0], [1, 2, 0]]
    assert [text.log_prob for text in found.beams] == pytest.approx([math.log(0.36), math.log(0.18)], abs=1e-6)
    assert [text.score for text in found.beams] == pytest.approx([math.log(0.36) / 2, math.log(0.18) / 3], abs=1e-6)
    assert found.token_ids == [2, 0] and found.ending == Ending("end_token", 2)
    assert found.counters == BeamCounters(num_steps=3, num_beam_steps=5)


def test_the_length_penalty_decides_between_short_and_long() -> None:
    assert by_pencil(0.0).token_ids == [2, 0]
    long = by_pencil(2.0)
    assert long.token_ids == [1, 2, 0]
    assert long.beams[0].score == pytest.approx(math.log(0.18) / 9, abs=1e-6)


def test_the_last_step_ends_every_text() -> None:
    found = by_pencil(max_new_tokens=1)
    assert [text.token_ids for text in found.beams] == [[1], [2]]
    assert found.ending == Ending("length", 1)


def test_who_was_asked_and_how_often() -> None:
    """The gate fires after every token but 2; the device pushes nothing, so the texts are those of the base model."""
    found = by_pencil(mode="spa", personal=personal_of(0.0))
    assert [text.token_ids for text in found.beams] == [[2, 0], [1, 2, 0]]
    assert found.decisions == [
        Decision(token_id=2, base_token_id=1, consulted=True),
        Decision(token_id=0, base_token_id=0, consulted=False),
    ]
    # Beams at the three steps: 1, 2, 2; of these ask 1, 1, 1.
    assert found.counters == BeamCounters(num_steps=3, num_beam_steps=5, num_consulted=3, num_trips=3)
    assert found.counters.trips_per_step == 1.0 and found.counters.consult_rate == 0.6
    assert found.counters.predicted_trips_per_step(2) == pytest.approx(1 - 0.4**2)


def test_the_device_changes_scores_only_where_it_is_asked() -> None:
    """Four nats for token 0: in integration everywhere, in spa not after token 2."""
    push = math.log(0.1 * math.exp(4.0) / (0.1 * math.exp(4.0) + 0.9))
    found = by_pencil(mode="integration", personal=personal_of(4.0))
    assert found.token_ids == [0] and found.beams[0].log_prob == pytest.approx(push, abs=2e-3)
    spa = by_pencil(mode="spa", personal=personal_of(-4.0))
    after_2 = next(text for text in spa.beams if text.token_ids[:2] == [2, 0])
    first = 0.4 / (0.9 + 0.1 * math.exp(-4.0))
    assert after_2.log_prob == pytest.approx(math.log(first * 0.9), abs=2e-3)


def test_all_beams_of_a_step_share_one_pass_and_no_cursor_is_lost() -> None:
    backbone = PencilBackbone()
    request = GenerationRequest(prompt_ids=np.array([9]), max_new_tokens=3, stop_token_ids=(0,))
    search(backbone, None, request, BeamOptions(num_beams=2))
    assert backbone.passes == [2, 2] and backbone.num_open == 0


def test_a_failure_gives_the_memory_back() -> None:
    backbone = PencilBackbone()

    def fail(work: Sequence[RowWork], is_wanted: Callable[[], bool] | None = None) -> list[list[StepFeatures]]:
        raise RuntimeError("a broken pass")

    backbone.extend = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        search(backbone, None, GenerationRequest(prompt_ids=np.array([9])), BeamOptions(num_beams=2))
    assert backbone.num_open == 0


def proposal(*logits: float, consulted: bool = False) -> Proposal:
    return Proposal(logits=np.array(logits, np.float32), base_token_id=int(np.argmax(logits)), consulted=consulted)


def likely(*probabilities: float) -> Proposal:
    return proposal(*np.log(probabilities).tolist())


def test_ties_go_to_the_earlier_beam_then_to_the_lower_token() -> None:
    beams = BeamSearch(BeamOptions(num_beams=3), max_new_tokens=9, stop_token_ids=())
    beams.advance([proposal(0, 0, 0, 0, 0)])
    assert [beam.token_ids for beam in beams.running] == [[0], [1], [2]]
    beams.advance([proposal(0, 0, 0, 0, 0)] * 3)
    assert [(beam.parent, beam.token_ids) for beam in beams.running] == [(0, [0, 0]), (0, [0, 1]), (0, [0, 2])]


def test_a_stop_token_counts_only_among_the_best_candidates() -> None:
    beams = BeamSearch(BeamOptions(num_beams=2), max_new_tokens=9, stop_token_ids=(4,))
    beams.advance([proposal(9, 8, 0, 0, 7)])
    assert beams.finished == [] and [beam.token_ids for beam in beams.running] == [[0], [1]]
    beams.advance([proposal(0, 0, 0, 0, 9), proposal(0, 0, 0, 0, 9)])
    assert [text.token_ids for text in beams.finished] == [[0, 4], [1, 4]] and beams.is_over


def test_the_search_goes_on_while_a_running_beam_may_still_win() -> None:
    """Finished: 0 (.5), 1 0 (.18). Running: 2 2 (.19), above the worst of these; then 2 2 2 (.171), below."""
    options = BeamOptions(num_beams=2, length_penalty=0.0)
    beams = BeamSearch(options, max_new_tokens=9, stop_token_ids=(0,))
    beams.advance([likely(0.5, 0.3, 0.2)])
    assert len(beams.finished) == 1 and not beams.is_over
    beams.advance([likely(0.6, 0.4, 1e-9), likely(0.04, 0.01, 0.95)])
    assert [text.token_ids for text in beams.finished] == [[0], [1, 0]]
    assert beams.running[0].token_ids == [2, 2] and not beams.is_over
    beams.advance([likely(0.05, 0.05, 0.9), likely(0.3, 0.3, 0.4)])
    assert [text.token_ids for text in beams.finished] == [[0], [1, 0]] and beams.is_over


def test_more_beams_than_tokens() -> None:
    beams = BeamSearch(BeamOptions(num_beams=8), max_new_tokens=2, stop_token_ids=())
    beams.advance([proposal(1, 0, -math.inf)])
    assert [beam.token_ids for beam in beams.running] == [[0], [1]]
    beams.advance([proposal(1, 0, -math.inf)] * 2)
    assert [text.token_ids for text in beams.finished] == [[0, 0], [0, 1], [1, 0], [1, 1]] and beams.is_over


def test_branching_reuses_forks_and_closes() -> None:
    backbone = PencilBackbone()
    root = backbone.cursor()
    root.extend(np.array([9]))
    places = BeamCursors(root)
    places.branch([0, 0, 0])
    assert places.cursors[0] is root and backbone.num_open == 3
    kept = places.cursors[2]
    places.branch([2, 2])
    assert places.cursors[0] is kept and backbone.num_open == 2
    places.shrink_to_root()
    assert places.cursors == [kept] and backbone.num_open == 1
    places.close()
    assert backbone.num_open == 0
    with pytest.raises(AssertionError):
        places.branch([1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 1}, "num_beams is 1, expected 2 to 8"),
        ({"num_beams": 9}, "num_beams is 9, expected 2 to 8"),
        ({"length_penalty": float("nan")}, "length_penalty is nan, expected -10 to 10"),
        ({"length_penalty": -11.0}, "length_penalty is -11.0, expected -10 to 10"),
    ],
)
def test_options_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BeamOptions(**{"num_beams": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "separation"}, "mode is separation with beams, expected integration or spa"),
        ({"mode": "x"}, "mode is 'x', expected one of"),
        (
            {"schedule": "optimistic"},
            "schedule is optimistic with beams, expected blocking or gated: which beams go on",
        ),
        ({"answer": "token"}, "use answer correction"),
        ({"sampling": Sampling(temperature=1.0)}, "temperature is 1.0 with beams, expected 0"),
    ],
)
def test_combinations_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    fine: dict[str, Any] = {"mode": "spa", "schedule": "gated", "answer": "correction", "sampling": Sampling()}
    check_beams(**fine)
    with pytest.raises(InputError, match=message):
        check_beams(**{**fine, **changes})


def test_a_gated_mode_needs_a_gate_and_stop_strings_need_words() -> None:
    ungated = Personal(corrector=Pusher(0.0), output_basis=personal_of(0.0).output_basis)
    with pytest.raises(InputError, match="needs a gate"):
        by_pencil(mode="spa", personal=ungated)
    with pytest.raises(InputError, match="needs detokenize"):
        by_pencil(stop_strings=("x",))
