from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cotune.errors import InputError, NonFiniteLossError
from cotune.tuning.gradient import GradientState
from cotune.tuning.loop import CHECKPOINT_FILE, METRICS_FILE, LoopConfig, LoopProgress, LoopResult, run_loop
from cotune.tuning.tuner import Metrics, Params


class MeanTuner:
    """Finds the mean of numbers: loss (w - x)^2."""

    def init(self, params: Params) -> GradientState:
        return GradientState.start(params, weight_decay=0.0)

    def step(self, state: GradientState, batch: torch.Tensor) -> tuple[GradientState, Metrics]:
        return state, state.descend(((state.params["w"] - batch) ** 2).mean(), max_grad_norm=10.0)

    @torch.no_grad()
    def evaluate(self, state: GradientState, batch: torch.Tensor) -> tuple[float, int]:
        return float(((state.params["w"] - batch) ** 2).sum()), len(batch)


@dataclass
class Numbers:
    values: list[list[float]]
    epochs: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.values)

    def epoch(self, epoch: int) -> Iterator[torch.Tensor]:
        self.epochs.append(epoch)
        for index in np.random.default_rng(epoch).permutation(len(self.values)):
            yield torch.tensor(self.values[index])


NUMBERS = [[3.0, 1.0], [2.0, 2.5], [1.5, 4.0], [0.0, 3.0]]
CONFIG = LoopConfig(epochs=5, learning_rate=0.3, log_interval=3, checkpoint_interval_s=0.0)


def run(config: LoopConfig = CONFIG, heldout: Numbers | None = None, **options: Any) -> LoopResult[GradientState]:
    tuner = MeanTuner()
    state = tuner.init({"w": torch.tensor([-1.0, 5.0])})
    return run_loop(tuner, state, Numbers(NUMBERS), config, heldout=heldout, **options)


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "elapsed_s"} for line in lines]


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    config = LoopConfig(learning_rate=2.0, warmup_fraction=0.2)
    for done, expected in ((0.0, 0.0), (0.1, 1.0), (0.2, 2.0), (0.6, 1.0), (1.0, 0.0)):
        assert config.learning_rate_at(done) == pytest.approx(expected, abs=1e-12)
    assert LoopConfig(learning_rate=2.0, warmup_fraction=0.0).learning_rate_at(0.0) == 2.0


def test_it_trains_and_reports(tmp_path: Path) -> None:
    seen: list[LoopProgress] = []
    result = run(run_dir=tmp_path, progress=seen.append)
    assert [record.epoch for record in result.curve] == [0, 1, 2, 3, 4, 5]
    assert result.curve[0].train_loss is None
    losses = [record.train_loss for record in result.curve[1:]]
    assert losses[-1] < losses[0] / 2  # type: ignore[operator]
    assert result.best_epoch == 5
    assert (len(seen), seen[-1].step, seen[-1].num_steps, seen[-1].epoch) == (20, 20, 20, 5)
    # Lines after 3 steps or at an epoch's end, each with means; and one line for each epoch.
    lines = lines_of(tmp_path)
    steps = [line["step"] for line in lines if "step" in line]
    assert steps == [3, 4, 7, 8, 11, 12, 15, 16, 19, 20]
    assert [line["num_steps"] for line in lines if "num_steps" in line] == [0, 4, 8, 12, 16, 20]
    first = next(line for line in lines if "step" in line)
    assert first["loss"] == pytest.approx(np.mean([progress.loss for progress in seen[:3]]))


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 20])
@pytest.mark.parametrize("interval_s", [0.0, 1e9])
def test_an_interrupted_and_resumed_run_ends_like_an_undisturbed_one(
    tmp_path: Path, stop: int, interval_s: float
) -> None:
    config = LoopConfig(**{**vars(CONFIG), "checkpoint_interval_s": interval_s})
    heldout = Numbers([[2.0, 2.0], [1.0, 1.0]])
    whole = run(config, heldout, run_dir=tmp_path / "whole")

    def interrupt(progress: LoopProgress) -> None:
        if progress.step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, heldout, run_dir=tmp_path / "cut", progress=interrupt)
    resumed = run(config, heldout, run_dir=tmp_path / "cut", resume=True)

    assert torch.equal(resumed.state.params["w"], whole.state.params["w"])
    assert resumed.best_epoch == whole.best_epoch
    assert [r.heldout_loss for r in resumed.curve] == [r.heldout_loss for r in whole.curve]
    assert [r.train_loss for r in resumed.curve] == [r.train_loss for r in whole.curve]
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "whole")


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    whole = run(run_dir=tmp_path)
    seen: list[LoopProgress] = []
    again = run(run_dir=tmp_path, resume=True, progress=seen.append)
    assert seen == []
    assert torch.equal(again.state.params["w"], whole.state.params["w"])
    assert again.curve == whole.curve
    run(run_dir=tmp_path, progress=seen.append)
    assert len(seen) == 20, "without resume it starts again"
    assert len([line for line in lines_of(tmp_path) if "num_steps" in line]) == 6


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    run(run_dir=tmp_path, fingerprint="one")
    with pytest.raises(InputError, match="another config or other data"):
        run(run_dir=tmp_path, fingerprint="two", resume=True)


