from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cotune.distillation import grouped_log_sum_exp as module
from cotune.distillation.grouped_log_sum_exp import grouped_log_sum_exp


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups_of(size: int, num_groups: int) -> Tensor:
    return torch.randint(0, num_groups, (size,), generator=torch.Generator().manual_seed(1))


def test_values_are_those_of_the_definition_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, groups = draw(3, 1000), groups_of(1000, 7)
    expected = np.stack([np.log(np.exp(logits.numpy()[:, groups.numpy() == g]).sum(1)) for g in range(7)], axis=1)
    np.testing.assert_allclose(grouped_log_sum_exp(logits, groups, 7).numpy(), expected, rtol=1e-13)
    monkeypatch.setattr(module, "_PIECE", 900)
    assert len(module._pieces(logits)) == 4
    np.testing.assert_allclose(grouped_log_sum_exp(logits, groups, 7).numpy(), expected, rtol=1e-13)
    own = logits.clone().requires_grad_()
    grouped_log_sum_exp(own, groups, 7)[:, 2].sum().backward()
    share = np.exp(logits.numpy() - expected[:, 2:3]) * (groups.numpy() == 2)
    assert own.grad is not None
    np.testing.assert_allclose(own.grad.numpy(), share, atol=1e-14)


def test_the_gradient_agrees_with_finite_differences() -> None:
    logits, groups = draw(2, 12).requires_grad_(), groups_of(12, 3)
    assert torch.autograd.gradcheck(lambda z: grouped_log_sum_exp(z, groups, 3), (logits,))


def test_unlikely_groups_are_exact_and_what_cannot_come_is_minus_infinity() -> None:
    logits = torch.tensor([[0.0, -500.0, -501.0, -math.inf, 2.0]], requires_grad=True)
    result = grouped_log_sum_exp(logits, torch.tensor([0, 1, 1, 2, 0]), 4)
    assert result[0, 1].item() == pytest.approx(-500 + math.log1p(math.exp(-1)), abs=1e-4)
    assert result[0, 2:].tolist() == [-math.inf, -math.inf]
    result[0, :2].sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1:4].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0.0], rel=1e-5)


def test_half_precision_is_summed_in_float32() -> None:
    logits = draw(2, 5000).to(torch.bfloat16).requires_grad_()
    groups = torch.zeros(5000, dtype=torch.int64)
    result = grouped_log_sum_exp(logits, groups, 1)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result[:, 0].double(), logits.detach().double().logsumexp(1), rtol=1e-6, atol=0)
    result.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_no_positions() -> None:
    logits = torch.zeros(0, 5, requires_grad=True)
    result = grouped_log_sum_exp(logits, torch.zeros(5, dtype=torch.int64), 2)
    assert result.shape == (0, 2)
    result.sum().backward()
