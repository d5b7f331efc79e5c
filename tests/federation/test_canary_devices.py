"""Canaries in a run: they are found without noise, hardly with it, and what cannot be audited is refused."""

from __future__ import annotations

import numpy as np
import pytest
from algorithm_cases import made
from federated import BASE, SECRET, ToyFederation
from toy_federation import ToyModel, toy_adapter

from cotune.errors import InputError
from cotune.federation.algorithm import Combine
from cotune.federation.algorithms import algorithm_named
from cotune.federation.canary_clients import CanaryAudit
from cotune.federation.canary_devices import CanaryDevices, audited_shapes
from cotune.federation.coordinator import RoundRules
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.robust.mean import Mean
from cotune.federation.run_secret import direction_seed
from cotune.federation.user_privacy import PrivateMean

NUM, K = 40, 400
NORM = 20.0  # longer than what real devices send here


def audited(combine: Combine) -> CanaryAudit:
    """Forty canaries beside two devices of seed mode, for two rounds."""
    options = {"num_directions": K, "num_directions_per_step": K, "learning_rate": 1e-3}
    algorithm = algorithm_named("seed", options, seeds=lambda r, k: direction_seed(SECRET, r, k))
    shapes = audited_shapes(algorithm, toy_adapter(3, 3, 2))
    assert shapes == {"slopes": (K,)}
    canaries = CanaryDevices(NUM, shapes, norm=NORM, seeds=(1, 2), num_rounds=2)
    federation = ToyFederation(
        algorithm=algorithm,
        models=[ToyModel.draw(seed) for seed in range(2 + NUM)],
        rules=RoundRules(num_rounds=2),
        combine=canaries.watched(combine),
        judges=False,
    )
    for index, name in enumerate(canaries.names):
        device = f"d{index + 2}"
        federation.replace_agent(
            DeviceAgent(
                device,
                federation.models[0],
                base_digest=BASE,
                secret=SECRET,
                key=federation.keys[device],
                works=canaries.works(name),
            )
        )
    end = federation.run()
    assert all(len(one.counted) == 2 + NUM for one in end.records)
    assert end.records[0].loss is not None and np.isfinite(end.records[0].loss)
    return canaries.audit(1e-5)


def test_canaries_are_seen_without_noise_and_hidden_by_it() -> None:
    bare = audited(Mean())
    assert (bare.num_canaries, bare.num_rounds) == (NUM, 2)
    hidden = audited(PrivateMean(clip_norm=NORM, noise_multiplier=8.0, num_expected=2.0 + NUM))
    assert bare.epsilon_by_mean > 10 > 4 > hidden.epsilon_by_mean


def test_all_of_a_canary_arrives() -> None:
    canaries = CanaryDevices(3, {"x": (2, 5), "y": (4,)}, norm=3.0, seeds=(1, 2), num_rounds=1)
    assert canaries.names == ["canary-0", "canary-1", "canary-2"]
    works = canaries.works("canary-1")
    done = works["descend"](None)  # type: ignore[arg-type]
    assert {name: array.shape for name, array in done.arrays.items()} == {"x": (2, 5), "y": (4,)}
    assert np.sqrt(sum(np.square(array).sum() for array in done.arrays.values())) == pytest.approx(3, rel=1e-5)
    assert done.arrays["x"].tolist() != canaries.works("canary-2")["seed"](None).arrays["x"].tolist()  # type: ignore[arg-type]


def test_what_cannot_be_audited_is_refused() -> None:
    with pytest.raises(InputError, match="expected an algorithm whose replies are alike"):
        audited_shapes(made("rolora"), toy_adapter(3, 3, 2))
    with pytest.raises(InputError, match="expected at most"):
        CanaryDevices(3, {"x": (10**9,)}, norm=1.0, seeds=(1, 2), num_rounds=1)
    with pytest.raises(InputError, match="nothing to audit"):
        CanaryDevices(3, {"x": (9,)}, norm=1.0, seeds=(1, 2), num_rounds=1).audit(1e-5)
