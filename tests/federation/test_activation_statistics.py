from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.activation_statistics import (
    directions_from_sketch,
    next_omega,
    shared_omega,
    sketch,
)


def device_inputs(seed: int, *, num_devices: int = 4, dim: int = 12) -> list[NDArray[np.float32]]:
    """Inputs of different lengths, with directions of different strength."""
    rng = np.random.default_rng(seed)
    strength = 2.0 ** -np.arange(dim)
    mixing = np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return [
        ((rng.standard_normal((5 + 3 * index, dim)) * strength) @ mixing).astype(np.float32)
        for index in range(num_devices)
    ]


def overlap(rows: NDArray[np.floating], others: NDArray[np.floating]) -> float:
    """Cosine of the largest angle between two subspaces: 1 where they are the same."""
    return float(np.linalg.svd(rows @ others.T, compute_uv=False)[-1])


def top_directions(inputs: NDArray[np.floating], rank: int) -> NDArray[np.float64]:
    """What the sketch comes near to: the first right singular vectors, (rank, in)."""
    return np.linalg.svd(inputs.astype(np.float64), full_matrices=False)[2][:rank]


def test_by_hand() -> None:
    """[1, 2] and [3, 0]: G = [[10, 2], [2, 4]], and with Omega = [1, -1]^T, Y = [8, -2]^T."""
    inputs = np.array([[1.0, 2.0], [3.0, 0.0]], np.float32)
    assert sketch(inputs, np.array([[1.0], [-1.0]])).tolist() == [[8.0], [-2.0]]
    # A sketch as wide as the inputs is all of G; its eigenvector of the eigenvalue 7 + 13^(1/2) is [3 + 13^(1/2), 2].
    top = np.array([3 + 13**0.5, 2]) / np.hypot(3 + 13**0.5, 2)
    assert sketch(inputs, np.eye(2)).tolist() == [[10.0, 2.0], [2.0, 4.0]]
    assert np.allclose(directions_from_sketch(sketch(inputs, np.eye(2)), np.eye(2), 1), [top], atol=1e-6)


def test_the_sum_of_full_sketches_gives_the_svd_of_all_inputs_together() -> None:
    devices = device_inputs(0)
    total = sum((sketch(inputs, np.eye(12)).astype(np.float32) for inputs in devices), np.zeros((12, 12), np.float32))
    found = directions_from_sketch(total, np.eye(12), 4)
    assert found.dtype == np.float32
    # Each direction by itself, up to its sign.
    assert np.allclose(np.abs(found @ top_directions(np.concatenate(devices), 4).T), np.eye(4), atol=2e-3)
    assert np.allclose(found @ found.T, np.eye(4), atol=1e-6)
    assert (found[np.arange(4), np.abs(found).argmax(axis=1)] > 0).all()


def test_the_sum_of_sketches_is_the_sketch_of_all_inputs_together() -> None:
    devices = device_inputs(1)
    omega = shared_omega(12, 6, seed=7)
    total = sum((sketch(inputs, omega) for inputs in devices), np.zeros((12, 6)))
    assert np.allclose(total, sketch(np.concatenate(devices), omega), rtol=1e-9, atol=1e-9)
    assert np.allclose(total, sum(inputs.T @ inputs for inputs in devices) @ omega, atol=1e-4)


@given(seed=st.integers(0, 500))
@settings(max_examples=25, deadline=None)
def test_the_sketch_finds_a_planted_subspace(seed: int) -> None:
    """Inputs of three directions, all of them on two devices: exact, in float32 on the wire, whatever the draw."""
    rng = np.random.default_rng(seed)
    planted = np.linalg.qr(rng.standard_normal((40, 3)))[0].T
    omega = shared_omega(40, 8, seed=seed)
    devices = [(rng.standard_normal((20, 3)) @ planted).astype(np.float32) for _ in range(2)]
    total = sum((sketch(inputs, omega).astype(np.float32) for inputs in devices), np.zeros((40, 8), np.float32))
    found = directions_from_sketch(total, omega, 3)
    assert overlap(found, planted) > 0.9999
    assert overlap(found, top_directions(np.concatenate(devices), 3)) > 0.9999


def test_a_second_round_comes_nearer_where_strengths_fall_slowly() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((400, 60)) * np.arange(60, 0, -1) ** -0.5
    exact = top_directions(inputs, 3)
    omega = shared_omega(60, 8, seed=0)
    first = sketch(inputs, omega)
    again = next_omega(first)
    assert np.allclose(again.T @ again, np.eye(8), atol=1e-5)
    once = directions_from_sketch(first, omega, 3)
    twice = directions_from_sketch(sketch(inputs, again), again, 3)
    energy = [float(np.square(inputs @ rows.T).sum()) for rows in (once, twice, exact)]
    assert energy[0] < energy[1] <= energy[2] * (1 + 1e-6)
    assert energy[1] > 0.9 * energy[2]


def test_fewer_tokens_than_directions() -> None:
    inputs = np.array([[0.0, 3.0, 4.0, 0.0]])
    omega = shared_omega(4, 3, seed=1)
    found = directions_from_sketch(sketch(inputs, omega), omega, 3)
    assert np.allclose(found[0], [0.0, 0.6, 0.8, 0.0], atol=1e-6)
    assert np.allclose(found @ found.T, np.eye(3), atol=1e-6)
    nothing = directions_from_sketch(np.zeros((4, 3)), omega, 2)
    assert np.allclose(nothing @ nothing.T, np.eye(2))


def test_omega_is_made_of_the_bits_of_philox() -> None:
    omega = shared_omega(50, 4, seed=3)
    words = [int(word) for word in np.random.Philox(key=3).random_raw(4)]
    for place in (0, 1, 63, 64, 199):
        bit = words[place // 64] >> (place % 64) & 1
        assert omega.reshape(-1)[place] == 1 - 2 * bit
    assert set(np.unique(omega)) == {-1.0, 1.0}
    assert not np.array_equal(omega, shared_omega(50, 4, seed=4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: sketch(x[0], x.T), r"inputs has shape \(3,\), expected a matrix"),
        (lambda x: sketch(x[:0], x.T), "at least one row"),
        (lambda x: sketch(x * np.nan, x.T), "inputs holds nan or inf"),
        (lambda x: sketch(x, np.ones((2, 1))), r"omega has shape \(2, 1\), expected \(3, width\)"),
        (lambda x: sketch(x, np.full((3, 1), np.inf)), "omega holds nan or inf"),
        (lambda x: directions_from_sketch(x.T, np.ones((3, 1)), 1), r"total_sketch has shape \(3, 2\), expected"),
        (lambda x: directions_from_sketch(x.T, np.ones((3, 2)), 3), "rank is 3, expected 1 to 2, the width"),
        (lambda x: shared_omega(3, 4, seed=0), "width is 4, expected 1 to 3"),
        (lambda x: shared_omega(3, 0, seed=0), "width is 0"),
        (lambda x: shared_omega(3, 1, seed=-1), "seed is -1"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(np.ones((2, 3)))
