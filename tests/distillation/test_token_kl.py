from __future__ import annotations

import numpy as np
import pytest
import torch

from cotune.distillation.divergences import JensenShannon
from cotune.distillation.token_kl import token_divergence
from cotune.errors import InputError


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(logits: torch.Tensor, temperature: float) -> np.ndarray:
    weights = np.exp(logits.numpy() / temperature)
    return np.asarray(weights / weights.sum(1, keepdims=True))


def test_the_loss_is_the_definition() -> None:
    teacher, student = draw(5, 12), draw(5, 12, seed=1)
    p, q = softmax(teacher, 2.0), softmax(student, 2.0)
    top = np.argsort(-p, axis=1)[:, :4]
    p_4, q_4 = (np.take_along_axis(side, top, 1) for side in (p, q))
    p_4, q_4 = (np.concatenate([side, 1 - side.sum(1, keepdims=True)], axis=1) for side in (p_4, q_4))
    loss = token_divergence(teacher, student, top_k=4)
    np.testing.assert_allclose(loss.numpy(), 4 * (p_4 * np.log(p_4 / q_4)).sum(1), rtol=1e-10)
    whole = token_divergence(teacher, student, top_k=12)
    np.testing.assert_allclose(whole.numpy(), 4 * (p * np.log(p / q)).sum(1), rtol=1e-10)
    # More tokens, more is seen, up to all of it.
    sizes = [float(token_divergence(teacher, student, top_k=k).sum()) for k in (1, 3, 6, 12, 99)]
    assert sizes == sorted(sizes) and sizes[-2] == sizes[-1]


def test_the_gradient_agrees_with_finite_differences_and_keeps_its_size() -> None:
    teacher, student = draw(3, 8), draw(3, 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_divergence(teacher, z, top_k=3), (student,))
    norms = []
    for temperature in (1.0, 8.0):
        (gradient,) = torch.autograd.grad(token_divergence(teacher, student, temperature=temperature).sum(), student)
        assert (gradient.abs() > 1e-6).all()
        norms.append(float(gradient.norm()))
    assert 0.2 < norms[1] / norms[0] < 5


def test_zero_for_itself_and_any_divergence() -> None:
    logits = draw(3, 200).float()
    assert (token_divergence(logits, logits).abs() < 1e-6).all()
    js = token_divergence(logits, -logits, divergence=JensenShannon(0.5), temperature=1.0)
    assert js.dtype == torch.float32 and (js > 0.1).all() and (js <= np.log(2) + 1e-6).all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"\(1, 3\) and the student's \(1, 4\)"):
        token_divergence(torch.zeros(1, 3), torch.zeros(1, 4))
    with pytest.raises(InputError, match="top_k is 0"):
        token_divergence(torch.zeros(1, 3), torch.zeros(1, 3), top_k=0)
    with pytest.raises(InputError, match="temperature is 0"):
        token_divergence(torch.zeros(1, 3), torch.zeros(1, 3), temperature=0.0)
