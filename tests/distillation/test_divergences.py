from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cotune.distillation.divergences import (
    DIVERGENCES,
    Divergence,
    ForwardKl,
    JensenShannon,
    ReverseKl,
    divergence_named,
    divergence_of_logits,
    divergence_of_top,
)
from cotune.distillation.top_log_probs import TopLogProbs
from cotune.errors import InputError

ALL: list[Divergence] = [ForwardKl(), ReverseKl(), JensenShannon(0.1), JensenShannon(), JensenShannon(0.9)]
EACH = pytest.mark.parametrize("divergence", ALL, ids=repr)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The definition, with 0 log 0 = 0."""
    return np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0.0).sum(-1)


def by_definition(divergence: Divergence, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    if isinstance(divergence, JensenShannon):
        m = divergence.beta * p + (1 - divergence.beta) * q
        return divergence.beta * kl(p, m) + (1 - divergence.beta) * kl(q, m)
    return kl(p, q) if isinstance(divergence, ForwardKl) else kl(q, p)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return weights / weights.sum(-1, keepdims=True)


def draw(seed: int, *shape: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS = st.lists(st.floats(-30, 30), min_size=4, max_size=4)


def pair(p: list[float], q: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(p).log(), torch.tensor(q).log()


def test_numbers_worked_out_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL(p||q) = ln 2 / 2 + ln(2/3) / 2; m of beta 1/2 is (3/8, 5/8)."""
    p, q = pair([0.5, 0.5], [0.25, 0.75])
    assert float(ForwardKl()(p, q)) == pytest.approx(math.log(4 / 3) / 2, rel=1e-6)
    assert float(ReverseKl()(p, q)) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6)
    to_p = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    to_q = 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    assert float(JensenShannon(0.5)(p, q)) == pytest.approx((to_p + to_q) / 2, rel=1e-5)
    # beta 1/4: m is (5/16, 11/16), a quarter of the teacher.
    to_p = 0.5 * math.log(8 / 5) + 0.5 * math.log(8 / 11)
    to_q = 0.25 * math.log(4 / 5) + 0.75 * math.log(12 / 11)
    assert float(JensenShannon(0.25)(p, q)) == pytest.approx(0.25 * to_p + 0.75 * to_q, rel=1e-5)


def test_what_cannot_happen_adds_nothing_or_all() -> None:
    p, q = pair([1.0, 0.0, 0.0], [0.5, 0.5, 0.0])
    assert float(ForwardKl()(p, q)) == pytest.approx(math.log(2))
    assert float(ReverseKl()(p, q)) == math.inf
    assert float(JensenShannon()(p, q)) == pytest.approx(
        0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    )
    p, q = pair([1.0, 0.0], [0.0, 1.0])
    for beta in (0.1, 0.5, 0.7):
        bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert float(JensenShannon(beta)(p, q)) == pytest.approx(bound, rel=1e-6)


@EACH
def test_values_and_gradients_are_those_of_the_definition(divergence: Divergence) -> None:
    teacher, student = draw(0, 5, 7), draw(1, 5, 7).requires_grad_()
    for temperature in (0.7, 1.0, 2.0):
        value = divergence_of_logits(divergence, teacher, student, temperature=temperature)
        p = softmax(teacher.numpy(), temperature)
        expected = by_definition(divergence, p, softmax(student.detach().numpy(), temperature))
        np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-12, atol=1e-14)
        (gradient,) = torch.autograd.grad(value.sum(), student)
        for index in np.ndindex(5, 7):
            moved = np.stack([student.detach().numpy()] * 2)
            moved[0][index] += 1e-6
            moved[1][index] -= 1e-6
            up, down = by_definition(divergence, p, softmax(moved, temperature)).sum(-1)
            assert float(gradient[index]) == pytest.approx((up - down) / 2e-6, abs=2e-8)
    assert torch.autograd.gradcheck(
        lambda t, s: divergence_of_logits(divergence, t, s, temperature=1.5), (teacher.requires_grad_(), student)
    )


