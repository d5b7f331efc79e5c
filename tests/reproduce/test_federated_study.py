"""What studies of federations share: learning rates and amounts of work, counted passes, faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from federated_study import Lossy, Watched, options_at, secret_of, stragglers
from toy_federation import ToyModel, toy_adapter

from cotune.federation.algorithms import ALGORITHMS, algorithm_named
from cotune.federation.fedkseed_pro import FedKSeedPro
from cotune.federation.ferret import Ferret
from cotune.federation.local_model import LocalSteps
from cotune.federation.seed import SeedMode
from cotune.federation.transport import Arrival

SIZES = {"local_steps": 4, "directions": 6, "pool": 32, "batch_size": 2}


def test_options_multiply_every_learning_rate_and_set_the_work() -> None:
    assert options_at(SeedMode, 10.0, SIZES) == {"num_directions": 6, "learning_rate": 1e-2, "batch_size": 2}
    pool = {"num_seeds": 32, "num_steps": 6, "learning_rate": 3e-3, "batch_size": 2}
    assert options_at(FedKSeedPro, 3.0, SIZES) == {"pool": pool}
    assert options_at(Ferret, 1.0, SIZES).keys() == {"steps"}


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_algorithm_of_the_product_takes_them(name: str) -> None:
    kind: Any = ALGORITHMS[name]
    algorithm_named(name, options_at(kind, 1.0, SIZES), seeds=lambda number, index: 0)


def test_passes_are_counted() -> None:
    passes: Counter[str] = Counter()
    model, start = Watched(ToyModel.draw(0), passes), toy_adapter(3, 3, 2)
    model.descend(start, sorted(start), LocalSteps(num_steps=3, batch_size=1), seed=0)
    assert passes == {"forward": 3, "backward": 3}
    with model.walk(start, sorted(start), batch_size=1, seed=0) as walk:
        walk.slope(1, 1e-3)
        walk.next_batch()
    assert passes == {"forward": 5, "backward": 3}
    model.gradient(start, sorted(start), num_batches=2, batch_size=1, seed=0)
    assert passes == {"forward": 7, "backward": 5} and model.num_examples > 0


class Full:
    """Ten replies each time."""

    def devices(self) -> Sequence[str]:
        return ["a"]

    def send(self, tasks: Mapping[str, bytes]) -> None:
        pass

    def receive(self, timeout_s: float) -> list[Arrival]:
        return [Arrival(device="a", data=bytes([k])) for k in range(10)]

    def now_s(self) -> float:
        return 3.0


def test_a_fifth_of_replies_is_lost_the_same_ones_each_time() -> None:
    one, same = (Lossy(Full(), 0.2, 7) for _ in range(2))
    kept = [one.receive(1.0) for _ in range(100)]
    assert kept == [same.receive(1.0) for _ in range(100)]
    assert one.num_lost + sum(map(len, kept)) == 1000 and 150 < one.num_lost < 250
    assert (one.devices(), one.now_s()) == (["a"], 3.0)


def test_draws_and_choices() -> None:
    devices = [f"d{k}" for k in range(10)]
    assert len(stragglers(devices, 0)) == 2 and stragglers(devices, 0) == stragglers(devices, 0)
    assert secret_of(0).value == secret_of(0).value != secret_of(1).value
