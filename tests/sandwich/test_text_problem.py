"""Losses over a cloud's answers: what is alike is read once, and nothing else changes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from redactors import redactor_here
from scripted_clouds import MemoryCloud

from cotune.evaluation import token_f1
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.fit import prepare_examples
from cotune.sandwich.pipeline import Pipeline, PipelineConfig
from cotune.sandwich.prompts.pool import PromptPool
from cotune.sandwich.text_problem import Cell, TextProblem, TextProblemConfig

PROMPTS = ["Say it.", "Tell it.", "Guess."]


class LengthEdge:
    """One number x; the loss of a cell is 1 / (1 + x length of its answer), and all that was read is kept."""

    def __init__(self) -> None:
        self.read: list[tuple[str, tuple[str, ...]]] = []

    def start(self) -> Vector:
        return np.ones(1)

    def losses(self, x: Vector, cells: Sequence[Cell]) -> Vector:
        self.read += [(cell.example.source.request, cell.answers) for cell in cells]
        return np.array([1 / (1 + x[0] * len(cell.answers[0])) for cell in cells])

    def gradient(self, x: Vector, cells: Sequence[Cell], weights: Vector, step: int) -> tuple[Vector, Vector]:
        lengths = np.array([len(cell.answers[0]) for cell in cells])
        return self.losses(x, cells), np.array([-(weights * lengths / (1 + x[0] * lengths) ** 2).sum()])


def test_equal_answers_are_read_once() -> None:
    """Two of three prompts have the same answers: two cells of each example are read, the sums are those of three."""
    cloud = MemoryCloud()
    cloud.under = dict(zip(PROMPTS, ("yes indeed", "yes indeed", "no"), strict=True))
    edge, pipeline = LengthEdge(), Pipeline(redactor_here(), CloudGate(cloud), PipelineConfig(model="m"))
    examples = prepare_examples(pipeline, [PrivateExample(f"one {n}", "yes") for n in range(4)], b"key")
    config = TextProblemConfig(num_batch_examples=4)
    problem = TextProblem(pipeline, PromptPool(PROMPTS), edge, examples, examples, token_f1, config)
    x, y = np.array([0.5]), np.log([0.5, 0.3, 0.2])
    found = problem.upper(x, y, 0)
    assert len(edge.read) == len(set(edge.read)) == 8
    likely, guess = 1 / 6, 1 / 2  # 1 / (1 + 0.5 * 10) and 1 / (1 + 0.5 * 2)
    assert found.value == pytest.approx(0.8 * likely + 0.2 * guess)
    assert found.grad_x[0] == pytest.approx(-0.8 * 10 / 36 - 0.2 * 2 / 4)
    # p_j (l_j - p . l)
    losses = np.array([likely, likely, guess])
    assert found.grad_y == pytest.approx(np.array([0.5, 0.3, 0.2]) * (losses - found.value))
    edge.read.clear()
    assert problem.losses(x + 1, PROMPTS, examples)[:, 0].tolist() == pytest.approx([1 / 16, 1 / 16, 1 / 4])
    assert len(edge.read) == 8


def test_the_order_of_losses_is_that_of_prompts_and_examples() -> None:
    answers = iter(random.Random(0).choices(["a", "bbb"], k=12))
    cloud = MemoryCloud(lambda request: next(answers))
    edge, pipeline = LengthEdge(), Pipeline(redactor_here(), CloudGate(cloud), PipelineConfig(model="m"))
    examples = prepare_examples(pipeline, [PrivateExample(f"one {n}", "yes") for n in range(4)], b"key")
    problem = TextProblem(pipeline, PromptPool(PROMPTS), edge, examples, examples, token_f1, TextProblemConfig())
    found = problem.losses(np.array([1.0]), PROMPTS, examples)
    expected = [
        [1 / (1 + len(problem.table.answers(prompt, example)[0].text)) for example in examples] for prompt in PROMPTS
    ]
    assert found.tolist() == expected and len(np.unique(found)) == 2
