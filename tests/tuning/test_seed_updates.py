from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from philox_reference import reference_signs

from cotune.errors import InputError
from cotune.tuning.in_place import Slope
from cotune.tuning.seed_updates import Adam, Momentum, PlainDescent, UpdateRule
from cotune.tuning.sparse_mask import SparseMask
from cotune.tuning.tuned_numbers import TunedNumbers

LR, DECAY = 0.05, 0.3
# Four steps of two directions each, as (seed, slope).
STEPS = [[(10, 1.5), (11, -0.5)], [(12, 0.25), (13, 2.0)], [(14, -1.0), (15, 0.0)], [(16, 3.0), (17, -2.5)]]
ALL = [Slope(t, seed, value) for t, step in enumerate(STEPS) for seed, value in step]
RULES: list[UpdateRule] = [PlainDescent(), Momentum(beta=0.8, window=3), Adam(betas=(0.8, 0.9), window=4)]


def start() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("w", (3, 50)), ("b", (7,)))}


def gradients(name: str, num: int) -> list[np.ndarray]:
    """G_t of each step, from the NumPy directions: b has the signs from 0 on, w those from 128 on."""
    place = {"b": 0, "w": 128}[name]
    return [sum(g * reference_signs(seed, place, num) for seed, g in step) / len(step) for step in STEPS]


def applied(rule: UpdateRule, slopes: list[Slope], *, lr: float = LR, decay: float = 0.0) -> dict[str, torch.Tensor]:
    tensors = start()
    rule.apply(TunedNumbers(tensors), slopes, learning_rate=lr, weight_decay=decay)
    return tensors


def test_plain_descent_takes_the_newest_gradient() -> None:
    tensors = applied(PlainDescent(), ALL[-2:], decay=DECAY)
    for name, theta in start().items():
        kept = theta.numpy() * ((1 - LR * DECAY) if name == "w" else 1)
        expected = kept.ravel() - LR * gradients(name, theta.numel())[-1]
        np.testing.assert_allclose(tensors[name].numpy().ravel(), expected, rtol=1e-6, atol=1e-6)


def test_momentum_is_a_fading_mean() -> None:
    tensors = applied(Momentum(beta=0.5, window=3), ALL[-6:], decay=DECAY)
    for name, theta in start().items():
        oldest, middle, newest = gradients(name, theta.numel())[1:]
        kept = theta.numpy() * ((1 - LR * DECAY) if name == "w" else 1)
        expected = kept.ravel() - LR * (oldest + 2 * middle + 4 * newest) / 7
        np.testing.assert_allclose(tensors[name].numpy().ravel(), expected, rtol=1e-6, atol=1e-6)


def test_momentum_without_memory_is_plain_descent() -> None:
    plain, forgetful = applied(PlainDescent(), ALL[-2:]), applied(Momentum(beta=0.0, window=4), ALL)
    assert all(torch.equal(plain[name], forgetful[name]) for name in plain)


def test_adam_agrees_with_the_optimizer_that_stores_its_moments() -> None:
    theta = start()
    stored = {name: tensor.clone() for name, tensor in theta.items()}
    optimizer = torch.optim.AdamW(
        [{"params": [stored["w"]], "weight_decay": DECAY}, {"params": [stored["b"]], "weight_decay": 0.0}],
        lr=LR,
        betas=(0.8, 0.9),
    )
    numbers, rule = TunedNumbers(theta), Adam(betas=(0.8, 0.9), window=4)
    for t in range(4):
        for name, tensor in stored.items():
            tensor.grad = torch.from_numpy(gradients(name, tensor.numel())[t]).float().view(tensor.shape)
        optimizer.step()
        rule.apply(numbers, ALL[: 2 * t + 2], learning_rate=LR, weight_decay=DECAY)
        for name, tensor in stored.items():
            torch.testing.assert_close(theta[name], tensor, rtol=1e-5, atol=1e-6)


def test_with_one_direction_adam_only_rescales() -> None:
    """z^2 = 1: every number moves by lr, as in the first step of Adam."""
    tensors = applied(Adam(), [Slope(0, 10, 123.0)])
    change = tensors["w"] - start()["w"]
    torch.testing.assert_close(change.abs(), torch.full_like(change, LR), rtol=1e-4, atol=1e-6)
    assert np.array_equal(np.sign(-change.numpy()).ravel(), reference_signs(10, 128, 150))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_learning_rate_zero_changes_no_bit(rule: UpdateRule, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in start().items()}
    tensors["w"][0] = -0.0
    before = {name: tensor.view(torch.uint8).clone() for name, tensor in tensors.items()}
    rule.apply(TunedNumbers(tensors), ALL[-2 * rule.window :], learning_rate=0.0, weight_decay=DECAY)
    assert all(torch.equal(tensors[name].view(torch.uint8), before[name]) for name in tensors)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_only_the_masks_numbers_change(rule: UpdateRule) -> None:
    tensors, mask = start(), SparseMask(indices={"w": torch.tensor([3, 77, 149])})
    rule.apply(TunedNumbers(tensors, mask), ALL[-2 * rule.window :], learning_rate=LR, weight_decay=DECAY)
    changed = (tensors["w"] != start()["w"]).view(-1).nonzero()[:, 0].tolist()
    assert changed == [3, 77, 149] and torch.equal(tensors["b"], start()["b"])


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (Momentum, {"window": 0}),
        (Momentum, {"beta": 1.0}),
        (Adam, {"window": 0}),
        (Adam, {"betas": (0.9, -0.1)}),
        (Adam, {"epsilon": 0.0}),
    ],
)
def test_bad_settings_are_refused(make: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        make(**changes)
