"""The noisy linear-quadratic problem: its optimum, its slopes, and what the command says of it."""

from __future__ import annotations

import json
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from study_command import Command
from zocp_toys import BASE, DIM_X, QUESTIONS, RIDGE, NoisyQuadratic, solve_once


def test_the_optimum_is_that_of_a_ridge_regression() -> None:
    problem = NoisyQuadratic(BASE, 0, 4)
    best = np.linalg.lstsq(
        np.vstack([problem.matrix, np.sqrt(RIDGE) * np.eye(DIM_X)]),
        np.concatenate([problem.target, np.zeros(DIM_X)]),
        rcond=None,
    )[0]
    assert problem.left(best) == pytest.approx(0, abs=1e-9) and problem.left(np.zeros(DIM_X)) == 1
    assert problem.left(best + 0.1) > 0


def test_without_noise_slopes_and_second_derivatives_are_right_in_the_mean() -> None:
    problem = NoisyQuadratic(replace(BASE, sigma=0.0, mixed="differences"), 0, 6000)
    x, y = np.ones(DIM_X), problem.target
    exact = y - problem.matrix @ x
    found = problem.lower(x, y, 0).grad_y
    assert float(found @ exact) / float(exact @ exact) == pytest.approx(1, abs=0.1)
    along = np.ones_like(y)
    mixed = -problem.matrix.T @ along
    assert float(problem.mixed(x, y, along, 0) @ mixed) / float(mixed @ mixed) == pytest.approx(1, abs=0.3)


def test_cuts_come_close_and_f_alone_does_not() -> None:
    cuts = solve_once(replace(BASE, sigma=0.0), 0, num_steps=200, num_directions=4)
    alone = solve_once(replace(BASE, constraint="none", sigma=0.0), 0, num_steps=200, num_directions=4)
    assert cuts["left"] < 0.3 and cuts["gap"] < 0.01 and not cuts["diverged"]
    assert alone["left"] > 0.9 and alone["gap"] > 1


@pytest.mark.integration
def test_the_command_answers_every_question(tmp_path: Path, command: Command) -> None:
    options = ["--seeds", 1, "--steps", 6, "--directions", 1]
    options += ["--cells", tmp_path / "cells", "--out", tmp_path / "out"]
    status, said = command("zocp_toys", options)
    assert status == 0, said
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert {what: set(rows) for what, rows in measured.items()} == {w: set(s) for w, (_, s) in QUESTIONS.items()}
    page = unescape((tmp_path / "out" / "report.html").read_text())
    assert all(question in page for question, _ in QUESTIONS.values())