def test_the_forward_gradient_is_the_difference_of_the_distributions() -> None:
    teacher, student = draw(2, 3, 9), draw(3, 3, 9).requires_grad_()
    divergence_of_logits(ForwardKl(), teacher, student, temperature=2.0).sum().backward()
    expected = (softmax(student.detach().numpy(), 2.0) - softmax(teacher.numpy(), 2.0)) / 2.0
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-14)


def test_pytorch_agrees() -> None:
    teacher, student = draw(4, 6, 11).log_softmax(1), draw(5, 6, 11).log_softmax(1)
    kwargs = {"reduction": "none", "log_target": True}
    forward = torch.nn.functional.kl_div(student, teacher, **kwargs).sum(1)
    reverse = torch.nn.functional.kl_div(teacher, student, **kwargs).sum(1)
    torch.testing.assert_close(ForwardKl()(teacher, student), forward)
    torch.testing.assert_close(ReverseKl()(teacher, student), reverse)


def test_the_limits_of_beta_are_the_two_others() -> None:
    teacher, student = draw(6, 8, 5).log_softmax(1), draw(7, 8, 5).log_softmax(1)
    errors = []
    for beta in (1e-3, 1e-4, 1e-5):
        near_forward = JensenShannon(beta)(teacher, student) / beta
        near_reverse = JensenShannon(1 - beta)(teacher, student) / beta
        errors.append(
            max(
                float((near_forward / ForwardKl()(teacher, student) - 1).abs().max()),
                float((near_reverse / ReverseKl()(teacher, student) - 1).abs().max()),
            )
        )
    assert errors[0] < 0.05 and errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5


@EACH
@given(teacher=LOGITS, student=LOGITS, temperature=st.floats(0.5, 4))
@settings(max_examples=30, deadline=None)
def test_it_is_never_negative_and_zero_only_between_equals(
    divergence: Divergence, teacher: list[float], student: list[float], temperature: float
) -> None:
    p, q = torch.tensor([teacher]), torch.tensor([student])
    value = float(divergence_of_logits(divergence, p, q, temperature=temperature))
    assert value >= -1e-6
    if isinstance(divergence, JensenShannon):
        beta = divergence.beta
        assert value <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta) + 1e-6 <= math.log(2) + 2e-6
    same = float(divergence_of_logits(divergence, p, p + 3.0, temperature=temperature))  # logits are up to a constant
    assert abs(same) < 1e-5
    # Pinsker's inequality: distributions that are apart have a divergence. It holds in each half of the mixture too.
    apart = float(((p / temperature).softmax(1) - (q / temperature).softmax(1)).abs().sum())
    share = divergence.beta * (1 - divergence.beta) if isinstance(divergence, JensenShannon) else 1.0
    assert value >= share * apart**2 / 2 - 1e-6


def test_exchanged_sides_are_the_other_beta() -> None:
    teacher, student = draw(10, 8, 5).log_softmax(1), draw(11, 8, 5).log_softmax(1)
    torch.testing.assert_close(JensenShannon(0.2)(teacher, student), JensenShannon(0.8)(student, teacher))
    torch.testing.assert_close(ForwardKl()(teacher, student), ReverseKl()(student, teacher))


@EACH
def test_unwanted_positions_are_not_even_read(divergence: Divergence) -> None:
    teacher, student = draw(12, 2, 3, 5).float(), draw(13, 2, 3, 5).float()
    wanted = torch.tensor([[True, False, True], [False, True, False]])
    expected = divergence_of_logits(divergence, teacher, student)[[0, 2, 4]]
    teacher[~wanted], student[~wanted] = torch.nan, torch.inf
    student.requires_grad_()
    value = divergence_of_logits(divergence, teacher, student, wanted=wanted)
    assert torch.equal(value.detach(), expected) and value.dtype == torch.float32
    value.sum().backward()
    assert student.grad is not None
    assert bool((student.grad[~wanted] == 0).all()) and bool((student.grad[wanted] != 0).any(1).all())


