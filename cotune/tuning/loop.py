"""The one training loop: every method in this room is driven by it.

It knows epochs, a time limit, the learning rate's course, held-out losses, the metrics file and checkpoints; it knows
nothing of models. A run that was interrupted and resumed ends with the same weights as one that was left alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Generic

from cotune.errors import InputError
from cotune.tuning.best_parameters import BestParameters
from cotune.tuning.checkpoint import Checkpoint
from cotune.tuning.tuner import Batches, BatchT, Metrics, StateT, Tuner

METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FILE = "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train, and with which learning rates."""

    epochs: int = 15
    """Times that every training token is seen."""
    learning_rate: float = 1e-2
    """Largest learning rate, reached after the warm-up; a cosine takes it to zero from there."""
    warmup_fraction: float = 0.05
    """Share of the run in which the learning rate rises from zero."""
    max_seconds: float | None = None
    """Stop after this much time, with the learning rate's course squeezed into it; None: only epochs count.
    A run that ends by time depends on the speed of the machine and cannot be repeated exactly."""
    log_interval: int = 10
    """Steps that one line of the metrics file sums up."""
    checkpoint_interval_s: float = 10.0
    """Seconds between checkpoints, the most that an interruption loses."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise InputError(f"epochs is {self.epochs}, expected at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"learning_rate is {self.learning_rate}, expected a positive number")
        if not 0 <= self.warmup_fraction < 1:
            raise InputError(f"warmup_fraction is {self.warmup_fraction}, expected 0 <= warmup_fraction < 1")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise InputError(f"max_seconds is {self.max_seconds}, expected a positive number or None")
        if self.log_interval < 1:
            raise InputError(f"log_interval is {self.log_interval}, expected at least 1")
        if not self.checkpoint_interval_s >= 0:
            raise InputError(f"checkpoint_interval_s is {self.checkpoint_interval_s}, expected 0 or more")

    def learning_rate_at(self, done: float) -> float:
        """Learning rate when the share `done` of the run, 0 to 1, is behind: linear rise, then half a cosine."""
        if done < self.warmup_fraction:
            return self.learning_rate * done / self.warmup_fraction
        fall = min(1.0, (done - self.warmup_fraction) / (1 - self.warmup_fraction))
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * fall))


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """What an epoch brought; epoch 0 is the state before training."""

    epoch: int
    """Epochs behind, so 1 is after the first."""
    num_steps: int
    """Steps taken since the start of the run."""
    train_loss: float | None
    """Mean loss of the epoch's steps, nats per token; None before training."""
    heldout_loss: float | None
    """Nats per held-out token after the epoch; None without held-out data."""
    elapsed_s: float
    """Seconds of training since the start of the run, interruptions left out."""


@dataclass(frozen=True, kw_only=True)
class LoopProgress:
    """Where the loop is, for a progress bar; reported after each step."""

    step: int
    num_steps: int
    epoch: int
    loss: float
    heldout_loss: float | None
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class LoopResult(Generic[StateT]):
    """The trained state and how it came about."""

    state: StateT
    """With the parameters of the best epoch where held-out data was given, else of the last."""
    curve: list[EpochRecord]
    """One record per epoch, in order."""
    best_epoch: int
    """The epoch whose parameters `state` holds; 0 if training never beat the start on held-out data."""


