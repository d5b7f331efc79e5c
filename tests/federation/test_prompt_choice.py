from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.prompt_choice import (
    PromptReply,
    choose_prompts,
    exchanged,
    fresh_server,
    score_layer,
    server_step,
    taken_in,
)


def prompt(*numbers: float) -> dict[str, NDArray[np.float32]]:
    return {"p": np.array([numbers], np.float32)}


def reply(*numbers: float, num_steps: int = 1, learning_rate: float = 1.0) -> PromptReply:
    return PromptReply(prompts=prompt(*numbers), num_steps=num_steps, learning_rate=learning_rate)


def test_the_score_by_hand() -> None:
    """Rows at 60 degrees: C = [[1, 1/2], [1/2, 1]], with the eigenvalues 1/2 and 3/2."""
    states = np.array([[[2.0, 0.0]], [[0.5, 0.5 * 3**0.5]]])
    expected = np.log(0.5 + 1e-5) + 1 / (0.5 + 1e-5) + np.log(1.5 + 1e-5) + 1 / (1.5 + 1e-5)
    assert score_layer(states) == pytest.approx(expected)
    # The length of a text's states does not matter.
    assert score_layer(states * np.array([[[1e200]], [[1e-3]]])) == pytest.approx(expected)


def test_states_that_are_alike_score_high() -> None:
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(20)
    scores = [score_layer(shared + apart * rng.standard_normal((6, 20))) for apart in (0.1, 0.5, 3.0)]
    assert scores[0] > scores[1] > scores[2]
    # Equal texts: five eigenvalues of zero.
    assert score_layer(np.ones((6, 4))) == pytest.approx(5 * (1e5 + np.log(1e-5)) + np.log(6) + 1 / 6, rel=1e-3)


def test_the_choice_by_hand() -> None:
    """Weights 3 to 1: means 3, 2.5 and 4; the budget holds two."""
    scores = np.array([[2.0, 3.0, 4.0], [6.0, 1.0, 4.0]])
    assert choose_prompts(scores, [3, 1], [10, 10, 10], 25) == (0, 2)
    assert choose_prompts(scores, [1, 0], [10, 10, 10], 25) == (1, 2)
    assert choose_prompts(scores, [1, 1], [10, 10, 10], 30) == (0, 1, 2)
    # Layer 0 is too large; the smaller layer 1 scores less and does not come in its place.
    assert choose_prompts(scores, [3, 1], [20, 5, 10], 25) == (2,)


def test_without_momentum_the_server_averages() -> None:
    moved, state = server_step(
        prompt(9.0), {"a": reply(1.0), "b": reply(5.0)}, [1, 3], fresh_server(prompt(9.0)), beta=0.0
    )
    assert moved["p"].tolist() == [[4.0]]
    again, _ = server_step(moved, {"a": reply(0.0), "b": reply(8.0)}, [1, 3], state, beta=0.0)
    # All take part again with the same weights: no correction, 1/4 * 0 + 3/4 * 8.
    assert again["p"].tolist() == [[6.0]]


def test_momentum_by_hand() -> None:
    """v = 0.5 * (8 - 4) = 2, w = 8 - 2 * 2 = 4; then v = 0.5 * 2 + 0.5 * (4 - 2) = 2, w = 0."""
    first, state = server_step(
        prompt(8.0), {"a": reply(4.0)}, [1], fresh_server(prompt(8.0)), beta=0.5, learning_rate=2.0
    )
    assert first["p"].tolist() == [[4.0]]
    second, state = server_step(first, {"a": reply(2.0)}, [1], state, beta=0.5, learning_rate=2.0)
    assert second["p"].tolist() == [[0.0]]
    assert state.momentum["p"].tolist() == [[2.0]]