def test_resume_without_a_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    assert torch.equal(run(run_dir=tmp_path, resume=True).state.params["w"], run().state.params["w"])


def test_a_checkpoint_whose_metrics_file_is_gone_still_resumes(tmp_path: Path) -> None:
    run(run_dir=tmp_path)
    (tmp_path / METRICS_FILE).unlink()
    run(run_dir=tmp_path, resume=True)
    assert (tmp_path / METRICS_FILE).read_bytes() == b""


def test_the_best_epoch_on_held_out_data_wins() -> None:
    # The way from (-1, 5) to the mean of the training numbers passes by (-0.5, 4.6), then only leads away from it.
    heldout = Numbers([[-0.5, 4.6]])
    result = run(LoopConfig(epochs=8, learning_rate=0.1), heldout)
    losses = [record.heldout_loss for record in result.curve]
    assert 0 < result.best_epoch < 8
    assert losses[result.best_epoch] == min(losses)  # type: ignore[type-var]
    loss = float(((result.state.params["w"].detach() - torch.tensor([-0.5, 4.6])) ** 2).sum()) / 2
    assert loss == pytest.approx(losses[result.best_epoch])


def test_a_best_epoch_before_the_interruption_is_remembered(tmp_path: Path) -> None:
    heldout = Numbers([[-0.5, 4.6]])
    config = LoopConfig(epochs=8, learning_rate=0.1, checkpoint_interval_s=0.0)

    def interrupt(progress: LoopProgress) -> None:
        if progress.step == 27:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, heldout, run_dir=tmp_path, progress=interrupt)
    resumed, whole = run(config, heldout, run_dir=tmp_path, resume=True), run(config, heldout)
    assert 4 * whole.best_epoch < 27
    assert resumed.best_epoch == whole.best_epoch
    assert torch.equal(resumed.state.params["w"], whole.state.params["w"])
    assert not list(tmp_path.glob("best-*")), "the checkpoint holds it now"


def test_a_best_epoch_whose_file_is_gone_is_one_clear_error(tmp_path: Path) -> None:
    def interrupt(progress: LoopProgress) -> None:
        if progress.step == 6:
            raise KeyboardInterrupt

    heldout = Numbers([[2.0, 2.0]])
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, heldout, run_dir=tmp_path, progress=interrupt)
    for path in tmp_path.glob("best-*"):
        path.unlink()
    with pytest.raises(InputError, match="lacks the parameters of epoch 1, the best; start without resuming"):
        run(CONFIG, heldout, run_dir=tmp_path, resume=True)


def test_training_that_only_harms_gives_back_the_start() -> None:
    result = run(CONFIG, Numbers([[-1.0, 5.0]]))
    assert result.best_epoch == 0
    assert result.state.params["w"].tolist() == [-1.0, 5.0]


def test_a_time_limit_ends_the_run_and_the_learning_rate_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(100_000))
    monkeypatch.setattr("cotune.tuning.loop.time.monotonic", lambda: next(seconds))
    seen: list[LoopProgress] = []
    config = LoopConfig(epochs=1000, learning_rate=0.1, max_seconds=40.0)
    result = run(config, progress=seen.append)
    assert 2 < len(seen) < 40
    assert result.curve[-1].num_steps == len(seen)
    assert result.curve[-1].elapsed_s >= 40
    assert result.state.learning_rate < 0.02


def test_a_non_finite_loss_names_the_step() -> None:
    with pytest.raises(NonFiniteLossError, match="step 0 is nan"):
        run_loop(
            MeanTuner(), MeanTuner().init({"w": torch.tensor([1.0])}), Numbers([[float("nan")]]), LoopConfig(epochs=1)
        )


def test_a_run_that_breaks_off_before_its_first_checkpoint_leaves_no_parameters(tmp_path: Path) -> None:
    bad, start = Numbers([[1.0], [float("nan")]]), {"w": torch.tensor([1.0])}
    for interval_s, left in ((1e9, {"metrics.jsonl"}), (0.0, {"metrics.jsonl", CHECKPOINT_FILE, "best-0.safetensors"})):
        with pytest.raises(NonFiniteLossError, match="step 1 is nan"):
            run_loop(
                MeanTuner(),
                MeanTuner().init(start),
                bad,
                LoopConfig(epochs=1, checkpoint_interval_s=interval_s),
                heldout=Numbers([[0.0]]),
                run_dir=tmp_path,
            )
        assert {path.name for path in tmp_path.iterdir()} == left


def test_a_damaged_checkpoint_is_refused_and_kept(tmp_path: Path) -> None:
    run(run_dir=tmp_path)
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"x" * 50)
    with pytest.raises(InputError, match="damaged"):
        run(run_dir=tmp_path, resume=True)
    assert (tmp_path / CHECKPOINT_FILE).read_bytes() == b"x" * 50


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"warmup_fraction": 1.0},
        {"max_seconds": 0.0},
        {"log_interval": 0},
        {"checkpoint_interval_s": -1.0},
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        LoopConfig(**changes)


def test_no_batches_are_refused() -> None:
    with pytest.raises(InputError, match="nothing to train on"):
        run_loop(MeanTuner(), MeanTuner().init({"w": torch.ones(1)}), Numbers([]), CONFIG)