@dataclass
class _Course:
    """Where a run is; what a checkpoint keeps beside the tensors."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0
    elapsed_s: float = 0.0
    best_epoch: int = 0
    metrics_bytes: int = 0
    num_unwritten: int = 0
    unwritten: Metrics = field(default_factory=dict)
    finished: bool = False
    curve: list[EpochRecord] = field(default_factory=list)

    @property
    def heldout_loss(self) -> float | None:
        return self.curve[-1].heldout_loss if self.curve else None


def run_loop(
    tuner: Tuner[StateT, BatchT],
    state: StateT,
    batches: Batches[BatchT],
    config: LoopConfig,
    *,
    heldout: Batches[BatchT] | None = None,
    run_dir: Path | None = None,
    fingerprint: str = "",
    resume: bool = False,
    progress: Callable[[LoopProgress], None] | None = None,
) -> LoopResult[StateT]:
    """Train `state` over `batches`.

    Args:
        tuner: the method.
        state: from `tuner.init`; changed in place.
        batches: training data, the same at each call with the same epoch number.
        config: how long, and with which learning rates.
        heldout: to judge each epoch by; the best epoch's parameters are returned. None: the last epoch's are.
        run_dir: where `metrics.jsonl`, `checkpoint.safetensors` and the best epoch's parameters go; None writes nothing
            and keeps a copy of these in memory.
        fingerprint: names the config and the data; a checkpoint with another one is not resumed.
        resume: go on from the checkpoint in `run_dir`, if there is one. Otherwise it is written over.
        progress: called after each step.

    Raises:
        NonFiniteLossError: a loss is nan or inf.
        InputError: nothing to train on, or the checkpoint is of another run.
    """
    if len(batches) < 1:
        raise InputError("there is nothing to train on, expected at least one batch")
    loop = _Loop(tuner, state, batches, config, heldout, run_dir, fingerprint, progress)
    if resume:
        loop.resume()
    try:
        loop.run()
    except BaseException:
        loop.leave()
        raise
    finally:
        loop.metrics.close()
    return LoopResult(state=loop.state, curve=loop.course.curve, best_epoch=loop.course.best_epoch)


class _Loop(Generic[StateT, BatchT]):
    """The moving parts of one run."""

    def __init__(
        self,
        tuner: Tuner[StateT, BatchT],
        state: StateT,
        batches: Batches[BatchT],
        config: LoopConfig,
        heldout: Batches[BatchT] | None,
        run_dir: Path | None,
        fingerprint: str,
        progress: Callable[[LoopProgress], None] | None,
    ) -> None:
        self.tuner, self.state, self.batches, self.config = tuner, state, batches, config
        self.heldout, self.progress = heldout, progress
        self.num_steps = config.epochs * len(batches)
        self.course = _Course()
        self.best = BestParameters(run_dir)
        self.clock = time.monotonic()
        self.saved_at = self.clock
        self.metrics = _MetricsFile(None if run_dir is None else run_dir / METRICS_FILE)
        self.checkpoint = None if run_dir is None else Checkpoint(run_dir / CHECKPOINT_FILE, fingerprint)

    def run(self) -> None:
        course = self.course
        self.metrics.open(course.metrics_bytes)
        if course.finished:
            return
        if not course.curve:
            self.close_epoch(None)
        out_of_time = self.is_out_of_time()
        while course.epoch < self.config.epochs and not out_of_time:
            for batch in islice(self.batches.epoch(course.epoch), course.step_in_epoch, None):
                self.take_step(batch)
                out_of_time = self.is_out_of_time()
                if out_of_time:
                    break
            self.close_epoch(course.loss_sum / course.step_in_epoch)
        if self.best.params:
            self.state.load_params(self.best.params)
        course.finished = True
        self.save()

    def take_step(self, batch: BatchT) -> None:
        course = self.course
        self.state.learning_rate = self.config.learning_rate_at(self.share_done())
        self.state, metrics = self.tuner.step(self.state, batch)
        course.step += 1
        course.step_in_epoch += 1
        course.loss_sum += metrics["loss"]
        course.num_unwritten += 1
        for name, value in {**metrics, "learning_rate": self.state.learning_rate}.items():
            course.unwritten[name] = course.unwritten.get(name, 0.0) + value
        if course.num_unwritten == self.config.log_interval:
            self.write_steps()
        if time.monotonic() - self.saved_at >= self.config.checkpoint_interval_s:
            self.save()
        if self.progress is not None:
            self.progress(
                LoopProgress(
                    step=course.step,
                    num_steps=self.num_steps,
                    epoch=course.epoch + 1,
                    loss=metrics["loss"],
                    heldout_loss=course.heldout_loss,
                    elapsed_s=self.elapsed_s(),
                )
            )

    def write_steps(self) -> None:
        """One line with the means over the steps since the last one."""
        course = self.course
        if course.num_unwritten:
            self.metrics.write(
                {
                    "step": course.step,
                    "epoch": course.epoch + 1,
                    **{name: total / course.num_unwritten for name, total in course.unwritten.items()},
                    "elapsed_s": self.elapsed_s(),
                }
            )
        course.unwritten, course.num_unwritten = {}, 0

    def close_epoch(self, train_loss: float | None) -> None:
        """Judge by held-out data, remember the best parameters, begin the next epoch."""
        course = self.course
        self.write_steps()
        loss_before = min((r.heldout_loss for r in course.curve if r.heldout_loss is not None), default=math.inf)
        heldout_loss = self.heldout_loss()
        if train_loss is not None:
            course.epoch += 1
        record = EpochRecord(
            epoch=course.epoch,
            num_steps=course.step,
            train_loss=train_loss,
            heldout_loss=heldout_loss,
            elapsed_s=self.elapsed_s(),
        )
        course.curve.append(record)
        course.step_in_epoch, course.loss_sum = 0, 0.0
        if heldout_loss is None:
            course.best_epoch = course.epoch
        elif heldout_loss < loss_before:
            course.best_epoch = course.epoch
            self.best.keep(course.epoch, self.state.params)
        self.metrics.write(asdict(record))

    def heldout_loss(self) -> float | None:
        if self.heldout is None:
            return None
        sums = [self.tuner.evaluate(self.state, batch) for batch in self.heldout.epoch(0)]
        return sum(nats for nats, _ in sums) / sum(count for _, count in sums)

    def elapsed_s(self) -> float:
        return self.course.elapsed_s + time.monotonic() - self.clock

    def share_done(self) -> float:
        share = (self.course.step + 0.5) / self.num_steps
        if self.config.max_seconds is not None:
            share = max(share, self.elapsed_s() / self.config.max_seconds)
        return share

    def is_out_of_time(self) -> bool:
        return self.config.max_seconds is not None and self.elapsed_s() >= self.config.max_seconds

    def save(self) -> None:
        if self.checkpoint is None:
            return
        self.course.elapsed_s, self.clock = self.elapsed_s(), time.monotonic()
        self.course.metrics_bytes = self.metrics.flush()
        self.checkpoint.save(self.state.to_tensors(), asdict(self.course))
        # At the end the state itself is the best.
        self.best.forget_others(None if self.course.finished else self.course.best_epoch)
        self.saved_at = time.monotonic()

    def leave(self) -> None:
        """Broken off: the best epoch's parameters are of use to a checkpoint that knows of them, and to nobody else."""
        if self.checkpoint is None or not self.checkpoint.path.is_file():
            self.best.forget_others(None)

    def resume(self) -> None:
        found = None if self.checkpoint is None else self.checkpoint.load()
        if found is None:
            return
        self.state.load_tensors(found.tensors)
        curve = [EpochRecord(**record) for record in found.course.pop("curve")]
        self.course = _Course(**found.course, curve=curve)
        if self.course.heldout_loss is not None and not self.course.finished:
            self.best.find(self.course.best_epoch)


class _MetricsFile:
    """JSON lines, one object each."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def open(self, num_bytes: int) -> None:
        """Keep the first `num_bytes`, those that the checkpoint knows of, and append."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            self._file = self._path.open("r+b")
        except OSError as error:
            raise InputError(f"the metrics file {self._path} cannot be written: {error.strerror}") from error
        self._file.truncate(min(num_bytes, self._file.seek(0, 2)))
        self._file.seek(0, 2)

    def write(self, line: Mapping[str, float | None]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")

    def flush(self) -> int:
        """Bytes written so far."""
        if self._file is None:
            return 0
        self._file.flush()
        return self._file.tell()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
