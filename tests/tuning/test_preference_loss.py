"""The loss of preferences: by hand, against the form that TRL has, its slopes, and what holds for any numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.tuning.preference_loss import preference_losses, text_log_probs

NATS = st.floats(-50, 0, width=32)


def loss_of(better: float, worse: float, reference_better: float, reference_worse: float, beta: float = 0.1) -> float:
    log_probs, reference = (
        torch.tensor([[better, worse]], dtype=torch.float64),
        torch.tensor([[reference_better, reference_worse]], dtype=torch.float64),
    )
    return float(preference_losses(log_probs, reference, beta=beta))


def test_numbers_worked_out_by_hand() -> None:
    # beta [(-10 + 11) - (-12 + 11)] = 0.1 * 2; -log sigmoid(0.2) = log(1 + e^-0.2).
    assert loss_of(-10, -12, -11, -11) == pytest.approx(math.log1p(math.exp(-0.2))) == pytest.approx(0.598139, abs=1e-6)
    # The worse one gained: beta [(-7 + 5) - (-3 + 4)] = 0.5 * -3; log(1 + e^1.5).
    assert loss_of(-7, -3, -5, -4, beta=0.5) == pytest.approx(1.701413, abs=1e-6)
    # Nothing was learnt yet.
    assert loss_of(-7, -3, -7, -3) == pytest.approx(math.log(2))


@given(NATS, NATS, NATS, NATS, st.sampled_from([0.01, 0.1, 1.0]))
def test_the_difference_of_log_ratios_is_all_that_counts(
    better: float, worse: float, reference_better: float, reference_worse: float, beta: float
) -> None:
    # TRL writes its "sigmoid" loss as -logsigmoid(beta (policy's log-ratio - reference's log-ratio)).
    logits = (better - worse) - (reference_better - reference_worse)
    given_order = loss_of(better, worse, reference_better, reference_worse, beta)
    assert given_order == pytest.approx(math.log1p(math.exp(-beta * logits)), rel=1e-9)
    # log sigmoid(z) - log sigmoid(-z) = z: the other order costs exactly beta times the margin more.
    other_order = loss_of(worse, better, reference_worse, reference_better, beta)
    assert other_order - given_order == pytest.approx(beta * logits, abs=1e-9)


def test_slopes_are_those_of_differences_and_none_goes_to_the_reference() -> None:
    log_probs = torch.tensor([[-10.0, -12.0], [-3.0, -1.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-11.0, -11.0], [-2.0, -2.0]], dtype=torch.float64, requires_grad=True)
    losses = preference_losses(log_probs, reference, beta=0.1)
    slope, none = torch.autograd.grad(losses.sum(), (log_probs, reference), allow_unused=True)
    # -beta sigmoid(-0.2) = -0.1 * 0.4501660 for the better one, the opposite for the worse one.
    assert slope[0].tolist() == pytest.approx([-0.0450166, 0.0450166], abs=1e-7) and none is None
    assert torch.autograd.gradcheck(
        lambda them: preference_losses(them, reference.detach(), beta=0.1), (log_probs,), eps=1e-5
    )


def test_far_from_the_reference_it_stays_finite() -> None:
    assert loss_of(-1e4, 0, 0, -1e4, beta=1.0) == 2e4 and loss_of(0, -1e4, -1e4, 0, beta=1.0) == 0


def test_a_texts_log_probability_is_the_sum_of_its_tokens() -> None:
    assert text_log_probs(torch.tensor([0.5, 0.25, 2.0]), [1, 2]).tolist() == [-0.5, -2.25]


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_betas_that_cannot_be_are_refused(beta: float) -> None:
    with pytest.raises(InputError, match="beta is"):
        loss_of(0, 0, 0, 0, beta=beta)


def test_other_shapes_are_refused() -> None:
    for log_probs, reference in ((torch.zeros(2), torch.zeros(2)), (torch.zeros(3, 2), torch.zeros(1, 2))):
        with pytest.raises(InputError, match=r"expected \(pairs, 2\)"):
            preference_losses(log_probs, reference, beta=0.1)
