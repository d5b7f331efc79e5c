"""FlexLoRA: best truncations down, r_c rows up, the dense mean of the products, energy, mixed devices that learn."""

from __future__ import annotations

import numpy as np
import pytest
from federated import ToyFederation
from numpy.typing import NDArray
from toy_federation import A, B, ToyModel, toy_adapter

from cotune.errors import InputError
from cotune.federation.algorithm import Job, Update, shown_in
from cotune.federation.arrays import Arrays, num_bytes
from cotune.federation.coordinator import RoundRules
from cotune.federation.flexlora import ENERGY, FlexLora, descend_truncated
from cotune.federation.local_model import LocalSteps
from cotune.federation.robust.mean import Mean
from cotune.federation.robust.median import Median

STEPS = LocalSteps(num_steps=4, batch_size=4, learning_rate=0.1, optimizer="sgd")
RANKS = {"d0": 1, "d1": 2}


def drawn(rank: int, num_in: int, num_out: int, seed: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    like = toy_adapter(rank, num_in, num_out)
    return {name: rng.standard_normal(array.shape).astype(np.float32) for name, array in like.items()}


def product(arrays: Arrays) -> NDArray[np.float64]:
    return arrays[B].astype(np.float64) @ arrays[A].astype(np.float64)


def test_devices_get_their_best_truncation_and_the_server_the_best_of_the_mean() -> None:
    algorithm = FlexLora(steps=STEPS, ranks=RANKS)
    first = drawn(3, 6, 5, 0)
    state = algorithm.start(first)
    assert np.allclose(product(state), product(first), atol=1e-5)
    u, s, vt = np.linalg.svd(product(first))
    updates, products = [], []
    for index, (device, rank) in enumerate({"d0": 1, "d1": 2, "d2": 3}.items()):
        plan = algorithm.plan(state, 1, device, None)
        assert plan.reply == {A: (rank, 6), B: (5, rank)}
        assert num_bytes(plan.arrays) == 4 * rank * (6 + 5)
        assert np.allclose(product(plan.arrays), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-5)
        change = drawn(rank, 6, 5, 10 + index)
        updates.append(Update(device=device, arrays=change, weight=1.0 + index))
        products.append((1.0 + index) * product({n: plan.arrays[n] + change[n] for n in change}))
    merged = algorithm.merge(state, 1, updates, Mean())
    mean = sum(products) / 6
    u, s, vt = np.linalg.svd(mean)
    assert np.allclose(product(merged), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-4)
    assert merged[ENERGY] == pytest.approx(np.square(s[3:]).sum() / np.square(s).sum(), rel=1e-4)
    assert merged[ENERGY] > 0.001 and ENERGY not in algorithm.adapter(merged)
    # It is shown, also where another algorithm wraps this one.
    for shown in (merged, {f"inner/{name}": array for name, array in merged.items()}):
        assert shown_in(shown) == {"discarded_energy": float(merged[ENERGY][0])}


def test_a_device_trains_its_own_directions_alone() -> None:
    algorithm = FlexLora(steps=STEPS, ranks=RANKS)
    state = algorithm.start(toy_adapter(3))
    plan = algorithm.plan(state, 1, "d0", None)
    model = ToyModel.draw(3)
    job = Job(
        round_number=1, arrays=plan.arrays, settings=plan.settings, model=model, seeds=lambda r, k: 0, batch_seed=5
    )
    done = descend_truncated(job)
    alone = model.descend(plan.arrays, [A, B], STEPS, seed=5)
    assert {name: array.shape for name, array in done.arrays.items()} == dict(plan.reply)
    for name in (A, B):
        assert np.allclose(done.arrays[name], alone.arrays[name] - plan.arrays[name], atol=1e-7)


@pytest.mark.parametrize("rule", [Mean(), Median()])
def test_devices_of_three_ranks_learn_together_under_any_rule(rule: Mean | Median) -> None:
    federation = ToyFederation(
        num_devices=5, algorithm=FlexLora(steps=STEPS, ranks=RANKS), rules=RoundRules(num_rounds=12), combine=rule
    )
    end = federation.run()
    assert all(one.counted == federation.names for one in end.records)
    assert all(one.shown.keys() == {"discarded_energy"} for one in end.records if one.verdict == "accepted")
    assert end.best_loss is not None and end.start_loss is not None and end.best_loss < 0.3 * end.start_loss


def test_ranks_come_with_a_sentence_where_they_do_not_fit() -> None:
    with pytest.raises(InputError, match="ranks gives d0 0"):
        FlexLora(ranks={"d0": 0})
    with pytest.raises(InputError, match="ranks gives d0 9, expected 1 to 3"):
        FlexLora(ranks={"d0": 9}).start(toy_adapter(3))
