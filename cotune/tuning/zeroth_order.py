"""MeZO / ZO-SGD (Malladi et al., arXiv 2305.17333): tuning in the memory of inference, with forward passes only.

    g_j = (L(theta + eps z_j) - L(theta - eps z_j)) / (2 eps)        Algorithm 1, for each of q directions
    theta <- (1 - lr wd) theta - lr / q sum_j g_j z_j                or momentum, or Adam: `cotune.tuning.seed_updates`

Symbols: eps is `zo_eps`, q `num_directions`; z_j comes from its seed whenever it is needed. Deviations: z has signs
and no Gaussian numbers (`cotune.tuning.directions`), so that all devices agree on it; theta is not walked to and fro
but left alone between updates (`cotune.tuning.perturbed`), so that it is exact in every number type, in three sweeps
instead of four. No dropout, as published. MeZO took 20,000 steps at a constant learning rate; the loop has a cosine.

Learning rates of the paper, for OPT-13B: all parameters 1e-7 to 1e-6 with eps 1e-3, LoRA 5e-5 to 1e-4 with eps 1e-2.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cotune.data.batches import EncodedExample
from cotune.errors import InputError, NonFiniteLossError
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import TokenBatches, digest_examples
from cotune.tuning.attached import Attachable
from cotune.tuning.directions import Direction, direction_seed
from cotune.tuning.in_place import InPlaceState, InPlaceTuner, Slope, tune_in_place
from cotune.tuning.loop import EpochRecord, LoopConfig, LoopProgress, LoopResult
from cotune.tuning.objectives import AnswerNats, ExampleBatches, ExampleLosses, Objective, Score
from cotune.tuning.perturbed import representable
from cotune.tuning.seed_updates import PlainDescent, UpdateRule
from cotune.tuning.sparse_mask import SparseMask
from cotune.tuning.tuner import Batches, BatchT, Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ZerothOrderConfig:
    """How to tune with forward passes only."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=20, learning_rate=1e-4))
    """Epochs, time and learning rate."""
    zo_eps: float = 1e-3
    """Distance that parameters are moved to either side; rounded to 8 significant bits, which every type has."""
    num_directions: int = 1
    """Directions in one step; each costs two forward passes."""
    rule: UpdateRule = field(default_factory=PlainDescent)
    """What a step makes of its slopes and of those before."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices; norms and biases do not decay."""
    num_batch_sequences: int = 16
    """Sequences in one step."""
    seed: int = 0
    """Of the directions and the order of sequences."""

    def __post_init__(self) -> None:
        check_zeroth_order(self.zo_eps, self.seed)
        if self.num_directions < 1:
            raise InputError(f"num_directions is {self.num_directions}, expected at least 1")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight_decay is {self.weight_decay}, expected 0 or more")
        if self.num_batch_sequences < 1:
            raise InputError(f"num_batch_sequences is {self.num_batch_sequences}, expected at least 1")


def check_zeroth_order(zo_eps: float, seed: int) -> None:
    """Refuse settings of finite differences that make no sense.

    Raises:
        InputError: one is out of range.
    """
    if not 1e-6 <= zo_eps <= 1e3:
        raise InputError(f"zo_eps is {zo_eps}, expected 1e-6 to 1e3; 1e-3 is usual")
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class DirectionalDifference:
    """Two losses, on either side of the parameters."""

    plus: ExampleLosses
    minus: ExampleLosses
    zo_eps: float

    @property
    def loss(self) -> float:
        """Mean of both sides: the loss at theta, up to terms in eps^2."""
        return (self.plus.mean + self.minus.mean) / 2

    @property
    def projected_grad(self) -> float:
        """Slope of the batch's loss along z."""
        return (self.plus.mean - self.minus.mean) / (2 * self.zo_eps)

    def slopes(self) -> Tensor:
        """Slope of each example's own mean loss along z, float64 (examples,)."""
        return (self.plus.per_example() - self.minus.per_example()) / (2 * self.zo_eps)


@torch.no_grad()
def measure_along(
    tuner: InPlaceTuner[BatchT], state: InPlaceState, batch: BatchT, direction: Direction, *, zo_eps: float
) -> DirectionalDifference:
    """Two forward passes, at theta + eps z and theta - eps z; theta stays as it is.

    Raises:
        NonFiniteLossError: a loss is nan or inf.
    """
    sides, zo_eps = [], representable(zo_eps)
    for eps in (zo_eps, -zo_eps):
        with state.numbers.moved(direction, eps) as params:
            losses = tuner.objective(tuner.model, params, batch)
        if not math.isfinite(losses.mean):
            raise NonFiniteLossError(state.num_steps, losses.mean)
        sides.append(losses)
    return DirectionalDifference(plus=sides[0], minus=sides[1], zo_eps=zo_eps)


