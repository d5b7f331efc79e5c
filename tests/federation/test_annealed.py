"""Learning rates that fall along half a cosine."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from toy_federation import B, ToyModel, toy_adapter

from cotune.errors import InputError
from cotune.federation.algorithm import Job, Update
from cotune.federation.algorithms import ALGORITHMS, REPLAYED, algorithm_named
from cotune.federation.annealed import Annealed, CosineRates, at_rate
from cotune.federation.coordinator import RoundRules
from cotune.federation.coplms import CoPlms
from cotune.federation.descend import descend
from cotune.federation.fedit import FedIT
from cotune.federation.fwdllm import FwdLLM
from cotune.federation.local_model import LocalSteps
from cotune.federation.mixed import Mixed
from cotune.federation.run_parts import algorithm_of
from cotune.federation.run_secret import RunSecret
from cotune.federation.settings import AdapterSettings, FederationSettings, ScheduleSettings
from cotune.federation.start_first import StartFirst

SGD = LocalSteps(num_steps=1, batch_size=12, learning_rate=0.5, optimizer="sgd")


def mean(updates: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.average(updates, axis=0, weights=weights).astype(np.float32)


def test_shares_by_hand() -> None:
    four = Annealed(inner=FedIT(), num_rounds=4, least=0.2)
    # Cosines of 0, 45, 90, 135 and 180 degrees.
    root = math.sqrt(0.5)
    expected = [1.0, 0.2 + 0.4 * (1 + root), 0.6, 0.2 + 0.4 * (1 - root), 0.2, 0.2]
    assert [four.share(number) for number in range(1, 7)] == pytest.approx(expected)
    assert {Annealed(inner=FedIT(), num_rounds=3, least=1.0).share(number) for number in range(1, 6)} == {1.0}


def test_steps_are_those_of_the_rate_of_the_round() -> None:
    algorithm = Annealed(inner=FedIT(steps=SGD), num_rounds=4, least=0.2)
    model, state = ToyModel.draw(1), algorithm.start(toy_adapter())
    moves = {}
    for number in (1, 3):
        plan = algorithm.plan(state, number, "a", None)
        job = Job(
            round_number=number,
            arrays=plan.arrays,
            settings=plan.settings,
            model=model,
            seeds=lambda *_: 0,
            batch_seed=7,
        )
        done = descend(job)
        after = algorithm.merge(state, number, [Update(device="a", arrays=done.arrays)], mean)
        moves[number] = {name: after[name] - state[name] for name in state}
    assert np.any(moves[1][B])
    for name in state:
        assert np.allclose(moves[3][name], 0.6 * moves[1][name], atol=1e-6)


def test_what_the_server_does_with_a_learning_rate_falls_too() -> None:
    mixed = Mixed(seeds=lambda *_: 0)
    slow = at_rate(mixed, 0.25)
    assert slow.steps.learning_rate == 0.25 * mixed.steps.learning_rate
    assert slow.seed_mode.learning_rate == 0.25 * mixed.seed_mode.learning_rate
    assert replace(slow, steps=mixed.steps, seed_mode=mixed.seed_mode) == mixed
    assert at_rate(FwdLLM(), 0.5).learning_rate == 0.005


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_is_annealed_or_refused(name: str) -> None:
    adapter = AdapterSettings(kind="prefix" if name == "fedpeptao" else "lora")
    settings = FederationSettings(
        algorithm=name,
        adapter=adapter,
        rounds=RoundRules(num_rounds=6),
        schedule=ScheduleSettings(kind="cosine", least=0.3),
    )
    secret = RunSecret(bytes(32))
    if name in REPLAYED:
        with pytest.raises(InputError, match=rf"schedule\.kind is 'cosine', expected 'constant' for {name}"):
            algorithm_of(settings, secret)
        return
    made = algorithm_of(settings, secret)
    if isinstance(made, CoPlms):
        assert made.rates == CosineRates(num_rounds=6, least=0.3)
        return
    assert isinstance(made, Annealed) and (made.num_rounds, made.least) == (6, 0.3)
    # Something does fall.
    assert at_rate(made.inner, 0.5) != made.inner


def test_the_rounds_of_a_start_are_not_counted() -> None:
    settings = FederationSettings(
        adapter=AdapterSettings(start="eva"), schedule=ScheduleSettings(kind="cosine"), rounds=RoundRules(num_rounds=5)
    )
    made = algorithm_of(settings, RunSecret(bytes(32)))
    assert isinstance(made, StartFirst) and isinstance(made.inner, Annealed)


def test_constant_is_the_algorithm_itself() -> None:
    made = algorithm_of(FederationSettings(), RunSecret(bytes(32)))
    assert type(made) is type(algorithm_named("rolora", seeds=lambda *_: 0))


@pytest.mark.parametrize(
    ("bad", "told"),
    [({"kind": "linear"}, "kind is 'linear', expected one of constant, cosine"), ({"least": 0.0}, "least is 0.0")],
)
def test_a_bad_schedule_is_refused(bad: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        ScheduleSettings(**bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="num_rounds is 0"):
        Annealed(inner=FedIT(), num_rounds=0)
    with pytest.raises(InputError, match=r"least is 1\.5"):
        Annealed(inner=FedIT(), num_rounds=1, least=1.5)
