"""RoLoRA: alternating factors, exact means, half the bytes."""

from __future__ import annotations

import numpy as np
import pytest
from toy_federation import A, B, ToyModel, toy_adapter

from cotune.errors import InputError
from cotune.federation.algorithm import Job, Update
from cotune.federation.arrays import num_bytes
from cotune.federation.descend import descend
from cotune.federation.fedit import FedIT
from cotune.federation.ffa_lora import FfaLora
from cotune.federation.local_model import LocalSteps
from cotune.federation.robust.mean import Mean
from cotune.federation.rolora import RoLora, factor_of

STEPS = LocalSteps(num_steps=5, batch_size=4, learning_rate=0.1, optimizer="sgd")


@pytest.mark.parametrize("round_number", [1, 2])
def test_the_mean_of_the_products_is_the_product_of_the_means(round_number: int) -> None:
    algorithm, rng = RoLora(steps=STEPS), np.random.default_rng(0)
    state = algorithm.start(
        {name: rng.standard_normal(a.shape).astype(np.float32) for name, a in toy_adapter().items()}
    )
    trained = A if round_number == 2 else B
    changes = [rng.standard_normal(state[trained].shape).astype(np.float32) for _ in range(3)]
    updates = [Update(device=str(i), arrays={trained: change}) for i, change in enumerate(changes)]
    merged = algorithm.merge(state, round_number, updates, Mean())
    products = []
    for change in changes:
        own = {**state, trained: state[trained] + change}
        products.append(own[B].astype(np.float64) @ own[A])
    assert np.allclose(merged[B].astype(np.float64) @ merged[A], np.mean(products, axis=0), atol=1e-6)
    other = B if trained == A else A
    assert np.array_equal(merged[other], state[other])


def test_weighted_means_by_hand_of_the_factor_whose_turn_it_is() -> None:
    algorithm = RoLora(steps=STEPS)
    state = algorithm.start({A: np.array([[1.0, 2.0]], np.float32), B: np.array([[1.0]], np.float32)})
    updates = [
        Update(device=device, arrays={B: np.array([[b]], np.float32)}, weight=weight)
        for device, b, weight in (("a", 4.0, 1.0), ("b", 8.0, 3.0))
    ]
    odd = algorithm.merge(state, 1, updates, Mean())
    # B: 1 + (4 + 3 x 8) / 4.
    assert odd[B].tolist() == [[8.0]] and odd[A].tolist() == [[1.0, 2.0]]
    updates = [
        Update(device=device, arrays={A: np.array([a], np.float32)}, weight=weight)
        for device, a, weight in (("a", [2.0, 0.0], 1.0), ("b", [-2.0, 4.0], 3.0))
    ]
    even = algorithm.merge(odd, 2, updates, Mean())
    # A: [1, 2] + ([2, 0] + 3 [-2, 4]) / 4.
    assert even[A].tolist() == [[0.0, 5.0]] and even[B].tolist() == [[8.0]]


def test_factors_take_turns_and_only_the_last_one_goes_down() -> None:
    algorithm = RoLora(steps=STEPS)
    state = algorithm.start(toy_adapter())
    assert [factor_of(n) for n in (1, 2, 3)] == ["*lora_B*", "*lora_A*", "*lora_B*"]
    for round_number, since, down, up in [
        (1, None, {A, B}, {B}),
        (2, 1, {B}, {A}),
        (3, 2, {A}, {B}),
        (3, 1, {A, B}, {B}),
    ]:
        plan = algorithm.plan(state, round_number, "a", since)
        assert (plan.arrays.keys(), plan.reply.keys()) == (down, up)


def test_bytes_are_half_of_fedits() -> None:
    sizes = {}
    for name, algorithm in {"fedit": FedIT(steps=STEPS), "rolora": RoLora(steps=STEPS)}.items():
        # Square layers, so that both factors have as many numbers.
        state = algorithm.start(toy_adapter(2, 8, 8))
        plans = [algorithm.plan(state, n, "a", n - 1) for n in (2, 3)]
        sizes[name] = [num_bytes(plan.arrays) for plan in plans]
    assert sizes["rolora"] == [size / 2 for size in sizes["fedit"]]


@pytest.mark.parametrize("algorithm", [RoLora(steps=STEPS), FfaLora(steps=STEPS), FedIT(steps=STEPS)])
def test_devices_learn_together(algorithm: RoLora | FfaLora | FedIT) -> None:
    models = [ToyModel.draw(seed) for seed in range(4)]
    state = algorithm.start(toy_adapter())
    held: list[dict[str, np.ndarray]] = [{} for _ in models]
    losses = []
    for round_number in range(1, 31):
        updates = []
        for index, model in enumerate(models):
            plan = algorithm.plan(state, round_number, str(index), None if round_number == 1 else round_number - 1)
            held[index].update(plan.arrays)
            assert held[index].keys() == state.keys()
            for name in state:
                assert np.array_equal(held[index][name], state[name])
            done = descend(
                Job(
                    round_number=round_number,
                    arrays=held[index],
                    settings=plan.settings,
                    model=model,
                    seeds=lambda *_: 0,
                    batch_seed=round_number,
                )
            )
            updates.append(Update(device=str(index), arrays=done.arrays))
        state = algorithm.merge(state, round_number, updates, Mean())
        losses.append(np.mean([model.evaluate(algorithm.adapter(state))[0] / 12 for model in models]))
    # FFA-LoRA at rank 2 of 3 inputs cannot reach every map; the others can.
    assert losses[-1] < (0.9 if isinstance(algorithm, FfaLora) else 0.05) * losses[0]


@pytest.mark.parametrize("algorithm", [RoLora(), FfaLora()])
def test_an_adapter_without_factors_is_refused(algorithm: RoLora | FfaLora) -> None:
    with pytest.raises(InputError, match="lora_B"):
        algorithm.start({"prompt": np.zeros(3, np.float32)})
