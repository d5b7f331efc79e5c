"""EVA as the first round: A by the formula, no logit changes, sums only, and every algorithm goes on from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from algorithm_cases import OPTIONS, Watched, made
from federated import ToyFederation, same_arrays
from numpy.typing import NDArray
from toy_federation import A, B, ToyModel, toy_adapter

from cotune.errors import InputError
from cotune.federation.algorithms import algorithm_named
from cotune.federation.coordinator import RoundRules
from cotune.federation.eva_start import EvaStart, random_omegas
from cotune.federation.ffa_lora import FfaLora
from cotune.federation.robust.median import Median
from cotune.federation.start_first import StartFirst

EVA = EvaStart(num_batches=1, batch_size=100, oversampling=0)


def federation(inner: Any, method: EvaStart = EVA, *, num_rounds: int = 1, **options: Any) -> ToyFederation:
    return ToyFederation(
        algorithm=StartFirst(inner=inner, method=method), rules=RoundRules(num_rounds=num_rounds), **options
    )


def top_directions(inputs: Sequence[NDArray[np.floating]], rank: int) -> NDArray[np.float64]:
    """The first right singular vectors of all inputs together."""
    return np.linalg.svd(np.concatenate(inputs).astype(np.float64), full_matrices=False)[2][:rank]


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_a_is_of_all_devices_inputs_and_no_logit_changes(num_rounds: int) -> None:
    models = [ToyModel.draw(seed, num=4 + seed) for seed in range(3)]
    # Different directions matter on different devices.
    for index, model in enumerate(models):
        model.x[:, index] *= 5
    method = EvaStart(num_batches=1, batch_size=100, oversampling=3, num_rounds=num_rounds)
    run = federation(FfaLora(), method, models=models, num_rounds=num_rounds)
    end = run.run()
    assert [record.verdict for record in end.records] == ["accepted"] * num_rounds
    adapter = run.algorithm.adapter(end.state)
    exact = top_directions([model.x / len(model.x) ** 0.5 for model in models], 3)
    assert np.allclose(np.abs(adapter[A]), np.abs(exact), atol=1e-4)
    assert not adapter[B].any() and end.records[-1].heldout_loss == end.start_loss
    assert end.records[0].bytes_up["sketch"] == 3 * 4 * 3 * 3
    assert end.records[0].bytes_down.keys() == {"framing"}


def test_the_second_sketch_is_along_the_first_and_sharper() -> None:
    rng = np.random.default_rng(0)
    models = [ToyModel(rng.standard_normal((60, 12)) * np.linspace(1.4, 1, 12), np.zeros((60, 2))) for _ in range(2)]
    exact = top_directions([model.x for model in models], 3)
    found = []
    for num_rounds in (1, 2):
        run = federation(
            FfaLora(),
            EvaStart(num_batches=1, batch_size=100, oversampling=1, num_rounds=num_rounds),
            models=models,
            num_rounds=num_rounds,
            judges=False,
        )
        coordinator = run.coordinator
        *_, end = coordinator.run(coordinator.begin(toy_adapter(3, 12, 2)))
        a = run.algorithm.adapter(end.state)[A]
        found.append(np.linalg.norm(exact @ a.T))  # sqrt(3) where both span the same
        assert ("omega" in end.records[-1].bytes_down) is (num_rounds == 2)
    assert found[0] < found[1] <= 3**0.5 + 1e-4


def test_the_rule_is_not_used_on_sums_and_is_used_afterwards() -> None:
    ends = [federation(FfaLora(), num_rounds=2, combine=rule).run() for rule in (Median(), lambda u, w: u[0])]
    one, other = (end.state for end in ends)
    assert np.array_equal(one["inner/" + A], other["inner/" + A])
    assert not np.array_equal(one["inner/" + B], other["inner/" + B])


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "rolora", "seed", "fedkseed", "ferret"])
def test_every_algorithm_goes_on_from_there_in_its_own_round_1(name: str) -> None:
    models = [Watched(seed) for seed in range(4)]
    # The second round leaves arrays on the devices, which must not stay there.
    twice = EvaStart(num_batches=1, batch_size=100, num_rounds=2)
    run = federation(
        made(name), twice, models=models, judges=False, num_rounds=11, devices={"d3": {"is_up": lambda now: now != 0}}
    )
    coordinator = run.coordinator
    history = [coordinator.begin(toy_adapter(3, 3, 2))]
    history += coordinator.run(history[0])
    assert history[-1].records[0].asked == ["d0", "d1", "d2"] and history[-1].records[1].asked == run.names
    # Every device, new or not, begins each round from the server's adapter.
    for model in models:
        assert isinstance(model, Watched) and len(model.began) == 9
        for number, began in enumerate(model.began, start=2):
            assert same_arrays(began, run.algorithm.adapter(history[number].state)), (name, number)
    losses = [run.judge(run.algorithm.adapter(one.state)) for one in history]
    assert losses[-1] < 0.6 * losses[2]
    if name == "rolora":  # B moves first
        assert not np.array_equal(*(run.algorithm.adapter(history[n].state)[B] for n in (2, 3)))


def test_directions_are_those_of_the_algorithms_own_rounds() -> None:
    """Server and devices count alike, or the adapters above would differ; here, which count it is."""
    told: list[tuple[int, int]] = []

    def seeds(round_number: int, index: int) -> int:
        told.append((round_number, index))
        return index

    federation(algorithm_named("seed", OPTIONS["seed"], seeds=seeds), num_rounds=2).run()
    assert {number for number, _ in told} == {1}


def test_a_void_round_is_asked_again() -> None:
    run = federation(FfaLora(), num_rounds=3, devices={f"d{i}": {"is_up": lambda now: now > 2} for i in range(4)})
    run.rules = RoundRules(num_rounds=3, gather_s=2)
    end = run.run()
    assert [one.verdict for one in end.records] == ["void", "accepted", "accepted"]
    assert "sketch" in end.records[1].bytes_up and "lora_B" in end.records[2].bytes_up


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="is not zero, expected an untrained adapter"):
        StartFirst(inner=FfaLora(), method=EVA).start({**toy_adapter(3), B: np.ones((2, 3), np.float32)})
    for options, words in [
        ({"num_rounds": 3}, "num_rounds is 3"),
        ({"oversampling": -1}, "oversampling is -1"),
        ({"num_batches": 0}, "num_batches is 0"),
    ]:
        with pytest.raises(InputError, match=words):
            EvaStart(**options)


def test_layers_with_few_inputs_get_a_narrower_sketch() -> None:
    assert random_omegas({A: (2, 3), B: (4, 2)}, 8, 0)[A].shape == (3, 3)
