"""Words by place: the estimate against the exact slope, and a descent that finds the best prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.sandwich.prompts.categorical import CategoricalPrompt

PLACES = [["Say", "Tell"], ["it", "all", ""], ["now.", "later."]]


def losses(prompts: Sequence[str]) -> np.ndarray:
    """Tell is better than Say, nothing better than `it`, and both matter together."""
    return np.array(
        [0.9 - 0.3 * ("Tell" in p) - 0.2 * ("it" not in p.split()) - 0.1 * (p == "Tell now.") for p in prompts]
    )


def expected_loss(y: np.ndarray) -> float:
    parts = [np.exp(part) / np.exp(part).sum() for part in np.split(y, [2, 5])]
    total = 0.0
    for choice in itertools.product(range(2), range(3), range(2)):
        weight = np.prod([part[each] for part, each in zip(parts, choice, strict=True)])
        text = " ".join(filter(None, (words[each] for words, each in zip(PLACES, choice, strict=True))))
        total += float(weight * losses([text])[0])
    return total


def test_the_estimate_is_the_slope_of_the_expected_loss_on_average() -> None:
    y = np.array([0.5, -0.5, 0.2, 0.0, -1.0, 0.3, 0.0])
    prompt = CategoricalPrompt(PLACES, num_samples=4000)
    exact = [(expected_loss(y + 1e-5 * e) - expected_loss(y - 1e-5 * e)) / 2e-5 for e in np.eye(7)]
    assert prompt.slope(y, losses, step=1) == pytest.approx(exact, abs=0.01)


def test_two_samples_by_hand() -> None:
    prompt = CategoricalPrompt([["a", "b"]], num_samples=2)
    y, step = np.zeros(2), 0
    while True:  # a step at which the two differ
        slope = prompt.slope(y, lambda prompts: np.array([float(p == "b") for p in prompts]), step)
        if slope.any():
            break
        step += 1
    # (l_s - mean) / (S - 1) = -+ 1/2, times e_j - p = (1/2, -1/2): together (-1/2, 1/2).
    assert slope == pytest.approx([-0.5, 0.5])


def test_a_descent_finds_the_best_prompt_and_its_neighbours_are_candidates() -> None:
    prompt = CategoricalPrompt(PLACES, response_steps=60, response_rate=2.0)
    y = prompt.respond(prompt.start(), losses, step=0)
    assert prompt.best(y) == "Tell now." and prompt.mixture(y, 0) == [("Tell now.", 1.0)]
    assert prompt.candidates(y) == ["Tell now.", "Say now.", "Tell it now.", "Tell all now.", "Tell later."]


@pytest.mark.parametrize("options", [{"places": []}, {"places": [["a"], []]}, {"num_samples": 1}, {"response_rate": 0}])
def test_what_cannot_be_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError):
        CategoricalPrompt(**{"places": PLACES, **options})  # type: ignore[arg-type]
