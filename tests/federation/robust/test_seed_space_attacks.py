"""Liars in a federation that sends scalars, on a small regression.

Devices take zeroth-order steps along a pool of random directions and send the sum of slopes for each: one number for
each direction, most of them zero. In a shared schedule all devices take the same directions in a round; from the pool
as FedKSeed draws it, each takes its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from cotune.federation.robust.rules import rule_named

NUM_DEVICES, NUM_LIARS, DIM, NUM_DIRECTIONS, NUM_STEPS, NUM_ROUNDS = 10, 2, 32, 256, 32, 40
LEARNING_RATE = 0.02
# name in the table: rule and options. All rules are told of the liars that there are, Bulyan of the most it can bear.
RULES: dict[str, tuple[str, dict[str, object]]] = {
    "mean": ("mean", {}),
    "median": ("median", {}),
    "trimmed": ("trimmed_mean", {"share": 0.2}),
    "multi_krum": ("multi_krum", {"num_byzantine": 2, "num_selected": 6}),
    "bulyan": ("bulyan", {"num_byzantine": 1}),
    "clip, mean": ("clip_to_median_norm", {"rule": "mean"}),
    "clip, trimmed": ("clip_to_median_norm", {"rule": {"name": "trimmed_mean", "share": 0.2}}),
    "long out, trimmed": ("leave_out_long", {"rule": {"name": "trimmed_mean", "share": 0.2}}),
}
ROBUST = [name for name in RULES if name != "mean"]
ATTACKS = ["minus ten", "noise"]


@dataclass(frozen=True)
class Problem:
    """Loss of device i: (theta - centre_i)' H_i (theta - centre_i) / 2; all devices' mean is what counts."""

    curvature: np.ndarray
    centres: np.ndarray
    directions: np.ndarray

    def loss(self, theta: np.ndarray) -> float:
        away = theta - self.centres
        return float(np.einsum("ni,nij,nj->n", away, self.curvature, away).mean() / 2)


@cache
def problem() -> Problem:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((NUM_DEVICES, 100, DIM))
    # Mildly unlike: each device's best weights are near, not equal.
    centres = 2 * rng.standard_normal(DIM) + 0.02 * rng.standard_normal((NUM_DEVICES, DIM))
    return Problem(
        np.einsum("nmi,nmj->nij", inputs, inputs) / 100, centres, rng.choice([-1.0, 1.0], (NUM_DIRECTIONS, DIM))
    )


def slopes_of_a_round(theta: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Each device's sums of slopes by direction, after steps along the directions that it takes: (devices, K)."""
    given = problem()
    own = np.tile(theta, (NUM_DEVICES, 1))
    sums = np.zeros((NUM_DEVICES, NUM_DIRECTIONS))
    for step in range(NUM_STEPS):
        z = given.directions[taken[:, step]]
        gradient = np.einsum("nij,nj->ni", given.curvature, own - given.centres)
        # Two forward passes of a quadratic give exactly this slope.
        slope = (z * gradient).sum(axis=1)
        own -= LEARNING_RATE * slope[:, None] * z
        sums[np.arange(NUM_DEVICES), taken[:, step]] += slope
    return sums


@cache
def final_loss(rule_name: str, schedule: str, attack: str) -> float:
    rule = rule_named(*RULES[rule_name])
    rng = np.random.default_rng(1)
    theta = np.zeros(DIM)
    for _ in range(NUM_ROUNDS):
        each = 1 if schedule == "shared" else NUM_DEVICES
        taken = np.array([rng.choice(NUM_DIRECTIONS, NUM_STEPS, replace=False) for _ in range(each)])
        sums = slopes_of_a_round(theta, np.broadcast_to(taken, (NUM_DEVICES, NUM_STEPS)))
        if attack == "minus ten":
            sums[:NUM_LIARS] *= -10
        elif attack == "noise":
            sums[:NUM_LIARS] = 1e6 * rng.standard_normal((NUM_LIARS, NUM_DIRECTIONS))
        combined = rule(sums.astype(np.float32), np.ones(NUM_DEVICES))
        theta = theta - LEARNING_RATE * (combined.astype(np.float64) @ problem().directions)
    return problem().loss(theta)


START = 50.0
HONEST = 0.01


def test_the_honest_federation_converges() -> None:
    assert problem().loss(np.zeros(DIM)) > START
    assert final_loss("mean", "shared", "none") < HONEST
    assert final_loss("mean", "pool", "none") < HONEST


@pytest.mark.parametrize("schedule", ["shared", "pool"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_mean_diverges(schedule: str, attack: str) -> None:
    assert final_loss("mean", schedule, attack) > 1e6 * START


@pytest.mark.parametrize("name", ROBUST)
def test_with_a_shared_schedule_robust_rules_cost_little(name: str) -> None:
    assert final_loss(name, "shared", "none") < 1.15 * final_loss("mean", "shared", "none")


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("attack", ATTACKS)
def test_with_a_shared_schedule_robust_rules_stay_near_the_honest_loss(name: str, attack: str) -> None:
    # Bulyan is told of one liar where there are two: ten replies allow no more.
    assert final_loss(name, "shared", attack) < 1.25 * final_loss("mean", "shared", "none")


@pytest.mark.parametrize("name", ["median", "trimmed", "bulyan"])
def test_coordinate_rules_fail_where_devices_draw_their_own_directions(name: str) -> None:
    """Even without liars: most devices have a zero in each place, and the zeros win."""
    assert final_loss(name, "pool", "none") > 30 * final_loss("mean", "pool", "none")


@pytest.mark.parametrize("attack", ["none", *ATTACKS])
def test_krum_judges_whole_updates_and_bears_own_directions_too(attack: str) -> None:
    assert final_loss("multi_krum", "pool", attack) < 1.25 * final_loss("mean", "pool", "none")
