"""FedIT, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from lora_devices import ideal_update, random_devices
from toy_federation import A, B, ToyModel, toy_adapter

from cotune.errors import InputError
from cotune.federation.algorithm import Job, Update
from cotune.federation.descend import descend, names_like, steps_of
from cotune.federation.fedit import FedIT
from cotune.federation.local_model import LocalSteps


def weighted_mean(updates: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.average(updates, axis=0, weights=weights).astype(np.float32)


def ones(a: float, b: float) -> dict[str, np.ndarray]:
    return {A: np.full((1, 1), a, np.float32), B: np.full((1, 1), b, np.float32)}


def test_each_factor_is_averaged_apart_so_the_product_is_not() -> None:
    state = FedIT().start(ones(1, 0))
    updates = [Update(device="a", arrays=ones(1, 2)), Update(device="b", arrays=ones(-1, 4), weight=3.0)]
    merged = FedIT().merge(state, 1, updates, weighted_mean)
    # A: 1 + (1 - 3)/4; B: 0 + (2 + 12)/4. The mean of the products (2 x 2, 4 x 0) would be 1, theirs is 1.75.
    assert (merged[A].item(), merged[B].item()) == (0.5, 3.5)
    assert (state[A].item(), state[B].item()) == (1.0, 0.0)


def test_the_error_grows_with_disagreement() -> None:
    """Section 2.9 of the design study: 0.1, 4.2 and 26.7 % at low, medium and full disagreement, m = n = 256."""
    errors = []
    for disagreement in (0.03, 0.3, 1.0):
        devices = random_devices(seed=1, ranks=[4] * 10, out=48, width=48, disagreement=disagreement)
        updates = [
            Update(device=str(index), arrays={A: one["q"].a, B: one["q"].b}) for index, one in enumerate(devices)
        ]
        state = {name: np.zeros_like(array) for name, array in updates[0].arrays.items()}
        merged = FedIT().merge(state, 1, updates, weighted_mean)
        ideal = ideal_update(devices, [1.0] * 10, "q")
        error = devices[0]["q"].scale * merged[B].astype(np.float64) @ merged[A] - ideal
        errors.append(float(np.linalg.norm(error) / np.linalg.norm(ideal)))
    assert errors[0] < 0.005 < 0.01 < errors[1] < 0.15 < errors[2]


def test_a_device_gets_all_and_sends_what_its_steps_changed() -> None:
    algorithm = FedIT(steps=LocalSteps(num_steps=3, batch_size=4, learning_rate=0.1, optimizer="sgd"))
    state, model = algorithm.start(toy_adapter()), ToyModel.draw(1)
    plan = algorithm.plan(state, 4, "a", 3)
    assert plan.work == "descend" and plan.arrays.keys() == plan.reply.keys() == state.keys()
    done = descend(
        Job(round_number=4, arrays=plan.arrays, settings=plan.settings, model=model, seeds=lambda *_: 0, batch_seed=7)
    )
    alone = model.descend(state, [A, B], algorithm.steps, seed=7)
    for name in state:
        assert np.allclose(state[name] + done.arrays[name], alone.arrays[name], atol=1e-6)
        assert done.arrays[name].shape == plan.reply[name]
    assert done.loss == alone.loss


@pytest.mark.parametrize(("change", "words"), [({"optimizer": "adam"}, "optimizer is 'adam'"), ({"num_steps": 0}, "0")])
def test_steps_that_make_no_sense_are_refused(change: dict[str, object], words: str) -> None:
    good = {"num_steps": 1, "batch_size": 1, "learning_rate": 0.1, "optimizer": "sgd"}
    assert steps_of(good) == LocalSteps(num_steps=1, batch_size=1, learning_rate=0.1, optimizer="sgd")
    with pytest.raises(InputError, match=words):
        steps_of({**good, **change})
    with pytest.raises(InputError, match="nothing of batch_size"):
        steps_of({"num_steps": 1})


def test_names_are_found_by_short_patterns() -> None:
    names = ["layers.0.q.lora_A.weight", "layers.0.q.lora_B.weight", "layers.1.q.lora_B.weight"]
    assert names_like(names, "*layers.0.*") == names[:2]
    assert names_like(names, "*lora_A*,*layers.1.*") == [names[0], names[2]]
    with pytest.raises(InputError, match="no array is like"):
        names_like(names, "*lora_C*")
