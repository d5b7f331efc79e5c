"""DP-ZO: a step by hand, the noise's size, what the account says, and resuming."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import tiny_backbone

from cotune.data.assistant_text import generate_exchanges
from cotune.data.batches import EncodedExample, pad_batch
from cotune.data.templates import Example
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.tuning.adaptations import AdaptationOptions, adaptation_named
from cotune.tuning.attached import Tunable
from cotune.tuning.directions import direction_seed
from cotune.tuning.in_place import InPlaceTuner
from cotune.tuning.loop import LoopConfig, LoopProgress
from cotune.tuning.objectives import AnswerNats
from cotune.tuning.personal import encode_examples
from cotune.tuning.poisson import PoissonBatch, SecretSeed
from cotune.tuning.privacy_account import measure_noise_multiplier
from cotune.tuning.private import PrivateConfig
from cotune.tuning.private_zeroth_order import PrivateZerothOrderTuner, private_scalars, tune_private_zeroth_order
from cotune.tuning.seed_updates import Momentum
from cotune.tuning.zeroth_order import ZerothOrderConfig, measure_along

LOOP = LoopConfig(epochs=3, learning_rate=1e-2, checkpoint_interval_s=0.0)
QUIET = PrivateConfig(noise_multiplier=1e-9, clip=1e3, num_batch_texts=6, num_part_texts=4, loop=LOOP, secret_seed=5)
STEPS = ZerothOrderConfig(num_directions=2, seed=3)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("llama")


@pytest.fixture(scope="module")
def examples(backbone: Backbone) -> list[EncodedExample]:
    texts = [Example(one.request, " " + one.answer) for one in generate_exchanges(6, seed=1)]
    return encode_examples(backbone.tokenizer_json, texts, backbone.description, 24)


@pytest.fixture
def fresh(backbone: Backbone, examples: list[EncodedExample]) -> Tunable:
    return adaptation_named("bias", AdaptationOptions()).fresh(backbone, examples, seed=0)


def parts_of(backbone: Backbone, examples: list[EncodedExample], size: int) -> PoissonBatch[object]:
    batches = [examples[i : i + size] for i in range(0, len(examples), size)]
    return PoissonBatch(tuple(pad_batch(batch, backbone.spec.pad_token_id) for batch in batches))


@pytest.mark.parametrize("clip", [1e3, 0.05])
def test_a_step_by_hand(backbone: Backbone, examples: list[EncodedExample], fresh: Tunable, clip: float) -> None:
    """theta - lr / K sum_k g_k z_k, with g_k the sum of clipped slopes of single texts over B; parts do not matter."""
    private = replace(QUIET, clip=clip, noise_multiplier=1e-12, num_batch_texts=4)
    results = []
    for size in (6, 2):
        with fresh.attach(backbone.model) as model:
            before = {name: tensor.detach().clone() for name, tensor in fresh.params.items()}
            tuner = PrivateZerothOrderTuner(model, STEPS, private, SecretSeed(5))
            state = tuner.init(before)
            plain: InPlaceTuner[object] = InPlaceTuner(model, AnswerNats(), None)  # type: ignore[arg-type]
            expected = {name: tensor.clone() for name, tensor in before.items()}
            state.learning_rate = 0.5
            (whole,) = parts_of(backbone, examples, 6).parts
            for index in range(2):
                direction = state.numbers.direction(direction_seed(3, 0, index))
                slopes = measure_along(plain, state, whole, direction, zo_eps=STEPS.zo_eps).slopes()
                value = float(slopes.clamp(-clip, clip).sum()) / 4
                signs = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
                with state.numbers.moved(direction, 1.0) as moved:
                    for name in signs:
                        signs[name] = (moved[name] + 0 - state.params[name]).sign()
                for name in expected:
                    expected[name] -= 0.5 * value / 2 * signs[name]
            state, metrics = tuner.step(state, parts_of(backbone, examples, size))  # type: ignore[arg-type]
            assert metrics["num_texts"] == 6
            assert (metrics["clipped_share"] > 0) == (clip < 1)
            for name in expected:
                torch.testing.assert_close(state.params[name].detach(), expected[name], atol=1e-5, rtol=1e-4)
            results.append({name: tensor.detach().clone() for name, tensor in state.params.items()})
            tuner.init(before)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-5, rtol=1e-4)


def test_the_noise_of_an_empty_step_has_its_size(backbone: Backbone, fresh: Tunable) -> None:
    """Standard deviation sqrt(K) sigma C / B of each of K scalars; momentum keeps them, so they can be read."""
    private = replace(QUIET, noise_multiplier=1.5, clip=0.4, num_batch_texts=3)
    steps = replace(STEPS, num_directions=4, rule=Momentum(window=200))
    with fresh.attach(backbone.model) as model:
        before = {name: tensor.detach().clone() for name, tensor in fresh.params.items()}
        tuner = PrivateZerothOrderTuner(model, steps, private, SecretSeed(11))
        state = tuner.init(before)
        for _ in range(150):
            state, metrics = tuner.step(state, PoissonBatch(()))
        assert metrics == {"loss": 0.0, "num_texts": 0.0, "clipped_share": 0.0}
        values = np.array([slope.value for slope in state.slopes])
    assert len(values) == 600
    assert values.std() == pytest.approx(2 * 1.5 * 0.4 / 3, rel=0.12)
    assert abs(values.mean()) < 0.1


def test_slopes_are_clipped_one_by_one() -> None:
    slopes = np.array([[1.0, 0.5], [5.0, -0.5], [-9.0, 0.25]])
    found = private_scalars(slopes, clip=2.0, noise_multiplier=0.0, num_expected=8, generator=np.random.default_rng(0))
    assert found.tolist() == [(1 + 2 - 2) / 8, 0.25 / 8]


def test_one_unit_changes_a_release_by_at_most_one_noise_multiplier() -> None:
    """The sums of K directions move by sqrt(K) C at most, and each has noise of sqrt(K) sigma C."""
    many = 4000

    def release(slopes: NDArray[np.float64]) -> NDArray[np.float64]:
        generator = np.random.default_rng(3)
        return private_scalars(slopes, clip=0.4, noise_multiplier=1.5, num_expected=1, generator=generator)

    noise = release(np.zeros((0, many)))
    moved = float(np.linalg.norm(release(np.full((1, many), 1e9)) - noise))
    assert moved == pytest.approx(math.sqrt(many) * 0.4)
    sigma, error = measure_noise_multiplier(noise, moved)
    assert abs(sigma - 1.5) < 4 * error
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 4 / math.sqrt(many)


@pytest.mark.parametrize(
    "changes",
    [
        {"clip": 0.0},
        {"clip": math.inf},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"num_expected": 0},
    ],
)
def test_settings_that_promise_nothing_are_refused(changes: dict[str, float]) -> None:
    good = {"clip": 1.0, "noise_multiplier": 1.0, "num_expected": 1.0}
    generator = np.random.default_rng(0)
    with pytest.raises(InputError, match=next(iter(changes))):
        private_scalars(np.zeros((1, 1)), **{**good, **changes}, generator=generator)
    for wrong in (np.zeros(3), np.zeros((3, 0)), np.array([[math.nan]])):
        with pytest.raises(InputError, match="slopes has shape"):
            private_scalars(wrong, **good, generator=generator)


def test_it_learns_and_says_what_it_spent(backbone: Backbone, examples: list[EncodedExample], fresh: Tunable) -> None:
    pytest.importorskip("opacus", reason="needs cotune[private]")
    private = replace(QUIET, noise_multiplier=0.3, clip=5.0, loop=LoopConfig(epochs=16, learning_rate=6e-3))
    result = tune_private_zeroth_order(backbone, fresh, examples, STEPS, private, heldout=examples)
    first, best = result.curve[0].heldout_loss, result.curve[result.best_epoch].heldout_loss
    assert first is not None and best is not None and best < first
    assert result.account.num_steps == 16 and result.account.sample_rate == 1.0
    assert result.account == private.account(6)
    assert math.isfinite(result.account.epsilon)


class StopHereError(Exception):
    pass


def test_an_interrupted_run_resumes_identically(
    backbone: Backbone, examples: list[EncodedExample], fresh: Tunable, tmp_path: Path
) -> None:
    pytest.importorskip("opacus", reason="needs cotune[private]")
    private = replace(QUIET, num_batch_texts=2, noise_multiplier=1.0, secret_seed=None)

    def stop(progress: LoopProgress) -> None:
        if progress.step == 5:
            raise StopHereError

    with pytest.raises(StopHereError):
        tune_private_zeroth_order(backbone, fresh, examples, STEPS, private, run_dir=tmp_path, progress=stop)
    resumed = tune_private_zeroth_order(backbone, fresh, examples, STEPS, private, run_dir=tmp_path, resume=True)
    again = tune_private_zeroth_order(backbone, fresh, examples, STEPS, private, run_dir=tmp_path, resume=True)
    assert resumed.account.num_steps == 9
    for name, tensor in resumed.params.items():
        # The secret came from the first run's checkpoint: another one would give other noise.
        assert torch.equal(again.params[name], tensor)
    given = replace(private, secret_seed=7)
    with pytest.raises(StopHereError):
        tune_private_zeroth_order(backbone, fresh, examples, STEPS, given, run_dir=tmp_path, progress=stop)
    resumed = tune_private_zeroth_order(backbone, fresh, examples, STEPS, given, run_dir=tmp_path, resume=True)
    whole = tune_private_zeroth_order(backbone, fresh, examples, STEPS, given)
    for name, tensor in whole.params.items():
        assert torch.equal(resumed.params[name], tensor)


def test_no_texts_are_refused(backbone: Backbone, fresh: Tunable) -> None:
    with pytest.raises(InputError, match="no texts"):
        tune_private_zeroth_order(backbone, fresh, [], STEPS, QUIET)
