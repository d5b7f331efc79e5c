"""What holds for every algorithm: pure states, planned replies, bytes as documented, devices that were away."""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np
import pytest
from algorithm_cases import OPTIONS, K, Watched, WatchedPrefix, made, start_of, updates_of
from federated import ToyFederation, same_arrays
from toy_federation import A, B, ToyModel, ToyPrefixModel, toy_adapter

from cotune.errors import InputError
from cotune.federation.algorithm import Algorithm
from cotune.federation.algorithms import ALGORITHMS, KINDS, algorithm_named
from cotune.federation.arrays import Arrays, digest, num_bytes
from cotune.federation.coordinator import Progress, RoundRules
from cotune.federation.packing import pack, unpack
from cotune.federation.robust.mean import Mean
from cotune.federation.works import WORKS

NUM_A, NUM_B = 9, 6
# Of a device that was there in the round before: bytes up, and down, as the docstrings say.
BYTES = {
    "fedit": (4 * (NUM_A + NUM_B), 4 * (NUM_A + NUM_B)),
    "ffa_lora": (4 * NUM_B, 4 * NUM_B),
    "rolora": (4 * NUM_B, 4 * NUM_A),  # odd rounds
    "seed": (4 * K, 4 * K),
    "fedkseed": (4 * K, 4 * K),
    "fedkseed_pro": (12 * K, 8 * K),
    "fwdllm": (4 * NUM_B, 8 * NUM_B),  # after a step, with candidates
    "ferret": (4 * K, 4 * (K + 2) + 4 * 2),
    "mixed": (4 * NUM_B, 4 * NUM_B),
    "flexlora": (4 * (NUM_A + NUM_B), 4 * (NUM_A + NUM_B)),
    "flora": (4 * (NUM_A + NUM_B), 4 * (NUM_A + NUM_B)),
    "fedselft": (4 * (NUM_A + NUM_B), 4 * (NUM_A + NUM_B)),
    "fedpeptao": (4 * 18, 4 * 18),  # all three layers, which the budget allows
    "coplms": (4 * (NUM_A + NUM_B), 4 * (NUM_A + NUM_B)),  # in float32
}


def after_rounds(name: str, algorithm: Algorithm, num: int) -> Arrays:
    state = algorithm.start(start_of(name))
    for number in range(1, num + 1):
        state = algorithm.merge(state, number, updates_of(algorithm.plan(state, number, "d0", None)), Mean())
    return state


def test_every_algorithm_is_tried_here() -> None:
    assert OPTIONS.keys() == BYTES.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_states_its_paper_its_bytes_and_its_memory(name: str) -> None:
    """The bytes are held to numbers by `BYTES`, below."""
    told = sys.modules[ALGORITHMS[name].__module__].__doc__ or ""
    assert re.search(r"arXiv \d{4}\.\d{5}|USENIX ATC \d{4}", told), "no paper"
    assert re.search(r"^Wire[:,]", told, re.MULTILINE), "no bytes"
    assert re.search(r"\bMemory(\s+on\s+the\s+device)?: ", told), "no memory"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_states_are_arrays_that_can_be_written_down(name: str) -> None:
    algorithm = made(name)
    state = algorithm.start(start_of(name))
    for number in range(1, 4):
        assert all(isinstance(array, np.ndarray) and array.dtype == np.float32 for array in state.values())
        read, _ = unpack(pack(state, {}, "state"), "state")
        updates = updates_of(algorithm.plan(state, number, "d0", None))
        following = algorithm.merge(state, number, updates, Mean())
        assert same_arrays(following, algorithm.merge(read, number, updates, Mean()))
        state = following
    adapter = algorithm.adapter(state)
    assert {n: a.shape for n, a in adapter.items()} == {n: a.shape for n, a in start_of(name).items()}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_merging_changes_what_comes_out_and_nothing_that_goes_in(name: str) -> None:
    algorithm = made(name)
    state = after_rounds(name, algorithm, 2)
    updates = updates_of(algorithm.plan(state, 3, "d0", None))
    before = [digest(state), *(digest(one.arrays) for one in updates)]
    merged = algorithm.merge(state, 3, updates, Mean())
    assert [digest(state), *(digest(one.arrays) for one in updates)] == before
    assert digest(merged) != before[0] and digest(algorithm.adapter(merged)) != digest(algorithm.adapter(state))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_order_of_updates_does_not_matter(name: str) -> None:
    algorithm = made(name)
    state = after_rounds(name, algorithm, 2)
    updates = updates_of(algorithm.plan(state, 3, "d0", None))
    one = algorithm.merge(state, 3, updates, Mean())
    other = algorithm.merge(state, 3, [updates[place] for place in (3, 1, 4, 0, 2)], Mean())
    assert one.keys() == other.keys()
    for array in one:
        assert np.allclose(one[array], other[array], rtol=1e-5, atol=1e-5)


