"""Every algorithm with settings that learn on the toy, and devices that remember where they began."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from federated import SECRET
from numpy.typing import NDArray
from toy_federation import B, ToyModel, ToyPrefixModel, ToyWalk, toy_adapter, toy_prefix

from cotune.federation.algorithm import Algorithm, Plan, Update
from cotune.federation.algorithms import KINDS, algorithm_named
from cotune.federation.arrays import Arrays
from cotune.federation.local_model import LocalSteps, Trained
from cotune.federation.run_secret import direction_seed

DESCENT = {"num_steps": 4, "batch_size": 4, "learning_rate": 0.1, "optimizer": "sgd"}
K = 24
# Settings with which each algorithm learns on the toy: rank 3, so that B alone reaches every map.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "fedit": {"steps": DESCENT},
    "ffa_lora": {"steps": DESCENT},
    "rolora": {"steps": DESCENT},
    "seed": {"num_directions": K, "num_directions_per_step": 2, "learning_rate": 0.05, "gate": 0.5},
    "fedkseed": {"num_seeds": K, "num_steps": 12, "learning_rate": 0.03},
    "fedkseed_pro": {"pool": {"num_seeds": K, "num_steps": 12, "learning_rate": 0.03}},
    "fwdllm": {"num_candidates": 4, "learning_rate": 0.2, "max_variance": 20.0},
    "ferret": {"steps": DESCENT, "num_directions": K, "server_learning_rate": 0.5},
    "flexlora": {"steps": DESCENT},
    "flora": {"steps": DESCENT},
    "fedselft": {"steps": DESCENT},
    "fedpeptao": {"steps": DESCENT, "num_layers": 3, "budget_bytes": 4 * 18, "beta": 0.5},
    "coplms": {"steps": DESCENT, "bits": 32, "fold_above": 1.0},
    # Six slopes are as many numbers as B has, so that all devices send as many bytes.
    "mixed": {
        "steps": DESCENT,
        "classes": {"d0": "lora", "*": "seed"},
        "seed_mode": {"num_directions": 6, "learning_rate": 0.05},
    },
}


def made(name: str) -> Algorithm:
    return algorithm_named(name, OPTIONS[name], seeds=lambda r, k: direction_seed(SECRET, r, k))


def start_of(name: str) -> Arrays:
    """An adapter of the kind that the algorithm needs."""
    return toy_prefix() if KINDS.get(name) == "prefix" else toy_adapter(3, 3, 2)


class Watched(ToyModel):
    """Remembers the adapter that each work began from."""

    def __init__(self, seed: int) -> None:
        drawn = ToyModel.draw(seed)
        super().__init__(drawn.x, drawn.y)
        self.began: list[dict[str, np.ndarray]] = []
        self.is_folded = False

    def began_from(self, params: Arrays) -> None:
        # With an adapter in the weights, that one is the server's, and the other begins at zero.
        if self.is_folded:
            assert not params[B].any()
        else:
            self.began.append({name: array.copy() for name, array in params.items()})

    @contextmanager
    def folded(self, params: Arrays) -> Iterator[None]:
        self.began_from(params)
        self.is_folded = True
        with super().folded(params):
            yield
        self.is_folded = False

    def gradient(
        self, params: Arrays, names: Sequence[str], *, num_batches: int, batch_size: int, seed: int
    ) -> dict[str, NDArray[np.float32]]:
        self.began_from(params)
        return super().gradient(params, names, num_batches=num_batches, batch_size=batch_size, seed=seed)

    def descend(self, params: Arrays, trained: Sequence[str], steps: LocalSteps, *, seed: int) -> Trained:
        self.began_from(params)
        return super().descend(params, trained, steps, seed=seed)

    @contextmanager
    def walk(self, params: Arrays, tuned: Sequence[str], *, batch_size: int, seed: int) -> Iterator[ToyWalk]:
        self.began_from(params)
        with super().walk(params, tuned, batch_size=batch_size, seed=seed) as walk:
            yield walk


class WatchedPrefix(Watched, ToyPrefixModel):
    """The same with a prefix."""

    def hidden_states(self, params: Arrays, *, batch_size: int, seed: int) -> list[NDArray[np.float32]]:
        self.began_from(params)
        return super().hidden_states(params, batch_size=batch_size, seed=seed)


def updates_of(plan: Plan, num: int = 5) -> list[Update]:
    rng = np.random.default_rng(1)
    return [
        Update(
            device=f"d{index}",
            arrays={n: rng.standard_normal(shape).astype(np.float32) for n, shape in plan.reply.items()},
            weight=1.0 + index,
        )
        for index in range(num)
    ]
