from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cotune.data.batches import EncodedExample
from cotune.errors import InputError, NonFiniteLossError
from cotune.generation.output_basis import OutputBasis
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone
from cotune.models.selected import SelectedParameters, bias_and_norm_names, block_names
from cotune.tuning.checkpoint import Checkpoint
from cotune.tuning.example_gradients import TextGradients
from cotune.tuning.feature_set import FeatureSet
from cotune.tuning.gradient import GradientState
from cotune.tuning.loop import CHECKPOINT_FILE, LoopConfig, LoopProgress
from cotune.tuning.lora import target_nats
from cotune.tuning.poisson import PoissonBatch, SecretSeed
from cotune.tuning.privacy_account import measure_noise_multiplier
from cotune.tuning.private import (
    PrivateConfig,
    PrivateTuner,
    add_noise,
    clipped_sums,
    tune_private,
    tune_side_private,
)
from cotune.tuning.side import SideConfig
from cotune.tuning.tuner import Params

# What does not look into the model needs no second one.
on_one_architecture = pytest.mark.parametrize("backbone", ["llama"], indirect=True)
pytest.importorskip("opacus", reason="gradients of single texts come from Opacus")

CONFIG = PrivateConfig(
    noise_multiplier=0.5,
    clip=1.0,
    delta=0.01,
    num_batch_texts=3,
    num_part_texts=2,
    secret_seed=1,
    loop=LoopConfig(epochs=2, learning_rate=0.02, checkpoint_interval_s=0.0),
)


class Lines:
    """Texts with the gradients that a test asks for: a batch part is the rows themselves."""

    def gradients(self, params: Params, batch: dict[str, Tensor]) -> TextGradients:
        return TextGradients(batch, torch.ones(len(next(iter(batch.values())))))

    def nats(self, params: Params, batch: dict[str, Tensor]) -> Tensor:
        return torch.ones(1)


def noisy_gradient(rows: dict[str, Tensor], config: PrivateConfig, *, parts: int = 1) -> dict[str, Tensor]:
    """What AdamW gets to see."""
    tuner = PrivateTuner(Lines(), config)
    state = tuner.init({name: row[0] for name, row in rows.items()})
    cut = zip(*(row.chunk(parts) for row in rows.values()), strict=True)
    tuner.step(state, PoissonBatch(tuple(dict(zip(rows, part, strict=True)) for part in cut)))
    return {name: leaf.grad for name, leaf in state.params.items() if leaf.grad is not None}


def test_clipping_by_hand() -> None:
    # Norms over both tensors: 13, 1 and 0.5; the clipping norm is 1.
    grads = {"a": torch.tensor([[3.0, 4.0], [0.6, 0.0], [0.0, 0.5]]), "b": torch.tensor([[12.0], [0.8], [0.0]])}
    sums, norms = clipped_sums(grads, 1.0)
    torch.testing.assert_close(norms, torch.tensor([13.0, 1.0, 0.5]))
    torch.testing.assert_close(sums["a"], torch.tensor([3 / 13 + 0.6, 4 / 13 + 0.5]))
    torch.testing.assert_close(sums["b"], torch.tensor([12 / 13 + 0.8]))
    # What needs no clipping stays exactly as it is, also a gradient of zero.
    small = {"a": torch.tensor([[0.1, 0.2]]), "b": torch.zeros(1, 1)}
    assert torch.equal(clipped_sums(small, 1.0)[0]["a"], small["a"][0])
    assert torch.equal(clipped_sums({"a": torch.zeros(1, 2)}, 1.0)[0]["a"], torch.zeros(2))


def test_no_text_counts_for_more_than_the_clipping_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 1e4, 1e20):
        sums, _ = clipped_sums({"a": scale * torch.randn(1, 500, generator=generator)}, 0.7)
        assert float(sums["a"].norm()) <= 0.7 * (1 + 1e-5)


def test_clipping_agrees_with_the_optimizer_of_opacus() -> None:
    from opacus.optimizers import DPOptimizer

    generator = torch.Generator().manual_seed(0)
    rows = {"a": torch.randn(6, 4, 3, generator=generator), "b": torch.randn(6, 5, generator=generator)}
    leaves = {name: torch.nn.Parameter(row[0].clone()) for name, row in rows.items()}
    for name, leaf in leaves.items():
        leaf.grad_sample = rows[name]  # type: ignore[attr-defined]
    theirs = DPOptimizer(
        torch.optim.SGD(leaves.values(), lr=1.0), noise_multiplier=0.0, max_grad_norm=2.0, expected_batch_size=4
    )
    theirs.pre_step()
    # So little noise that it is lost in rounding.
    config = replace(CONFIG, clip=2.0, num_batch_texts=4, noise_multiplier=1e-9)
    ours = noisy_gradient(rows, config, parts=3)
    for name, leaf in leaves.items():
        torch.testing.assert_close(ours[name], leaf.grad, rtol=1e-4, atol=1e-6)