@EACH
def test_huge_and_forbidden_logits_stay_finite(divergence: Divergence) -> None:
    """Differences of thousands, tokens that both sides rule out, and half precision."""
    teacher = torch.tensor([[1e4, 0.0, -1e4, -torch.inf], [3.0, 2.0, 1.0, -torch.inf]])
    student = torch.tensor([[9e3, -1e3, 0.0, -torch.inf], [1e3, 1e3, 1e3, -torch.inf]], requires_grad=True)
    value = divergence_of_logits(divergence, teacher, student)
    value.sum().backward()
    assert student.grad is not None
    assert bool(value.isfinite().all()) and bool(student.grad.isfinite().all())
    half = divergence_of_logits(divergence, teacher.bfloat16(), student.detach().bfloat16())
    assert half.dtype == torch.float32 and bool(half.isfinite().all())


@EACH
def test_all_tokens_listed_is_the_whole_vocabulary(divergence: Divergence) -> None:
    logits, student = draw(14, 6, 9), draw(15, 6, 9).requires_grad_()
    for temperature in (1.0, 2.0):
        listed = divergence_of_top(divergence, TopLogProbs.of_logits(logits, 9), student, temperature=temperature)
        whole = divergence_of_logits(divergence, logits, student, temperature=temperature)
        torch.testing.assert_close(listed, whole, rtol=1e-12, atol=1e-14)
        gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (listed, whole)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@EACH
def test_the_rest_is_one_event(divergence: Divergence) -> None:
    """By the definition over k + 1 shares, at any temperature; gradients by finite differences."""
    logits, student = draw(16, 5, 8), draw(17, 5, 8).requires_grad_()
    top = TopLogProbs.of_logits(logits, 3)

    def lumped(all_logits: np.ndarray) -> np.ndarray:
        p = softmax(all_logits)
        listed = np.take_along_axis(p, top.ids.numpy(), axis=1)
        return np.concatenate([listed, 1 - listed.sum(1, keepdims=True)], axis=1)

    for temperature in (1.0, 2.0):
        p, q = (lumped(x) ** (1 / temperature) for x in (logits.numpy(), student.detach().numpy()))
        expected = by_definition(divergence, p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True))
        value = divergence_of_top(divergence, top, student, temperature=temperature)
        np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: divergence_of_top(divergence, top, s, temperature=2.0), (student,))


