"""Factors in 8 bits: by hand, bounded, without bias, and every direction for itself."""

from __future__ import annotations

import numpy as np

from cotune.federation.arrays import shapes_of
from cotune.federation.row_codes import CODES, SCALE, coded_shapes, from_codes, to_codes


def factors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    strength = np.array([10.0, 1.0, 1e-4])
    a = rng.standard_normal((3, 40)) * strength[:, None]
    b = rng.standard_normal((50, 3)) * strength
    return {"q.lora_A.weight": a.astype(np.float32), "q.lora_B.weight": b.astype(np.float32)}


def test_each_direction_keeps_its_digits_whatever_the_others_are() -> None:
    own = factors()
    coded = to_codes(own)
    assert {name: array.shape for name, array in coded.items()} == coded_shapes(shapes_of(own))
    assert all(coded[SCALE + name].shape == (3,) and coded[CODES + name].dtype == np.uint8 for name in own)
    found = from_codes(coded)
    for name, axis in (("q.lora_A.weight", 1), ("q.lora_B.weight", 0)):
        error = np.abs(found[name] - own[name]).max(axis=axis)
        assert (error <= 0.5001 * np.abs(own[name]).max(axis=axis) / 127).all() and found[name].dtype == np.float32
    assert from_codes({**coded, "fold/x": np.ones(2, np.float32)}).keys() == own.keys()


def test_rounding_at_random_is_right_on_average_and_the_same_for_a_seed() -> None:
    own = {"b": np.array([[127.0], [0.3], [-2.75], [0.0]], np.float32)}
    draws = np.stack([from_codes(to_codes(own, seed=seed))["b"][:, 0] for seed in range(4000)])
    assert np.allclose(draws.mean(0), [127.0, 0.3, -2.75, 0.0], atol=0.03)
    assert set(draws[:, 2]) == {-2.0, -3.0} and (draws[:, 3] == 0).all()
    assert (to_codes(own, seed=5)["codes/b"] == to_codes(own, seed=5)["codes/b"]).all()


def test_nothing_stays_nothing() -> None:
    assert not from_codes(to_codes({"b": np.zeros((2, 3), np.float32)}, seed=1))["b"].any()
