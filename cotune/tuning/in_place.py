"""What the forward-only methods share: a state that is the model's own parameters, and the run around it.

A step changes the model, and all else that a state holds is seeds and scalars, a few bytes each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from cotune.errors import InputError
from cotune.tuning.attached import Attachable
from cotune.tuning.loop import LoopConfig, LoopProgress, LoopResult, run_loop
from cotune.tuning.objectives import Objective
from cotune.tuning.own_tensors import own_tensors, own_tensors_restored, taken, write_into
from cotune.tuning.sparse_mask import SparseMask
from cotune.tuning.tuned_numbers import TunedNumbers
from cotune.tuning.tuner import Batches, BatchT, Params, Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARAMETER = "parameter."


class Slope(NamedTuple):
    """One direction and how steep the loss was along it."""

    step: int
    """When it was measured, counted from 0."""
    seed: int
    """Of the direction, below 2^63."""
    value: float
    """Loss per unit step along z."""


def by_step(slopes: Iterable[Slope]) -> list[list[Slope]]:
    """Slopes of each step, in order."""
    return [list(group) for _, group in groupby(slopes, key=lambda slope: slope.step)]


@dataclass
class InPlaceState:
    """A model's tuned numbers and the slopes that a method remembers.

    Two states of the same model are the same parameters: use one at a time.

    Attributes:
        numbers: in the model's own tensors.
        slopes: that later steps need.
        num_steps: steps taken so far.
        learning_rate: of the next step.
    """

    numbers: TunedNumbers
    slopes: list[Slope] = field(default_factory=list)
    num_steps: int = 0
    learning_rate: float = 0.0

    @classmethod
    def start(cls, model: PreTrainedModel, params: Params, mask: SparseMask | None) -> InPlaceState:
        """Write `params` into the model and begin without slopes.

        Raises:
            InputError: the model lacks one of them, or the mask does not fit.
        """
        state = cls(numbers=TunedNumbers(own_tensors(model, params), mask))
        state.load_params(params)
        return state

    @property
    def params(self) -> dict[str, Tensor]:
        """The model's own tensors, not copies."""
        return self.numbers.params

    def to_tensors(self) -> dict[str, Tensor]:
        """Parameters under `parameter.NAME`, and the slopes as `slope_steps`, `slope_seeds` and `slope_values`."""
        return {
            "num_steps": torch.tensor(self.num_steps),
            "slope_steps": torch.tensor([slope.step for slope in self.slopes], dtype=torch.int64),
            "slope_seeds": torch.tensor([slope.seed for slope in self.slopes], dtype=torch.int64),
            "slope_values": torch.tensor([slope.value for slope in self.slopes], dtype=torch.float64),
            **{PARAMETER + name: tensor for name, tensor in self.params.items()},
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `to_tensors` gave."""
        if tensors.keys() != self.to_tensors().keys():
            raise InputError("the checkpoint holds other parameters than this method trains; start without resuming")
        self.load_params({name: tensors[PARAMETER + name] for name in self.params})
        self.num_steps = int(tensors["num_steps"])
        parts = (tensors[name].tolist() for name in ("slope_steps", "slope_seeds", "slope_values"))
        self.slopes = [Slope(*slope) for slope in zip(*parts, strict=True)]

    def load_params(self, params: Params) -> None:
        """Take over parameters alone; the slopes stay."""
        write_into(self.params, params)


InPlaceT = TypeVar("InPlaceT", bound=InPlaceState)


class InPlaceTuner(Generic[BatchT]):
    """The half of a `Tuner` that all forward-only methods have.

    Args:
        model: with an adapter attached, or as it is; its own parameters are changed.
        objective: what to lower.
        mask: of the tuned numbers; None tunes all.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective[BatchT], mask: SparseMask | None) -> None:
        self.model, self.objective, self.mask = model, objective, mask

    def init(self, params: Params) -> InPlaceState:
        """Write `params` into the model, which the state then is; `params` stay as they are."""
        return InPlaceState.start(self.model, params, self.mask)

    @torch.no_grad()
    def evaluate(self, state: InPlaceState, batch: BatchT) -> tuple[float, int]:
        """Loss of a batch without learning from it: its sum, and the number of its terms."""
        losses = self.objective(self.model, state.params, batch)
        return float(losses.sums.sum()), int(losses.counts.sum())


def tune_in_place(
    model: PreTrainedModel,
    fresh: Attachable,
    make_tuner: Callable[[PreTrainedModel], Tuner[InPlaceT, BatchT]],
    batches: Batches[BatchT],
    loop: LoopConfig,
    *,
    fingerprint: str,
    heldout: Batches[BatchT] | None = None,
    run_dir: Path | None = None,
    resume: bool = False,
    progress: Callable[[LoopProgress], None] | None = None,
) -> tuple[dict[str, Tensor], LoopResult[InPlaceT]]:
    """Attach, train in place, and take what was learnt; the model is as before afterwards, also on error.

    Where `fresh` has no copy of its own, as parameters of the model itself, what they were waits on disk meanwhile.

    Args:
        model: serves nobody else meanwhile.
        fresh: what to tune.
        make_tuner: of the method, for the model with `fresh` attached.
        batches, heldout: to train on, and to judge each epoch by. With `heldout` and without `run_dir` the loop keeps
            a copy of the best parameters in memory.
        loop: how long, and with which learning rates.
        fingerprint: names the config and the data; a checkpoint with another one is not resumed.
        run_dir: for metrics and checkpoints.
        resume: go on from the checkpoint in `run_dir`, if there is one.
        progress: called after each step.

    Returns:
        The trained tensors on the CPU, and how the loop went.

    Raises:
        InputError: nothing to train on, or a batch without a target.
        NonFiniteLossError: a loss is nan or inf.
    """
    with fresh.attach(model) as attached, own_tensors_restored(attached, fresh.params, run_dir):
        tuner = make_tuner(attached)
        result = run_loop(
            tuner,
            tuner.init(fresh.params),
            batches,
            loop,
            heldout=heldout,
            run_dir=run_dir,
            fingerprint=fingerprint,
            resume=resume,
            progress=progress,
        )
        return taken(result.state.params), result
