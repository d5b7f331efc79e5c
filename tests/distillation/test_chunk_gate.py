from __future__ import annotations

import math

import pytest
import torch

from cotune.distillation.chunk_gate import ChunkGate
from cotune.errors import InputError


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_the_formula_by_hand() -> None:
    """nll per byte: student 6 / 2, 6 / 3, 1 / 1 for the end; teacher 2 / 2, 9 / 3, 1 / 1."""
    gates = ChunkGate(margin=0.5, tau_g=2.0)(
        torch.tensor([-2.0, -9.0, -1.0]), torch.tensor([-6.0, -6.0, -1.0]), torch.tensor([2, 3, 0])
    )
    expected = [sigmoid((2 - 0.5) / 2), sigmoid((-1 - 0.5) / 2), sigmoid(-0.5 / 2)]
    assert gates.tolist() == pytest.approx(expected, rel=1e-6)


def test_nothing_is_learnt_through_the_gate_and_little_from_a_worse_teacher() -> None:
    teacher, student = torch.tensor([-9.0, -0.1]), torch.tensor([-0.1, -9.0], requires_grad=True)
    gates = ChunkGate()(teacher, student, torch.tensor([1, 1]))
    assert not gates.requires_grad
    assert float(gates[0]) < 1e-6 and float(gates[1]) > 1 - 1e-6


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="tau_g is 0"):
        ChunkGate(tau_g=0.0)
    with pytest.raises(InputError, match="margin is inf"):
        ChunkGate(margin=float("inf"))
