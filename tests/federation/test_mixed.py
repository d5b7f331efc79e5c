"""Two classes of devices: one step worked out by hand, who is what, and both learn together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from algorithm_cases import DESCENT, Watched
from federated import SECRET, ToyFederation
from toy_federation import A, B, toy_adapter

from cotune.errors import InputError
from cotune.federation.algorithm import Update
from cotune.federation.algorithms import algorithm_named
from cotune.federation.arrays import Arrays
from cotune.federation.coordinator import RoundRules
from cotune.federation.mixed import Mixed, SeedSteps
from cotune.federation.replay import moved
from cotune.federation.robust.mean import Mean
from cotune.federation.robust.median import Median
from cotune.federation.run_secret import direction_seed


def seeds(round_number: int, index: int) -> int:
    return direction_seed(SECRET, round_number, index)


def update(device: str, weight: float, **arrays: Any) -> Update:
    names = {"b": B, "slopes": "slopes"}
    return Update(device=device, weight=weight, arrays={names[n]: np.array(v, np.float32) for n, v in arrays.items()})


def step_of(state: Arrays, *updates: Update, combine: Any = None, **options: Any) -> np.ndarray:
    options = {"seed_mode": SeedSteps(num_directions=2, num_directions_per_step=2, learning_rate=0.5)} | options
    mixed = Mixed(seeds=seeds, **options)
    merged = mixed.merge(state, 3, updates, combine or Mean())
    assert np.array_equal(merged[A], state[A])
    return np.asarray(merged[B] - state[B])


def test_a_step_is_the_weighted_mean_of_both_classes() -> None:
    state = toy_adapter(3, 3, 2)
    signs = [moved({B: np.zeros((2, 3), np.float32)}, [seeds(3, k)], [1.0])[B] for k in (0, 1)]
    one, other = np.ones((2, 3)), np.full((2, 3), 3.0)
    lora = [update("a", 1, b=one), update("b", 1, b=other)]
    seed = [update("c", 2, slopes=[1, 4])]
    # (lr / P) = 1/4; S = -1/4 (1 z_0 + 4 z_1); D = 2; weights 2 and 2.
    replayed = -0.25 * (signs[0] + 4 * signs[1])
    assert np.allclose(step_of(state, *lora, *seed), (2 * 2.0 + 2 * replayed) / 4)
    assert np.allclose(step_of(state, *lora, *seed, seed_weight=0.5), (2 * 2.0 + 1 * replayed) / 3)
    assert np.allclose(step_of(state, *lora), 2.0)
    assert np.allclose(step_of(state, *seed), replayed)
    # A rule sees each class by itself: the median of three slopes, and of three changes.
    more = [update("e", 1, b=one), update("d", 1, slopes=[1, 4]), update("f", 1, slopes=[900, -900])]
    assert np.allclose(step_of(state, *lora, *seed, *more, combine=Median()), (3 * 1.0 + 4 * replayed) / 7)


def test_names_or_memory_say_who_is_what() -> None:
    sizes = {"memory_bytes": {"small-*": 50, "tiny": 5, "*": 500}, "lora_bytes": 100, "seed_bytes": 10}
    mixed = Mixed(seeds=seeds, classes={"old-*": "seed"}, **sizes)
    found = [mixed.class_of(name) for name in ("old-1", "small-1", "desk")]
    assert found == ["seed", "seed", "lora"]
    assert Mixed(seeds=seeds).class_of("any") == "lora"
    with pytest.raises(InputError, match="tiny has 5 bytes, expected at least 10 for seed"):
        mixed.class_of("tiny")
    state = mixed.start(toy_adapter(3, 3, 2))
    works = [mixed.plan(state, 1, name, None).work for name in ("old-1", "desk")]
    assert works == ["mixed_seed", "descend"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": {"d0": "sedd"}}, "classes.d0 is 'sedd', expected one of lora, seed"),
        ({"memory_bytes": {"d0": 1.5}}, "memory_bytes.d0 is 1.5"),
        ({"memory_bytes": {"d0": 15}, "lora_bytes": 3}, "lora_bytes or seed_bytes is not"),
        ({"seed_weight": 0}, "seed_weight is 0"),
        ({"seed_mode": {"num_directions": 3, "num_directions_per_step": 2}}, "expected a multiple"),
        ({"seed_mode": {"zo_eps": 0}}, "zo_eps is 0"),
        ({"seed_mode": {"num_directions": 2**25}}, "num_directions is 33554432, expected at most 16777216"),
        ({"seed_mode": {"batch_size": 0}}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        algorithm_named("mixed", options, seeds=seeds).start(toy_adapter(3, 3, 2))


class Small(Watched):
    """Has no memory for back-propagation."""

    def descend(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("a seed device was asked for back-propagation")


class Tiny(Small):
    """Has not even the memory for inference."""

    def walk(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("a device without the memory for inference was asked for slopes")


def test_both_classes_learn_together_and_each_does_its_own_work() -> None:
    options = {
        "steps": DESCENT,
        "classes": {"d2": "seed", "d3": "seed"},
        "seed_mode": {"num_directions": 24, "learning_rate": 0.05},
    }
    run = ToyFederation(
        algorithm=algorithm_named("mixed", options, seeds=seeds),
        rules=RoundRules(num_rounds=8),
        models=[Watched(0), Watched(1), Small(2), Small(3)],
    )
    end = run.run()
    assert all(record.counted == run.names for record in end.records)
    up = end.records[-1].bytes_up
    assert (up["lora_B"], up["slopes"]) == (2 * 4 * 6, 2 * 4 * 24)
    assert end.start_loss is not None and end.best_loss is not None
    assert end.best_loss < 0.2 * end.start_loss


def federation_by_memory(memory_bytes: dict[str, int], models: list[Any]) -> ToyFederation:
    options = {
        "steps": DESCENT,
        "memory_bytes": memory_bytes,
        "lora_bytes": 8_000,
        "seed_bytes": 2_000,
        "seed_mode": {"num_directions": 24, "learning_rate": 0.05},
    }
    algorithm = algorithm_named("mixed", options, seeds=seeds)
    return ToyFederation(algorithm=algorithm, rules=RoundRules(num_rounds=8), models=models)


def test_devices_of_little_memory_learn_with_one_that_has_more_and_the_smallest_is_left_out() -> None:
    run = federation_by_memory(
        {"d0": 9_000, "d4": 100, "d*": 3_000}, [Watched(0), Small(1), Small(2), Small(3), Tiny(4)]
    )
    end = run.run()
    for record in end.records:
        assert (record.verdict, record.counted) == ("accepted", ["d0", "d1", "d2", "d3"])
        assert record.refused == {
            "d4": "d4 has 100 bytes, expected at least 2,000 for seed; give it a smaller model, or leave it out"
        }
        assert (record.bytes_up["lora_B"], record.bytes_up["slopes"]) == (4 * 6, 3 * 4 * 24)
        assert record.lost == [] and record.seconds == 1.0
    assert "d4" not in end.since and end.offences == {}
    assert end.start_loss is not None and end.best_loss is not None and end.best_loss < 0.2 * end.start_loss
    # A quorum is a share of those that were given a task: here one of three.
    alone = federation_by_memory({"d0": 9_000, "*": 100}, [Watched(0), Tiny(1), Tiny(2)]).run()
    assert {record.verdict for record in alone.records} == {"accepted"}
    # Where no device has the memory there is nothing to wait for.
    with pytest.raises(InputError, match="d1 has 100 bytes"):
        federation_by_memory({"*": 100}, [Tiny(0), Tiny(1)]).run()
