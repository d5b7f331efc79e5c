"""A round of seed mode costs its numbers and little more: under 5 kB with 512 directions, at any model size."""

from __future__ import annotations

import numpy as np
import pytest
from federated import SECRET, ToyFederation
from toy_federation import A, B, ToyModel

from cotune.federation.algorithm import Done, Job
from cotune.federation.coordinator import RoundRules
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.run_secret import direction_seed
from cotune.federation.seed import SLOPES, SeedMode


def one_slope_each(job: Job) -> Done:
    """Slopes without a model: bytes do not depend on what they are."""
    rng = np.random.default_rng(job.batch_seed)
    return Done(
        arrays={SLOPES: rng.standard_normal(int(job.settings["num_directions"])).astype(np.float32)}, loss=1 / 3
    )


@pytest.mark.parametrize(
    ("num_directions", "width", "most"), [(512, 4, 5_000), (512, 400, 5_000), (1024, 4, 9_100), (2048, 4, 18_000)]
)
def test_all_bytes_of_a_device_in_a_round(num_directions: int, width: int, most: int) -> None:
    algorithm = SeedMode(
        seeds=lambda r, k: direction_seed(SECRET, r, k), num_directions=num_directions, learning_rate=3e-7
    )
    federation = ToyFederation(
        num_devices=3, algorithm=algorithm, rules=RoundRules(num_rounds=2, deadline_s=7), judges=False
    )
    for name in federation.names:
        model = ToyModel.draw(0)
        agent = DeviceAgent(
            name,
            model,
            base_digest="b" * 64,
            secret=SECRET,
            key=federation.keys[name],
            works={"seed": one_slope_each},
        )
        federation.replace_agent(agent)
    coordinator = federation.coordinator
    adapter = {A: np.zeros((2, width), np.float32), B: np.zeros((width, 2), np.float32)}
    *_, last = coordinator.run(coordinator.begin(adapter))
    record = last.records[-1]
    assert record.counted == federation.names
    each = (sum(record.bytes_up.values()) + sum(record.bytes_down.values())) / 3
    assert 8 * num_directions < each < most
