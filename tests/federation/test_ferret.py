"""Ferret: a change through its coordinates, by hand and on average."""

from __future__ import annotations

import numpy as np
import pytest
from toy_federation import A, B, ToyModel, toy_adapter

from cotune.errors import InputError
from cotune.federation.algorithm import Job, Update
from cotune.federation.arrays import Arrays
from cotune.federation.catch_up import NOW, START, STEP
from cotune.federation.ferret import COORDINATES, SPLIT, Ferret, after_step, send_coordinates, split_by_norms
from cotune.federation.local_model import LocalSteps
from cotune.federation.replay import coordinates
from cotune.federation.robust.mean import Mean
from cotune.tuning.directions import direction_seed

STEPS = LocalSteps(num_steps=3, batch_size=4, learning_rate=0.1, optimizer="sgd")
NO_LIMIT = {"server_learning_rate": 1.0, "max_move_norm": 1e9}


def seeds(round_number: int, index: int) -> int:
    return direction_seed(7, round_number, index)


def job(algorithm: Ferret, state: Arrays, number: int, since: int | None, device: Job | None, model: ToyModel) -> Job:
    plan = algorithm.plan(state, number, "a", since)
    return Job(
        round_number=number,
        arrays={**(device.arrays if device and since is not None else {}), **plan.arrays},
        settings=plan.settings,
        model=model,
        seeds=seeds,
        batch_seed=number,
        memory=device.memory if device and since is not None else {},
    )


def test_one_number_comes_back_exactly() -> None:
    # With d = 1, z^2 = 1: <delta, z> z is delta. L = (ab - 3)^2 / 2 from a = 1, b = 0: one step of 0.5 gives b = 1.5.
    adapter = {A: np.ones((1, 1), np.float32), B: np.zeros((1, 1), np.float32)}
    model = ToyModel(np.ones((1, 1)), np.full((1, 1), 3.0))
    steps = LocalSteps(num_steps=1, batch_size=1, learning_rate=0.5, optimizer="sgd")
    algorithm = Ferret(seeds=seeds, steps=steps, num_directions=4)
    state = algorithm.start(adapter)
    assert state[SPLIT].tolist() == [2.0, 2.0]
    done = send_coordinates(job(algorithm, state, 1, None, None, model))
    assert np.abs(done.arrays[COORDINATES]).tolist() == [0.0, 0.0, 1.5, 1.5]
    merged = algorithm.merge(state, 1, [Update(device="a", arrays=done.arrays)], Mean())
    assert algorithm.adapter(merged)[A].item() == 1.0 and algorithm.adapter(merged)[B].item() == 1.5
    # A did not move, so B gets all that is free.
    assert merged[SPLIT].tolist() == [1.0, 3.0]
    assert state[NOW + B].item() == 0.0


def test_the_scale_is_right_on_average_and_as_long_as_the_formula_says() -> None:
    rng = np.random.default_rng(0)
    dim, per_step, trials = 24, 4, 200
    delta = {B: rng.standard_normal((4, 6)).astype(np.float32)}
    start = {B: np.zeros((4, 6), np.float32)}
    found = []
    for trial in range(trials):
        drawn = [seeds(trial, k) for k in range(per_step)]
        step = np.append(coordinates(delta, drawn), per_step).astype(np.float32)
        found.append(after_step(start, step, drawn, **NO_LIMIT)[B].astype(np.float64))
    length = float(np.square(delta[B]).sum())
    ratio = float(np.mean([np.square(one).sum() for one in found])) / length
    assert ratio == pytest.approx(1 + (dim - 1) / per_step, rel=0.1)
    # The mean of the trials is off by the square root of (ratio - 1) / trials of the length, about 0.17.
    assert np.linalg.norm(np.mean(found, axis=0) - delta[B]) / np.sqrt(length) < 0.25


def test_each_directions_move_is_limited() -> None:
    start = {B: np.zeros((2, 2), np.float32)}
    # 6 / 2 along each of two directions of norm 2: a move of norm 6, limited to 1.
    step = np.array([6.0, 6.0, 2.0], np.float32)
    same = [5, 5]
    free = after_step(start, step, same, **NO_LIMIT)[B]
    held = after_step(start, step, same, server_learning_rate=0.5, max_move_norm=1.0)[B]
    assert np.linalg.norm(free) == pytest.approx(12.0) and np.linalg.norm(held) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("norms", "num", "expected"),
    [
        ([3.0, 0.0, 1.0], 9, [6, 1, 2]),
        ([0.0, 0.0], 5, [3, 2]),
        ([1.0, 1.0, 1.0], 3, [1, 1, 1]),
        ([1e-30, 1.0], 10, [1, 9]),
        ([float("inf"), 1.0], 4, [2, 2]),
    ],
)
def test_directions_are_split_by_norms(norms: list[float], num: int, expected: list[int]) -> None:
    split = split_by_norms(np.array(norms), num)
    assert split.tolist() == expected and split.sum() == num


def test_devices_replay_the_servers_adapter_bit_for_bit() -> None:
    algorithm = Ferret(seeds=seeds, steps=STEPS, num_directions=10, server_learning_rate=0.3, keep_steps=2)
    state = algorithm.start(toy_adapter(3, 3, 2))
    device, away = None, None
    for number in range(1, 6):
        device = job(algorithm, state, number, None if number == 1 else number - 1, device, ToyModel.draw(0))
        away = away or device
        done = send_coordinates(device)
        for name in (A, B):
            assert device.memory[NOW + name].tobytes() == algorithm.adapter(state)[name].tobytes()
        state = dict(algorithm.merge(state, number, [Update(device="a", arrays=done.arrays)], Mean()))
        assert state[SPLIT].sum() == 10
    # Two of the five steps are kept: whoever has those behind it gets them, others the adapter.
    assert sorted(name for name in state if name.startswith(STEP)) == [f"{STEP}000004", f"{STEP}000005"]
    assert algorithm.plan(state, 6, "a", 5).arrays.keys() == {f"{STEP}000005", SPLIT}
    assert START + A in algorithm.plan(state, 6, "a", 3).arrays
    late = job(algorithm, state, 6, None, None, ToyModel.draw(1))
    send_coordinates(late)
    assert late.memory[NOW + B].tobytes() == algorithm.adapter(state)[B].tobytes()


def test_too_few_directions_are_refused() -> None:
    with pytest.raises(InputError, match="expected at least 2, one for each"):
        Ferret(seeds=seeds, num_directions=1).start(toy_adapter())
    with pytest.raises(InputError, match="num_directions is 33554432, expected at most 16777216"):
        Ferret(seeds=seeds, num_directions=2**25)
    with pytest.raises(InputError, match="max_move_norm"):
        Ferret(seeds=seeds, max_move_norm=0.0)