def test_what_the_lump_loses_is_what_differs_inside_of_it() -> None:
    logits, student = draw(18, 20, 12), draw(19, 20, 12)
    top = TopLogProbs.of_logits(logits, 4)
    p, q = softmax(logits.numpy()), softmax(student.numpy())
    rest = np.ones_like(p, bool)
    np.put_along_axis(rest, top.ids.numpy(), False, axis=1)
    p_rest, q_rest = p[rest].reshape(20, 8), q[rest].reshape(20, 8)
    shares = p_rest.sum(1), q_rest.sum(1)
    inside = p_rest / shares[0][:, None], q_rest / shares[1][:, None]

    def lost(divergence: Divergence) -> np.ndarray:
        whole = divergence_of_logits(divergence, logits, student)
        return (whole - divergence_of_top(divergence, top, student)).numpy()

    np.testing.assert_allclose(lost(ForwardKl()), shares[0] * kl(*inside), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(lost(ReverseKl()), shares[1] * kl(inside[1], inside[0]), rtol=1e-9, atol=1e-12)
    for beta in (0.1, 0.5, 0.9):
        loss = lost(JensenShannon(beta))
        assert (loss >= 0).all() and (loss <= (beta * shares[0] + (1 - beta) * shares[1]) * math.log(2)).all()


@EACH
@given(teacher=st.lists(st.floats(-40, 40), min_size=6, max_size=6), shift=st.floats(-5, 5), k=st.integers(1, 5))
@example(teacher=[0.0, 38.5, 0.0, 0.0, 26.0, 0.0], shift=0.0, k=1)
@settings(max_examples=30, deadline=None)
def test_a_lump_is_bounded_by_the_whole_and_zero_between_equals(
    divergence: Divergence, teacher: list[float], shift: float, k: int
) -> None:
    # In float32 a rest of a few millionths is known to a few per cent, and the bound holds as far.
    logits = torch.tensor([teacher], dtype=torch.float64)
    student = logits.flip(1) * 0.5
    top = TopLogProbs.of_logits(logits, k)
    lumped = float(divergence_of_top(divergence, top, student))
    whole = float(divergence_of_logits(divergence, logits, student))
    # A rest that is next to nothing is taken as 1e-6, against shares of e^-80 and more.
    assert -1e-6 <= lumped <= whole + 1e-4
    assert abs(float(divergence_of_top(divergence, top, logits + shift))) < 1e-4


@EACH
def test_a_teacher_that_is_sure_gives_finite_numbers(divergence: Divergence) -> None:
    top = TopLogProbs(torch.tensor([[0, 2]]), torch.tensor([[0.0, -200.0]]))
    student = torch.tensor([[0.0, 3.0, 1.0, -1.0]], requires_grad=True)
    value = divergence_of_top(divergence, top, student)
    value.sum().backward()
    assert student.grad is not None and bool(student.grad.isfinite().all())
    assert 0 < float(value.detach()) < math.inf
    assert float(student.grad[0, 0]) < 0


def test_a_student_is_lumped_without_cancellation() -> None:
    """A rest of e^-40, far below the rounding of 1, still has its gradient."""
    student = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    top = TopLogProbs(torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]))
    value = divergence_of_top(ForwardKl(), top, student)
    assert float(value.detach()) == pytest.approx(
        0.5 * math.log(0.5) + 0.5 * (math.log(0.5) + 40 - math.log(2)), rel=1e-5
    )
    value.sum().backward()
    assert student.grad is not None and student.grad[0].tolist() == pytest.approx([0.5, -0.25, -0.25], abs=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_names(name: str) -> None:
    divergence = divergence_named(name, beta=0.25)
    expected: dict[str, Divergence] = {"forward": ForwardKl(), "reverse": ReverseKl(), "js": JensenShannon(0.25)}
    assert divergence == expected[name]
    logits = draw(20, 2, 4)
    assert bool((divergence_of_logits(divergence, logits, logits.flip(1)) > 0.01).all())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match=r"divergence is 'jsd', expected one of forward, reverse, js"):
        divergence_named("jsd")
    for beta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(InputError, match=r"beta is .* take forward for its limit at 0"):
            JensenShannon(beta)
    logits, top = torch.zeros(2, 4), TopLogProbs.of_logits(torch.zeros(2, 4), 2)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="temperature is"):
            divergence_of_logits(ForwardKl(), logits, logits, temperature=temperature)
        with pytest.raises(InputError, match="temperature is"):
            divergence_of_top(ForwardKl(), top, logits, temperature=temperature)
    with pytest.raises(InputError, match=r"teacher's logits are \(2, 4\) and the student's \(2, 5\)"):
        divergence_of_logits(ForwardKl(), logits, torch.zeros(2, 5))
    with pytest.raises(InputError, match=r"wanted is \(3,\)"):
        divergence_of_logits(ForwardKl(), logits, logits, wanted=torch.ones(3, dtype=torch.bool))
    with pytest.raises(InputError, match=r"expected \(2, vocab\)"):
        divergence_of_top(ForwardKl(), top, torch.zeros(3, 4))
    with pytest.raises(InputError, match=r"lists 2 tokens .* vocabulary of 1"):
        divergence_of_top(ForwardKl(), top, torch.zeros(2, 1))
