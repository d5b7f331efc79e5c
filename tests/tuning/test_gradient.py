from __future__ import annotations

import math

import pytest
import torch

from cotune.errors import InputError, NonFiniteLossError
from cotune.tuning.gradient import GradientState


def start(weight_decay: float = 0.0) -> GradientState:
    state = GradientState.start({"w": torch.tensor([2.0, -1.0]), "b": torch.tensor(0.5)}, weight_decay=weight_decay)
    state.learning_rate = 0.1
    return state


def test_one_step_by_hand() -> None:
    # The first AdamW step moves every parameter by the learning rate against the sign of its gradient, after decay:
    # w = 2 (1 - 0.1 * 0.5) - 0.1 = 1.8 and -1 (1 - 0.05) - 0.1 = -1.05, b = 0.5 * 0.95 + 0.1 = 0.575.
    state = start(weight_decay=0.5)
    metrics = state.descend(state.params["w"].sum() - state.params["b"], max_grad_norm=100.0)
    assert state.params["w"].tolist() == pytest.approx([1.8, -1.05])
    assert state.params["b"].item() == pytest.approx(0.575)
    assert metrics == pytest.approx({"loss": 0.5, "grad_norm": math.sqrt(3)})
    assert state.num_steps == 1


def test_gradients_are_clipped_to_the_total_norm() -> None:
    state = start()
    state.descend(30 * state.params["w"][0] + 40 * state.params["b"], max_grad_norm=5.0)
    # After one step exp_avg is a tenth of the clipped gradient, (3, 4) of norm 5.
    assert state.to_tensors()["exp_avg.w"].tolist() == pytest.approx([0.3, 0.0], rel=1e-4)
    assert state.to_tensors()["exp_avg.b"].item() == pytest.approx(0.4, rel=1e-4)


def test_gradients_go_when_they_were_used() -> None:
    """Kept, they would stand beside the next step's activations."""
    state = start()
    state.descend(state.params["w"].sum(), max_grad_norm=1.0)
    assert all(leaf.grad is None for leaf in state.params.values())


def test_the_given_parameters_stay_as_they_are() -> None:
    given = {"w": torch.ones(2)}
    state = GradientState.start(given, weight_decay=0.0)
    state.learning_rate = 1.0
    state.descend(state.params["w"].sum(), max_grad_norm=1.0)
    assert given["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_changes_nothing(bad: float) -> None:
    state = start()
    with pytest.raises(NonFiniteLossError) as caught:
        state.descend(state.params["w"].sum() * bad, max_grad_norm=1.0)
    assert caught.value.step == 0
    assert state.params["w"].tolist() == [2.0, -1.0]


def test_a_non_finite_gradient_changes_nothing() -> None:
    state = start()
    with pytest.raises(NonFiniteLossError):
        state.descend((state.params["b"] - 0.5).sqrt(), max_grad_norm=1.0)  # 0, with an infinite slope
    assert state.params["b"].item() == 0.5


def test_a_restored_state_goes_on_exactly() -> None:
    def step(state: GradientState) -> None:
        state.learning_rate = 0.1
        state.descend((state.params["w"] ** 2).sum() + state.params["b"] ** 4, max_grad_norm=1.0)

    undisturbed = start(weight_decay=0.1)
    for _ in range(3):
        step(undisturbed)
    tensors = {name: tensor.clone() for name, tensor in undisturbed.to_tensors().items()}
    restored = start(weight_decay=0.1)
    restored.load_tensors(tensors)
    for _ in range(3):
        step(undisturbed)
        step(restored)
    assert restored.num_steps == 6
    for name, tensor in undisturbed.to_tensors().items():
        assert torch.equal(tensor, restored.to_tensors()[name]), name


def test_tensors_of_another_method_or_shape_are_refused() -> None:
    state = start()
    tensors = state.to_tensors()
    with pytest.raises(InputError, match="other parameters"):
        state.load_tensors({name: tensor for name, tensor in tensors.items() if name != "parameter.b"})
    with pytest.raises(InputError, match="shape"):
        state.load_tensors({**tensors, "parameter.w": torch.zeros(3)})
