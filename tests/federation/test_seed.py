"""Seed mode: slopes by hand, replay bit for bit, devices that were away."""

from __future__ import annotations

import numpy as np
import pytest
from toy_federation import A, B, ToyModel, toy_adapter

from cotune.errors import InputError
from cotune.federation.algorithm import Job, Update
from cotune.federation.catch_up import NOW, START, STEP
from cotune.federation.robust.mean import Mean
from cotune.federation.robust.median import Median
from cotune.federation.seed import SeedMode, measure_slopes
from cotune.tuning.directions import direction_seed


def seeds(round_number: int, index: int) -> int:
    return direction_seed(5, round_number, index)


def job(
    algorithm: SeedMode,
    state: dict[str, np.ndarray],
    number: int,
    since: int | None,
    device: Job | None,
    model: ToyModel,
) -> Job:
    """The job of a device that remembers what `device` did."""
    plan = algorithm.plan(state, number, "a", since)
    fresh = since is None or device is None
    return Job(
        round_number=number,
        arrays={**({} if fresh else device.arrays), **plan.arrays},
        settings=plan.settings,
        model=model,
        seeds=seeds,
        batch_seed=number,
        memory={} if fresh else device.memory,
    )


def test_slopes_by_hand() -> None:
    # One number b with A = 1, x = 1, y = 3: L = (b - 3)^2 / 2, its slope along z = +-1 is z (b - 3), exact for squares.
    adapter = {A: np.ones((1, 1), np.float32), B: np.zeros((1, 1), np.float32)}
    model = ToyModel(np.ones((1, 1)), np.full((1, 1), 3.0))
    algorithm = SeedMode(seeds=seeds, num_directions=2, learning_rate=0.5, zo_eps=0.25, batch_size=1)
    state = algorithm.start(adapter)
    done = measure_slopes(job(algorithm, state, 1, None, None, model))
    # First step from b = 0: size 3, b moves to 1.5; second from there: size 1.5, whatever the signs.
    assert np.abs(done.arrays["slopes"]).tolist() == [3.0, 1.5]
    merged = algorithm.merge(state, 1, [Update(device="a", arrays=done.arrays)], Mean())
    assert algorithm.adapter(merged)[B].item() == pytest.approx(2.25)
    assert state[NOW + B].item() == 0 and merged[START + B].item() == 0


def test_two_directions_per_step_by_hand() -> None:
    # One number b: both slopes of the first step are z 3 at b = 0, so their mean moves b by 3 lr whatever the signs.
    adapter = {A: np.ones((1, 1), np.float32), B: np.zeros((1, 1), np.float32)}
    model = ToyModel(np.ones((1, 1)), np.full((1, 1), 3.0))
    algorithm = SeedMode(
        seeds=seeds, num_directions=4, num_directions_per_step=2, learning_rate=0.5, zo_eps=0.25, batch_size=1
    )
    state = algorithm.start(adapter)
    done = measure_slopes(job(algorithm, state, 1, None, None, model))
    assert np.abs(done.arrays["slopes"]).tolist() == [3.0, 3.0, 1.5, 1.5]
    merged = algorithm.merge(state, 1, [Update(device="a", arrays=done.arrays)], Mean())
    assert algorithm.adapter(merged)[B].item() == pytest.approx(2.25)
    late = job(algorithm, merged, 2, None, None, model)
    measure_slopes(late)
    assert late.memory[NOW + B].tobytes() == merged[NOW + B].tobytes()


def test_the_gate_leaves_out_directions_on_which_devices_disagree() -> None:
    open_, gated = (SeedMode(seeds=seeds, num_directions=2, gate=gate) for gate in (None, 2.0))
    # Means 2 and 1; sample variances 1 and 49 of 3, so standard errors 0.577 and 4.04.
    replies = [(1.0, -6.0), (2.0, 1.0), (3.0, 8.0)]
    updates = [Update(device=str(i), arrays={"slopes": np.array(one, np.float32)}) for i, one in enumerate(replies)]
    state = gated.start(toy_adapter())
    step = f"{STEP}000001"
    assert open_.merge(state, 1, updates, Mean())[step].tolist() == [2.0, 1.0]
    assert gated.merge(state, 1, updates, Mean())[step].tolist() == [2.0, 0.0]
    # 2 / 0.577 = 3.46 standard errors.
    for gate, expected in ((3.4, 2.0), (3.5, 0.0)):
        merged = SeedMode(seeds=seeds, num_directions=2, gate=gate).merge(state, 1, updates, Mean())
        assert merged[step][0] == expected
    # One reply has no error to speak of.
    assert gated.merge(state, 1, updates[:1], Mean())[step].tolist() == [1.0, -6.0]


def test_a_liar_cannot_close_the_gate_of_a_robust_rule() -> None:
    honest = [Update(device=str(i), arrays={"slopes": np.array([2 + i / 10], np.float32)}) for i in range(4)]
    liar = Update(device="liar", arrays={"slopes": np.array([1e6], np.float32)})
    algorithm = SeedMode(seeds=seeds, num_directions=1, gate=2.0)
    state, step = algorithm.start(toy_adapter()), f"{STEP}000001"
    assert algorithm.merge(state, 1, [*honest, liar], Mean())[step].tolist() == [0.0]
    assert algorithm.merge(state, 1, [*honest, liar], Median())[step].tolist() == [pytest.approx(2.2)]


