"""FwdLLM: forward gradients by hand, the gate, and the choice of directions."""

from __future__ import annotations

import numpy as np
import pytest
from toy_federation import A, B, ToyModel, toy_adapter

from cotune.errors import InputError
from cotune.federation.algorithm import Job, Update
from cotune.federation.arrays import Arrays
from cotune.federation.catch_up import NOW
from cotune.federation.fwdllm import COUNTS, GRADIENT, FwdLLM, best_by_cosine, send_forward_gradient
from cotune.federation.replay import coordinates, summed
from cotune.federation.robust.mean import Mean

NUMBER = {A: np.ones((1, 1), np.float32), B: np.zeros((1, 1), np.float32)}


def job(algorithm: FwdLLM, state: Arrays, model: ToyModel, *, batch_seed: int = 1) -> Job:
    plan = algorithm.plan(state, 1, "a", None)
    return Job(
        round_number=1,
        arrays=plan.arrays,
        settings=plan.settings,
        model=model,
        seeds=lambda *_: pytest.fail("each device draws its own directions"),
        batch_seed=batch_seed,
    )


def sent(device: str, value: float) -> Update:
    return Update(device=device, arrays={B: np.full((1, 1), value, np.float32)})


def test_a_forward_gradient_by_hand() -> None:
    # L = (b - 3)^2 / 2 with one number b: slope times z is b - 3 whatever the sign, so two directions give -6.
    algorithm = FwdLLM(num_perturbations=2, learning_rate=0.5, zo_eps=0.25, batch_size=1)
    state = algorithm.start(NUMBER)
    done = send_forward_gradient(job(algorithm, state, ToyModel(np.ones((1, 1)), np.full((1, 1), 3.0))))
    assert done.arrays[B].tolist() == [[-6.0]] and done.loss == pytest.approx(4.5 + 0.25**2 / 2)
    updates = [Update(device=name, arrays=done.arrays) for name in "ab"]
    merged = algorithm.merge(state, 1, updates, Mean())
    assert algorithm.adapter(merged)[B].item() == 1.5 and algorithm.adapter(state)[B].item() == 0.0


def test_no_step_is_taken_before_the_halves_agree() -> None:
    algorithm = FwdLLM(num_perturbations=1, learning_rate=1.0, max_variance=2.0)
    state = algorithm.start(NUMBER)
    # Halves 1 and 5: variance 16 / 2. Then means 2 and 4: variance 4 / 2, and the step is the mean of all four.
    first = algorithm.merge(state, 1, [sent("b", 5.0), sent("a", 1.0)], Mean())
    assert algorithm.adapter(first)[B].item() == 0.0 and first[COUNTS].tolist() == [1.0, 1.0]
    second = algorithm.merge(first, 2, [sent("a", 3.0), sent("b", 3.0)], Mean())
    assert algorithm.adapter(second)[B].item() == -3.0 and second[COUNTS].tolist() == [0.0, 0.0]
    stricter = FwdLLM(num_perturbations=1, learning_rate=1.0, max_variance=1.99)
    assert stricter.adapter(stricter.merge(first, 2, [sent("a", 3.0), sent("b", 3.0)], Mean()))[B].item() == 0.0
    # One reply fills the emptier half, and one half alone never passes.
    alone = algorithm.merge(state, 1, [sent("a", 1.0)], Mean())
    assert alone[COUNTS].tolist() == [1.0, 0.0] and algorithm.adapter(alone)[B].item() == 0.0
    assert algorithm.adapter(algorithm.merge(alone, 2, [sent("a", 3.0)], Mean()))[B].item() == -2.0


def test_a_step_comes_at_the_latest_after_some_rounds() -> None:
    algorithm = FwdLLM(num_perturbations=1, learning_rate=1.0, max_variance=1e-9, max_rounds_waiting=2)
    state = algorithm.merge(algorithm.start(NUMBER), 1, [sent("a", 1.0), sent("b", 5.0)], Mean())
    assert algorithm.adapter(state)[B].item() == 0.0
    assert algorithm.adapter(algorithm.merge(state, 2, [sent("a", 1.0), sent("b", 5.0)], Mean()))[B].item() == -3.0


def test_nothing_goes_down_while_replies_wait() -> None:
    algorithm = FwdLLM(num_perturbations=1, max_variance=2.0)
    start = algorithm.start(NUMBER)
    waiting = algorithm.merge(start, 1, [sent("a", 1.0), sent("b", 5.0)], Mean())
    stepped = algorithm.merge(waiting, 2, [sent("a", 3.0), sent("b", 3.0)], Mean())
    assert algorithm.plan(start, 1, "a", None).arrays.keys() == {NOW + A, NOW + B}
    assert not algorithm.plan(waiting, 2, "a", 1).arrays
    assert algorithm.plan(stepped, 3, "a", 2).arrays.keys() == {NOW + B}
    # Round 1 had the arrays from before the step, round 3 those after it.
    assert algorithm.plan(stepped, 4, "a", 1).arrays.keys() == {NOW + B}
    assert not algorithm.plan(stepped, 4, "a", 3).arrays


def test_the_best_of_the_candidates_are_those_closest_to_the_last_gradient() -> None:
    rng = np.random.default_rng(0)
    gradient = {B: rng.standard_normal((4, 5)).astype(np.float32), A: rng.standard_normal((2, 2)).astype(np.float32)}
    seeds = list(range(100, 140))
    shapes = {name: array.shape for name, array in gradient.items()}
    cosines = []
    for seed in seeds:
        direction = summed(shapes, [seed], [1.0])
        cosines.append(abs(sum(float((gradient[n] * direction[n]).sum()) for n in gradient)))
    found = best_by_cosine(gradient, seeds, 4)
    assert set(found) == {seeds[place] for place in np.argsort(cosines)[-4:]} and found == sorted(found)
    assert best_by_cosine({B: np.zeros((4, 5), np.float32)}, seeds, 4) == seeds[:4]
    assert best_by_cosine({}, seeds, 4) == seeds[:4]
    assert np.abs(coordinates(gradient, found)).min() >= np.sort(cosines)[-4] - 1e-5


def test_candidates_follow_the_gradient_of_the_last_step() -> None:
    algorithm = FwdLLM(num_perturbations=4, num_candidates=10, max_variance=float("inf"), batch_size=12)
    model, state = ToyModel.draw(0), algorithm.start(toy_adapter(3, 3, 2))
    cosines = []
    for number in (1, 2):
        plan = algorithm.plan(state, number, "a", None)
        gradient = {B: plan.arrays[GRADIENT + B]}
        done = send_forward_gradient(job(algorithm, state, model, batch_seed=number))
        product = float((gradient[B] * done.arrays[B]).sum())
        cosines.append(product / max(1e-9, np.linalg.norm(gradient[B]) * np.linalg.norm(done.arrays[B])))
        updates = [Update(device=str(i), arrays=done.arrays) for i in range(2)]
        state = dict(algorithm.merge(state, number, updates, Mean()))
    assert not np.any(algorithm.start(toy_adapter())[GRADIENT + B])
    assert cosines[0] == 0 and cosines[1] > 0.5
    assert GRADIENT + B not in FwdLLM().start(toy_adapter())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_perturbations": 0}, "num_perturbations"),
        ({"max_variance": 0.0}, "max_variance"),
        ({"zo_eps": -1.0}, "zo_eps"),
        ({"num_perturbations": 2**12, "num_candidates": 2**12 + 1}, "num_candidates is 4097, expected at most 4096"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        FwdLLM(**change)  # type: ignore[arg-type]
