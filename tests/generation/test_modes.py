"""The four modes, by their formulas and three numbers each."""

from __future__ import annotations

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.generation.modes import MODES, mode_named

Z = np.array([1.0, -2.0, 0.5], np.float32)
DELTA = np.array([0.25, 4.0, -1.0], np.float32)
SUM = [1.25, 2.0, -0.5]


@pytest.mark.parametrize(
    ("name", "consulted"),
    [
        ("integration", SUM),  # z + delta
        ("spa", SUM),  # z + sigma delta, sigma = 1
        ("separation", [0.25, 4.0, -1.0]),  # (1 - sigma) z + sigma delta, sigma = 1
        ("ladder", [0.25, 4.0, -1.0]),  # delta
    ],
)
def test_three_logits_by_hand(name: str, consulted: list[float]) -> None:
    mode = mode_named(name)
    combined = mode.combine(Z, DELTA)
    assert combined.dtype == np.float32
    assert combined.tolist() == consulted
    # sigma = 0: the base model's own logits.
    assert mode.combine(Z, None).tolist() == Z.tolist()


def test_combining_leaves_its_inputs_alone() -> None:
    z, delta = Z.copy(), DELTA.copy()
    for mode in MODES.values():
        mode.combine(z, delta)
    assert np.array_equal(z, Z) and np.array_equal(delta, DELTA)


def test_a_correction_of_zero_changes_no_bit() -> None:
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    for name in ("integration", "spa"):
        assert np.array_equal(mode_named(name).combine(logits, np.zeros(1000, np.float32)), logits)


def test_which_modes_have_a_gate_and_which_training_fits() -> None:
    assert {name: (mode.is_gated, mode.adds_base, mode.family) for name, mode in MODES.items()} == {
        "integration": (False, True, "parallel"),
        "separation": (True, False, "serial"),
        "ladder": (False, False, "serial"),
        "spa": (True, True, "parallel"),
    }
    assert all(mode.name == name for name, mode in MODES.items())


@pytest.mark.parametrize("name", ["", "SPA", "lora"])
def test_an_unknown_mode_is_named_with_those_that_exist(name: str) -> None:
    with pytest.raises(InputError, match=f"mode is '{name}', expected one of integration, separation, ladder, spa"):
        mode_named(name)