def test_devices_that_drift_apart_are_corrected_by_hand() -> None:
    """a always moves by +1 and b by -1, in turns: without correction w would swing, with it w rests."""
    moved, state = server_step(prompt(0.0), {"a": reply(1.0)}, [1], fresh_server(prompt(0.0)), beta=0.0)
    assert moved["p"].tolist() == [[1.0]]  # a is new
    moved, state = server_step(moved, {"b": reply(0.0)}, [1], state, beta=0.0)
    assert moved["p"].tolist() == [[0.0]]  # b is new
    # d_a = -1 and d_b = 1, c = 0: -1 + (0 - -1) = 0.
    moved, state = server_step(moved, {"a": reply(1.0)}, [1], state, beta=0.0)
    assert moved["p"].tolist() == [[0.0]]
    # Twice as many steps of half the size, the same move: the same correction.
    moved, state = server_step(moved, {"b": reply(-1.0, num_steps=2, learning_rate=0.5)}, [1], state, beta=0.0)
    assert moved["p"].tolist() == [[0.0]]
    # With weights 3 and 1, c = 3/4 * -1 + 1/4 * 1 = -1/2: b moves by 1 + (-1/2 - 1) = -1/2 against the sign of w.
    _, state = server_step(moved, {"a": reply(1.0)}, [3], state, beta=0.0)
    moved, state = server_step(moved, {"b": reply(-1.0)}, [1], state, beta=0.0)
    assert moved["p"].tolist() == [[0.5]]
    # A device without weight moves nothing and has no say in c.
    moved, state = server_step(moved, {"b": reply(0.5), "new": reply(99.0)}, [1, 0], state, beta=0.0)
    assert state.drifts["new"].weight == 0.0
    assert np.isfinite(moved["p"]).all()


def test_only_chosen_prompts_travel_and_the_others_stay() -> None:
    own = {"0": np.zeros((1, 2), np.float32), "1": np.ones((1, 2), np.float32)}
    sent = exchanged(own, ["1"])
    assert list(sent) == ["1"]
    after = taken_in(own, {"1": np.full((1, 2), 7.0, np.float32)})
    assert after["0"] is own["0"]
    assert after["1"].tolist() == [[7.0, 7.0]]


def step(
    *,
    replies: dict[str, PromptReply] | None = None,
    weights: tuple[float, ...] = (1,),
    state: Any = None,
    **rates: float,
) -> Any:
    """A round of one device, with one thing wrong."""
    state = fresh_server(prompt(0.0)) if state is None else state
    return server_step(prompt(0.0), {"a": reply(1.0)} if replies is None else replies, weights, state, **rates)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_layer(np.ones((1, 3))), r"shape \(1, 3\), expected \(batch, ...\) with at least two"),
        (lambda: score_layer(np.ones(3)), r"shape \(3,\)"),
        (lambda: score_layer(np.array([[1.0], [np.nan]])), "nan or inf"),
        (lambda: score_layer(np.array([[1.0], [0.0]])), "all zero"),
        (lambda: choose_prompts(np.ones((2, 3)), [1, 1], [1, 1], 9), r"scores have shape \(2, 3\), expected"),
        (lambda: choose_prompts(np.full((1, 1), np.nan), [1], [1], 9), "scores hold nan or inf"),
        (lambda: choose_prompts(np.ones((1, 1)), [1], [0], 9), r"layer_bytes are \[0\]"),
        (
            lambda: choose_prompts(np.array([[1.0, 2.0]]), [1], [4000, 4000], 9),
            "expected at least 4,000 for the prompt of layer 1",
        ),
        (lambda: step(replies={}, weights=()), "there are no devices"),
        (lambda: step(replies={"a": reply(np.nan)}), "the reply of device 'a' holds nan or inf"),
        (lambda: step(replies={"a": reply(1.0, 2.0)}), r"the reply of device 'a' has shape \(1, 2\)"),
        (lambda: step(replies={"a": reply(1.0, num_steps=0)}), "num_steps of device 'a' is 0"),
        (lambda: step(replies={"a": reply(1.0, learning_rate=0.0)}), "learning_rate of device 'a' is 0"),
        (lambda: step(weights=(1, 1)), r"weights have shape \(2,\)"),
        (lambda: step(state=fresh_server({})), "the momentum and prompts differ"),
        (lambda: step(beta=1.0), r"beta is 1\.0"),
        (lambda: step(learning_rate=-1.0), r"learning_rate is -1\.0"),
        (lambda: exchanged(prompt(0), ["q"]), "names has 'q', expected some of p"),
        (lambda: taken_in(prompt(0), {"q": np.zeros((1, 1), np.float32)}), "differ in 'q'"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
