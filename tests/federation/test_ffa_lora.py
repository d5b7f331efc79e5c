"""FFA-LoRA: B averaged by hand, A as it was, and half of FedIT's bytes."""

from __future__ import annotations

import numpy as np
import pytest
from toy_federation import A, B, toy_adapter

from cotune.errors import InputError
from cotune.federation.algorithm import Update
from cotune.federation.arrays import num_bytes
from cotune.federation.ffa_lora import FfaLora
from cotune.federation.robust.mean import Mean


def test_a_weighted_mean_of_b_by_hand() -> None:
    state = FfaLora().start({A: np.array([[1.0, 2.0]], np.float32), B: np.array([[1.0], [0.0]], np.float32)})
    changes = {"a": ([[4.0], [8.0]], 1.0), "b": ([[0.0], [-4.0]], 3.0)}
    updates = [
        Update(device=device, arrays={B: np.array(change, np.float32)}, weight=weight)
        for device, (change, weight) in changes.items()
    ]
    merged = FfaLora().merge(state, 7, updates, Mean())
    # B: [1, 0] + [4, 8] / 4 + 3 [0, -4] / 4.
    assert merged[B].tolist() == [[2.0], [-1.0]] and merged[A].tolist() == [[1.0, 2.0]]
    assert state[B].tolist() == [[1.0], [0.0]]
    # Exact: the products of the devices, [5, 8] [1, 2] and [1, -4] [1, 2], have the mean of a quarter and three.
    assert (merged[B] @ merged[A]).tolist() == [[2.0, 4.0], [-1.0, -2.0]]


def test_b_travels_and_a_once() -> None:
    algorithm, state = FfaLora(), toy_adapter(2, 5, 3)
    first, later = (algorithm.plan(state, number, "a", since) for number, since in ((1, None), (9, 2)))
    assert first.arrays.keys() == {A, B} and later.arrays.keys() == {B} == later.reply.keys() == first.reply.keys()
    assert num_bytes(later.arrays) == 4 * 2 * 3 and num_bytes(first.arrays) == 4 * 2 * (3 + 5)
    assert later.settings["trained"] == "*lora_B*"


def test_an_adapter_without_b_is_refused() -> None:
    with pytest.raises(InputError, match="no array is like"):
        FfaLora().start({A: np.ones((1, 2), np.float32)})