def test_the_servers_adapter_is_the_devices_bit_for_bit() -> None:
    algorithm = SeedMode(seeds=seeds, num_directions=20, learning_rate=0.01, batch_size=4)
    state = algorithm.start(toy_adapter(3, 3, 2))
    device: Job | None = None
    for number in range(1, 6):
        device = job(algorithm, state, number, None if number == 1 else number - 1, device, ToyModel.draw(0))
        before = algorithm.adapter(state)
        done = measure_slopes(device)
        for name in (B,):
            assert device.memory[NOW + name].tobytes() == before[name].tobytes()
        state = dict(algorithm.merge(state, number, [Update(device="a", arrays=done.arrays)], Mean()))


def test_a_device_that_was_away_gets_only_the_steps_that_it_missed() -> None:
    algorithm = SeedMode(seeds=seeds, num_directions=8, learning_rate=0.01, batch_size=4, keep_steps=3)
    state = algorithm.start(toy_adapter())
    away = job(algorithm, state, 1, None, None, ToyModel.draw(1))
    measure_slopes(away)
    for number in range(1, 4):
        slopes = np.random.default_rng(number).standard_normal(8).astype(np.float32)
        state = dict(algorithm.merge(state, number, [Update(device="b", arrays={"slopes": slopes})], Mean()))
    late = job(algorithm, state, 4, 1, away, ToyModel.draw(1))
    assert sorted(algorithm.plan(state, 4, "a", 1).arrays) == [f"{STEP}{n:06d}" for n in (1, 2, 3)]
    measure_slopes(late)
    assert late.memory[NOW + B].tobytes() == algorithm.adapter(state)[B].tobytes()
    # A fourth step pushes the first out: whoever needs that one gets the adapter.
    slopes = np.ones(8, np.float32)
    state = dict(algorithm.merge(state, 4, [Update(device="b", arrays={"slopes": slopes})], Mean()))
    plan = algorithm.plan(state, 5, "a", 1)
    assert START + A in plan.arrays and f"{STEP}000001" not in plan.arrays and NOW + B not in plan.arrays
    new = job(algorithm, state, 5, None, None, ToyModel.draw(1))
    measure_slopes(new)
    assert new.memory[NOW + B].tobytes() == algorithm.adapter(state)[B].tobytes()


def test_void_rounds_leave_no_step() -> None:
    algorithm = SeedMode(seeds=seeds, num_directions=4, batch_size=2)
    state = algorithm.start(toy_adapter())
    first = job(algorithm, state, 1, None, None, ToyModel.draw(1))
    measure_slopes(first)
    # Rounds 1 and 2 were void.
    third = job(algorithm, state, 3, 1, first, ToyModel.draw(1))
    measure_slopes(third)
    assert np.array_equal(third.memory[NOW + B], state[NOW + B])


def test_a_robust_rule_sees_slopes_of_the_same_directions() -> None:
    algorithm = SeedMode(seeds=seeds, num_directions=64, learning_rate=0.02, batch_size=8)
    models = [ToyModel.draw(seed, shift=0.05) for seed in range(5)]
    slopes = []
    for model in models:
        state = algorithm.start(toy_adapter())
        slopes.append(measure_slopes(job(algorithm, state, 1, None, None, model)).arrays["slopes"])
    # Devices whose texts are alike measure alike: that is what medians need.
    assert np.corrcoef(np.stack(slopes)).min() > 0.5


def test_devices_learn_together_from_slopes_alone() -> None:
    algorithm = SeedMode(seeds=seeds, num_directions=32, learning_rate=0.03, batch_size=8)
    models = [ToyModel.draw(seed) for seed in range(3)]
    state = algorithm.start(toy_adapter(3, 3, 2))
    start = np.mean([m.evaluate(algorithm.adapter(state))[0] / 12 for m in models])
    devices: list[Job | None] = [None] * 3
    for number in range(1, 21):
        updates = []
        for index, model in enumerate(models):
            devices[index] = job(algorithm, state, number, None if number == 1 else number - 1, devices[index], model)
            updates.append(Update(device=str(index), arrays=measure_slopes(devices[index]).arrays))
        state = dict(algorithm.merge(state, number, updates, Mean()))
    assert np.mean([m.evaluate(algorithm.adapter(state))[0] / 12 for m in models]) < 0.1 * start


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_directions": 0}, "num_directions"),
        ({"num_directions": 10**11}, "num_directions is 100000000000, expected at most"),
        ({"zo_eps": 0.0}, "zo_eps"),
        ({"gate": -1.0}, "gate is -1.0"),
        ({"num_directions": 5, "num_directions_per_step": 2}, "a multiple of num_directions_per_step, 2"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        SeedMode(seeds=seeds, **change)