def rounds(name: str, num_rounds: int, *, num_devices: int, **rules: Any) -> tuple[ToyFederation, list[Progress]]:
    """A federation of watched devices after so many rounds, and where it stood before and after each."""
    is_prefix = KINDS.get(name) == "prefix"
    models = [(WatchedPrefix if is_prefix else Watched)(seed) for seed in range(num_devices)]
    federation = ToyFederation(
        algorithm=made(name),
        rules=RoundRules(num_rounds=num_rounds, **rules),
        models=models,
        judges=False,
        judge_model=(ToyPrefixModel if is_prefix else ToyModel).draw(77),
    )
    coordinator = federation.coordinator
    start = coordinator.begin(start_of(name))
    return federation, [start, *coordinator.run(start)]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_devices_learn_together_and_send_what_was_planned_in_as_many_bytes(name: str) -> None:
    federation, history = rounds(name, 9, num_devices=3)
    # A coordinator refuses replies that are not as planned.
    assert all(record.counted == federation.names and not record.refused for record in history[-1].records)
    losses = [federation.judge(federation.algorithm.adapter(one.state)) for one in history]
    assert losses[-1] < 0.5 * losses[0]
    up, down = BYTES[name]
    plan = federation.algorithm.plan(history[-2].state, 9, "d0", 8)
    assert num_bytes(plan.arrays) == down
    record = history[-1].records[-1]
    assert sum(record.bytes_up.values()) - record.bytes_up["framing"] == 3 * up
    assert sum(record.bytes_down.values()) - record.bytes_down["framing"] == 3 * down


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_device_begins_from_the_servers_adapter_also_after_rounds_that_it_missed(name: str) -> None:
    federation, history = rounds(name, 12, num_devices=4, num_devices_per_round=1, seed=1)
    longest = 0
    for index, device in enumerate(federation.names):
        model = federation.models[index]
        assert isinstance(model, Watched)
        asked = [record.round_number for record in history[-1].records if device in record.asked]
        assert len(asked) == len(model.began)
        longest = max([longest, *np.diff(asked)])
        for number, began in zip(asked, model.began, strict=True):
            assert same_arrays(began, federation.algorithm.adapter(history[number - 1].state)), (device, number)
    assert longest >= 4, "somebody was away for several rounds"
    assert not same_arrays(*(federation.algorithm.adapter(history[number].state) for number in (2, 8)))


def test_works_of_all_plans_are_known() -> None:
    for name in ALGORITHMS:
        algorithm = made(name)
        assert algorithm.plan(algorithm.start(start_of(name)), 1, "d0", None).work in {
            *WORKS,
            # Of devices with a model of their own, see `cotune.federation.co_tuning_device`.
            "co_tune",
        }


def test_options_come_from_a_configuration() -> None:
    made_seed = algorithm_named("seed", {"learning_rate": 1, "gate": 2}, seeds=lambda r, k: 10 * r + k)
    assert (made_seed.learning_rate, made_seed.gate, made_seed.seeds(3, 4)) == (1.0, 2.0, 34)  # type: ignore[attr-defined]
    for name, options, words in [
        ("fedavg", {}, "algorithm is 'fedavg', expected one of fedit,"),
        ("seed", {"seeds": 1}, "options.seed.seeds is not known, expected one of num_directions,"),
        ("seed", {"num_directions": "many"}, "seed.num_directions is 'many', expected a whole number"),
        ("seed", {"num_directions": True}, "seed.num_directions is True, expected a whole number"),
        ("fedit", {"steps": {"momentum": 0.9}}, "fedit.steps.momentum is not known"),
        ("fedit", {"steps": 4}, "fedit.steps is 4, expected a table"),
        ("fedkseed_pro", {"pool": {"num_steps": 0}}, "num_steps is 0"),
    ]:
        with pytest.raises(InputError, match=words):
            algorithm_named(name, options, seeds=lambda r, k: 0)  # type: ignore[arg-type]


def test_the_toy_has_the_sizes_that_bytes_are_counted_with() -> None:
    adapter = toy_adapter(3, 3, 2)
    assert (adapter[A].size, adapter[B].size) == (NUM_A, NUM_B)
