"""A prompt from numbers: stairs that only a large radius sees, a descent over them, candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.sandwich.prompts.latent import LatentPrompt


def write(z: np.ndarray) -> str:
    """Stairs: whole numbers."""
    return f"level {int(np.floor(z[0]))}"


def losses(prompts: Sequence[str]) -> np.ndarray:
    return np.array([abs(int(prompt.split()[1]) - 3) / 10 for prompt in prompts])


def test_a_small_radius_sees_no_stair_and_a_large_one_does() -> None:
    z = np.array([0.5, 0.0])
    small = LatentPrompt(write, dim=2, smoothing_radius=1e-3, num_directions=50)
    large = LatentPrompt(write, dim=2, smoothing_radius=1.0, num_directions=50)
    assert not small.slope(z, losses, step=0).any()
    assert large.slope(z, losses, step=0)[0] == pytest.approx(-0.1, abs=0.05)


def test_its_response_is_the_best_on_the_way_and_never_worse() -> None:
    prompt = LatentPrompt(write, dim=2, smoothing_radius=1.0, num_directions=20, response_steps=40, response_rate=2.0)
    assert prompt.best(prompt.respond(prompt.start(), losses, step=0)) == "level 3"
    there = np.array([3.5, 0.0])
    assert np.array_equal(prompt.respond(there, losses, step=0), there)


def test_candidates_are_those_nearby_once_each() -> None:
    prompt = LatentPrompt(write, dim=2, smoothing_radius=1.0)
    assert prompt.candidates(np.array([0.5, 0.0])) == ["level 0", "level 1", "level -1"]
    assert prompt.mixture(np.array([0.5, 0.0]), 0) == [("level 0", 1.0)]


@pytest.mark.parametrize("options", [{"dim": 0}, {"smoothing_radius": 0}, {"response_steps": 0}, {"num_directions": 0}])
def test_what_cannot_be_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError):
        LatentPrompt(write, **{"dim": 2, **options})  # type: ignore[arg-type]