def test_the_noise_has_the_stated_scale() -> None:
    """std = noise_multiplier * clip / num_batch_texts on what is followed, whatever the batch was."""
    config = replace(CONFIG, noise_multiplier=1.7, clip=0.3, num_batch_texts=5)
    stated, num = 1.7 * 0.3 / 5, 200_000
    generator = torch.Generator().manual_seed(0)
    rows = {"a": torch.randn(2, num, generator=generator), "b": torch.randn(2, 7, generator=generator)}
    noise = noisy_gradient(rows, config)["a"] - clipped_sums(rows, config.clip)[0]["a"] / 5
    assert abs(float(noise.mean())) < 5 * stated / math.sqrt(num)
    sigma, error = measure_noise_multiplier(5 * noise.double().numpy(), config.clip)
    assert abs(sigma - 1.7) < 5 * error < 0.02
    # The standard error of a variance is sqrt(2 / num).
    assert abs(float(noise.var()) / stated**2 - 1) < 5 * math.sqrt(2 / num)
    # Normal: shares beyond 1, 2 and 3 standard deviations.
    for z in (1.0, 2.0, 3.0):
        share = math.erfc(z / math.sqrt(2))
        found = float((noise.abs() > z * stated).double().mean())
        assert abs(found - share) < 5 * math.sqrt(share / num)


def test_noise_is_new_at_each_step_and_in_each_tensor() -> None:
    drawn = []
    for step in range(2):
        sums = {"a": torch.zeros(50_000), "b": torch.zeros(50_000)}
        add_noise(sums, 1.0, SecretSeed(4).generator(1, step))
        drawn += list(sums.values())
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(4)
    assert float(correlations.abs().max()) < 5 / math.sqrt(50_000)


def test_each_step_of_a_run_has_noise_of_its_own() -> None:
    tuner = PrivateTuner(Lines(), CONFIG)
    state = tuner.init({"a": torch.zeros(20_000)})
    seen = []
    for _ in range(3):
        tuner.step(state, PoissonBatch(()))
        assert state.params["a"].grad is not None
        seen.append(state.params["a"].grad.clone())
    correlations = torch.corrcoef(torch.stack(seen)) - torch.eye(3)
    assert float(correlations.abs().max()) < 5 / math.sqrt(20_000)


def test_a_step_without_texts_adds_noise_and_moves() -> None:
    tuner = PrivateTuner(Lines(), CONFIG)
    state = tuner.init({"a": torch.zeros(1000)})
    state.learning_rate = 0.1
    _, metrics = tuner.step(state, PoissonBatch(()))
    assert state.params["a"].grad is not None
    assert float(state.params["a"].grad.std()) == pytest.approx(0.5 / 3, rel=0.1)
    assert float(state.params["a"].detach().abs().min()) > 0
    assert metrics == {"loss": 0.0, "num_texts": 0.0, "clipped_share": 0.0}
    assert state.descent.num_steps == 1
    # It reports the loss of the last step that had one, also after a resume.
    tuner.step(state, PoissonBatch(({"a": torch.zeros(2, 1000)},)))
    again = tuner.init({"a": torch.zeros(1000)})
    again.load_tensors(state.to_tensors())
    for resumed in (state, again):
        assert tuner.step(resumed, PoissonBatch(()))[1]["loss"] == 1.0