class ZerothOrderTuner(InPlaceTuner[BatchT]):
    """Descent along random directions; a step changes the model's own parameters.

    Args:
        model: with an adapter attached, or as it is.
        config: how to tune.
        objective: what to lower; `AnswerNats` for batches of answers.
        mask: of the tuned numbers; None tunes all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: ZerothOrderConfig,
        objective: Objective[BatchT],
        *,
        mask: SparseMask | None = None,
    ) -> None:
        super().__init__(model, objective, mask)
        self._config = config

    @torch.no_grad()
    def step(self, state: InPlaceState, batch: BatchT) -> tuple[InPlaceState, Metrics]:
        """2 q forward passes and one update; reports `loss` and `projected_grad`, the mean size of the slopes."""
        config, measured, loss = self._config, [], 0.0
        for index in range(config.num_directions):
            direction = state.numbers.direction(direction_seed(config.seed, state.num_steps, index))
            difference = measure_along(self, state, batch, direction, zo_eps=config.zo_eps)
            measured.append(Slope(state.num_steps, direction.seed, difference.projected_grad))
            loss += difference.loss / config.num_directions
        # Steps follow each other, so their numbers tell which are in the window.
        slopes = [slope for slope in state.slopes if slope.step > state.num_steps - config.rule.window] + measured
        config.rule.apply(state.numbers, slopes, learning_rate=state.learning_rate, weight_decay=config.weight_decay)
        state.slopes = slopes if config.rule.window > 1 else []
        state.num_steps += 1
        size = sum(abs(slope.value) for slope in measured) / len(measured)
        return state, {"loss": loss, "projected_grad": size}


@dataclass(frozen=True, kw_only=True)
class ZerothOrderResult:
    """What was learnt.

    Attributes:
        params: the trained tensors, on the CPU, by the names of what was tuned.
        config: as they were trained.
        curve: losses by epoch; epoch 0 is before training.
        best_epoch: the epoch whose parameters `params` has.
    """

    params: dict[str, Tensor]
    config: ZerothOrderConfig
    curve: list[EpochRecord]
    best_epoch: int


def tune_zeroth_order(
    backbone: Backbone,
    fresh: Attachable,
    examples: Sequence[EncodedExample],
    config: ZerothOrderConfig,
    *,
    mask: SparseMask | None = None,
    score: Score[Any] | None = None,
    heldout: Sequence[EncodedExample] = (),
    run_dir: Path | None = None,
    resume: bool = False,
    progress: Callable[[LoopProgress], None] | None = None,
) -> ZerothOrderResult:
    """Tune anything that attaches to a model, on answers; the backbone is as before afterwards.

    For other objectives, such as `ChoiceNats`, call `tune_in_place` with a `ZerothOrderTuner`.

    Args:
        backbone: of any architecture; serves nobody else meanwhile.
        fresh: what to tune: an adapter, or parameters of the model itself.
        examples: token ids and where the targets begin.
        config: how to tune.
        mask: of the tuned numbers; None tunes all.
        score: of greedy answers or of the choice of a label word, raised instead of the answers' likelihood; losses are
            1 - score. None: nats per token.
        heldout: examples to judge each epoch by; the best epoch wins, and a copy of its parameters is kept. Empty: the
            last one does, and there is no copy.
        run_dir: for metrics and checkpoints.
        resume: go on from the checkpoint in `run_dir`, if there is one.
        progress: called after each step.

    Raises:
        InputError: nothing to train on, or a batch without a target.
        NonFiniteLossError: a loss is nan or inf; the parameters are as before the step.

    Example:
        >>> fresh = LoraAdapter.fresh(backbone.model, LoraShape())  # doctest: +SKIP
        >>> result = tune_zeroth_order(backbone, fresh, examples, ZerothOrderConfig())  # doctest: +SKIP
        >>> tuned = replace(fresh, params=result.params)  # doctest: +SKIP
    """
    size, pad_token_id = config.num_batch_sequences, backbone.spec.pad_token_id
    about = (
        config,
        mask and mask.digest(),
        score,
        backbone.spec.backbone_digest,
        digest_examples(examples, heldout),
    )

    def tune_on(
        objective: Objective[BatchT], batches: Batches[BatchT], judged: Batches[BatchT] | None
    ) -> tuple[dict[str, Tensor], LoopResult[InPlaceState]]:
        def make_tuner(model: PreTrainedModel) -> ZerothOrderTuner[BatchT]:
            return ZerothOrderTuner(model, config, objective, mask=mask)

        return tune_in_place(
            backbone.model,
            fresh,
            make_tuner,
            batches,
            config.loop,
            heldout=judged,
            fingerprint=hashlib.sha256(repr(about).encode()).hexdigest(),
            run_dir=run_dir,
            resume=resume,
            progress=progress,
        )

    if score is None:
        params, result = tune_on(
            AnswerNats(),
            TokenBatches(examples, size, pad_token_id=pad_token_id, seed=config.seed),
            TokenBatches(heldout, size, pad_token_id=pad_token_id, seed=0) if heldout else None,
        )
    else:
        errors, collate = score.prepare(backbone, [*examples, *heldout])
        params, result = tune_on(
            errors,
            ExampleBatches(examples, size, collate, seed=config.seed),
            ExampleBatches(heldout, size, collate, seed=0) if heldout else None,
        )
    return ZerothOrderResult(params=params, config=config, curve=result.curve, best_epoch=result.best_epoch)