def test_the_secret_is_new_for_each_run_unless_it_is_given() -> None:
    rows = {"a": torch.zeros(1, 3)}
    assert torch.equal(noisy_gradient(rows, CONFIG)["a"], noisy_gradient(rows, CONFIG)["a"])
    drawn = replace(CONFIG, secret_seed=None)
    assert not torch.equal(noisy_gradient(rows, drawn)["a"], noisy_gradient(rows, drawn)["a"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(value: float) -> None:
    rows = {"a": torch.tensor([[1.0], [value]])}
    with pytest.raises(NonFiniteLossError):
        noisy_gradient(rows, CONFIG)


def lora(backbone: Backbone) -> LoraAdapter:
    return LoraAdapter.fresh(backbone.model, LoraShape(rank=2))


def test_it_learns_and_leaves_the_backbone_unharmed(backbone: Backbone, examples: list[EncodedExample]) -> None:
    before = target_nats(backbone, examples)
    config = replace(CONFIG, noise_multiplier=0.2, num_batch_texts=9, loop=LoopConfig(epochs=4, learning_rate=0.05))
    result = tune_private(backbone, lora(backbone), examples, config, heldout=examples)
    np.testing.assert_array_equal(target_nats(backbone, examples), before)
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    adapter = LoraAdapter(shape=LoraShape(rank=2), params=result.params)
    with adapter.attach(backbone.model):
        after = target_nats(backbone, examples)
    assert after.mean() < before.mean() - 0.3
    # The held-out losses are those of the adapted model.
    assert result.curve[0].heldout_loss == pytest.approx(before.mean(), abs=1e-4)
    assert result.curve[result.best_epoch].heldout_loss == pytest.approx(after.mean(), abs=1e-4)


@on_one_architecture
def test_the_account_is_that_of_the_steps_taken(backbone: Backbone, examples: list[EncodedExample]) -> None:
    result = tune_private(backbone, lora(backbone), examples, CONFIG)
    assert result.account.num_steps == result.curve[-1].num_steps == 2 * 3
    assert result.account.sample_rate == 3 / 9
    assert result.account == CONFIG.account(9)


def test_parts_do_not_matter(backbone: Backbone, examples: list[EncodedExample]) -> None:
    whole, cut = (
        tune_private(backbone, lora(backbone), examples, replace(CONFIG, num_part_texts=size)).params for size in (9, 1)
    )
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-3, atol=1e-4)


def test_the_models_own_parameters_are_tuned_and_come_back(
    backbone: Backbone, examples: list[EncodedExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same result as on a copy, by hooks and by one pass for each text."""
    before = {name: parameter.detach().clone() for name, parameter in backbone.model.named_parameters()}
    for names in (bias_and_norm_names(backbone.model), block_names(backbone.model, [0])):
        fresh = SelectedParameters.of(backbone.model, names)
        own = tune_private(backbone, fresh, examples, CONFIG, heldout=examples, run_dir=tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(
                GradientState,
                "inside",
                lambda model, params, *, weight_decay: GradientState.start(params, weight_decay=weight_decay),
            )
            copied = tune_private(backbone, fresh, examples, CONFIG, heldout=examples)
        now = dict(backbone.model.named_parameters())
        assert all(torch.equal(now[name], before[name]) for name in before)
        assert own.params.keys() == copied.params.keys() == set(names)
        assert all(torch.equal(own.params[name], copied.params[name]) for name in names)
        assert not any(torch.equal(own.params[name], before[name]) for name in names) or own.best_epoch == 0


class StopHereError(Exception):
    pass


def stop_at(step: int) -> Callable[[LoopProgress], None]:
    def progress(at: LoopProgress) -> None:
        if at.step == step:
            raise StopHereError

    return progress


@on_one_architecture
@pytest.mark.parametrize("given", [1, None])
def test_resumed_is_identical(
    backbone: Backbone, examples: list[EncodedExample], tmp_path: Path, given: int | None
) -> None:
    config = replace(CONFIG, secret_seed=given)
    with pytest.raises(StopHereError):
        tune_private(backbone, lora(backbone), examples, config, run_dir=tmp_path, progress=stop_at(4))
    path = tmp_path / CHECKPOINT_FILE
    assert path.stat().st_mode & 0o077 == 0
    resumed = tune_private(backbone, lora(backbone), examples, config, run_dir=tmp_path, resume=True)
    # The drawn secret is in the checkpoint; a run that is given it, and is left alone, ends with the same weights.
    found = Checkpoint(path, _fingerprint_of(path)).load()
    assert found is not None
    secret = SecretSeed(0)
    secret.load_tensor(found.tensors["secret_seed"])
    whole = tune_private(backbone, lora(backbone), examples, replace(config, secret_seed=secret.value))
    assert all(torch.equal(resumed.params[name], whole.params[name]) for name in whole.params)
    assert resumed.account == whole.account
    assert [each.train_loss for each in resumed.curve] == [each.train_loss for each in whole.curve]


def _fingerprint_of(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return str(file.metadata()["fingerprint"])


@on_one_architecture
def test_another_config_is_not_resumed(backbone: Backbone, examples: list[EncodedExample], tmp_path: Path) -> None:
    tune_private(backbone, lora(backbone), examples, CONFIG, run_dir=tmp_path)
    other = replace(CONFIG, noise_multiplier=0.4)
    with pytest.raises(InputError, match="another config or other data"):
        tune_private(backbone, lora(backbone), examples, other, run_dir=tmp_path, resume=True)


def test_a_checkpoint_without_privacy() -> None:
    tuner = PrivateTuner(Lines(), CONFIG)
    state = tuner.init({"a": torch.zeros(2)})
    with pytest.raises(InputError, match="without differential privacy"):
        state.load_tensors(state.descent.to_tensors())


def features_of(draw_world: Callable[..., Any], num_texts: int) -> FeatureSet:
    worlds = [draw_world(12, seed).features(16) for seed in range(num_texts // 2)]
    parts = []
    for world in worlds:
        for s in range(2):
            parts.append((world, slice(int(world.offsets[s]), int(world.offsets[s + 1]))))
    from cotune.wire.features import SequenceFeatures

    names = (
        "target_ids", "tap_codes", "tap_scales", "log_normalizer", "target_logits", "top_ids", "top_logits", "hidden"
    )  # fmt: skip
    return FeatureSet.from_sequences(
        [SequenceFeatures(**{name: getattr(world, name)[rows] for name in names}) for world, rows in parts]
    )


SIDE = SideConfig(side_width=8, inner_width=8)


def test_the_side_network_learns_privately(draw_world: Callable[..., Any], output_basis: OutputBasis) -> None:
    features = features_of(draw_world, 60)
    config = PrivateConfig(
        noise_multiplier=0.3,
        num_batch_texts=30,
        num_part_texts=30,
        secret_seed=1,
        loop=LoopConfig(epochs=12, learning_rate=0.03),
    )
    result, account = tune_side_private(features, output_basis, SIDE, config, heldout=features)
    first, last = result.curve[0].heldout_loss, result.curve[result.best_epoch].heldout_loss
    assert first is not None and last is not None and last < first - 0.3
    assert account.num_steps == 24 and account.sample_rate == 0.5


def test_the_side_network_resumes_identically(
    draw_world: Callable[..., Any], output_basis: OutputBasis, tmp_path: Path
) -> None:
    features = features_of(draw_world, 8)
    with pytest.raises(StopHereError):
        tune_side_private(features, output_basis, SIDE, CONFIG, run_dir=tmp_path, progress=stop_at(4))
    resumed, _ = tune_side_private(features, output_basis, SIDE, CONFIG, run_dir=tmp_path, resume=True)
    whole, _ = tune_side_private(features, output_basis, SIDE, CONFIG)
    for mine, theirs in zip(resumed.network.parameters(), whole.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_side_dropout_is_refused(draw_world: Callable[..., Any], output_basis: OutputBasis) -> None:
    with pytest.raises(InputError, match=r"dropout is 0\.2, expected 0"):
        tune_side_private(features_of(draw_world, 2), output_basis, replace(SIDE, dropout=0.2), CONFIG)


def test_a_budget_becomes_noise() -> None:
    """Budgets beyond the tighter accountant, which is slow; `test_privacy_account.py` has those within."""
    config = PrivateConfig.for_budget(400, epsilon=80.0, loop=LoopConfig(epochs=1))
    assert (config.num_batch_texts, config.delta) == (64, 1e-5)
    assert 76 < config.account(400).epsilon <= 80
    tighter = PrivateConfig.for_budget(400, epsilon=60.0, loop=LoopConfig(epochs=1))
    assert tighter.noise_multiplier > config.noise_multiplier
    assert PrivateConfig.for_budget(40, epsilon=60.0, loop=LoopConfig(epochs=1)).num_batch_texts == 10


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier is 0.0, expected a positive number"),
        ({"clip": -1.0}, "clip is -1.0, expected a positive number"),
        ({"clip": math.nan}, "clip is nan"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"num_batch_texts": 0}, "num_batch_texts is 0"),
        ({"num_part_texts": 0}, "num_part_texts is 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"secret_seed": -1}, "the secret seed has"),
    ],
)
def test_bad_configs(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(CONFIG, **wrong)


@on_one_architecture
def test_bad_budgets(backbone: Backbone, examples: list[EncodedExample]) -> None:
    with pytest.raises(InputError, match=r"delta is 0\.1 for 10 texts, expected below 0\.1"):
        PrivateConfig.for_budget(10, epsilon=1.0, delta=0.1)
    with pytest.raises(InputError, match="target_epsilon is 0"):
        PrivateConfig.for_budget(10, epsilon=0.0)
    with pytest.raises(InputError, match="num_texts is 0"):
        PrivateConfig.for_budget(0, epsilon=1.0)
    with pytest.raises(InputError, match="no texts to train on"):
        tune_private(backbone, lora(backbone), [], CONFIG)
