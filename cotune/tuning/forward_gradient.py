"""Forward gradients (FwdLLM, Xu et al., USENIX ATC 2024): no step before enough random directions agree.

    g_j = (L(theta + eps z_j) - L(theta - eps z_j)) / (2 eps)     the directional derivative, or exactly, forward-mode
    G_A, G_B = means of g_j z_j over the first and the second half of the directions that wait
    variance = mean over all tuned numbers of (G_A - G_B)^2 / 2
    theta <- theta - lr mean_j g_j z_j        when variance <= max_variance; else they go on waiting

Each batch adds `num_perturbations` directions. Random directions hardly overlap, so the variance falls as the squared
gradient over the number of directions: flat regions pass the gate at once, steep ones wait. Deviations: FwdLLM looks at
one layer that is written into its code for each model; here it is all that is tuned. It draws Gaussian directions and
uploads whole gradients; here a direction is a sign pattern from a seed, and what waits is seeds and scalars. Its choice
among ten candidates for each direction is left out: it holds ten copies of the tuned numbers.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cotune.data.batches import EncodedExample, TokenBatch
from cotune.errors import InputError, NonFiniteLossError
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import TokenBatches, digest_examples
from cotune.tuning.attached import Attachable
from cotune.tuning.directions import Direction, direction_seed
from cotune.tuning.in_place import InPlaceState, InPlaceTuner, Slope, tune_in_place
from cotune.tuning.loop import EpochRecord, LoopConfig, LoopProgress
from cotune.tuning.objectives import AnswerNats, Objective
from cotune.tuning.sparse_mask import SparseMask
from cotune.tuning.tuned_numbers import TunedNumbers
from cotune.tuning.tuner import BatchT, Metrics
from cotune.tuning.zeroth_order import check_zeroth_order, measure_along

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ForwardGradientConfig:
    """How to tune with forward gradients."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=20, learning_rate=1e-2))
    """Epochs, time and learning rate."""
    zo_eps: float = 1e-2
    """Distance that parameters are moved to either side; rounded to 8 significant bits. Not used by forward-mode."""
    num_perturbations: int = 4
    """Directions that each batch adds, at least 2."""
    max_variance: float = 0.1
    """The gate: largest variance of a step, (nats per token and unit of a parameter)^2. FwdLLM: 0.1 to 0.2."""
    max_perturbations: int = 64
    """Directions after which a step is taken all the same, so that none is waited for without end."""
    forward_mode: bool = False
    """Exact derivatives by torch.func.jvp, in one pass. It needs a tangent of every tuned tensor and every activation,
    and forward derivatives of all of the model's operations."""
    num_batch_sequences: int = 8
    """Sequences in one batch."""
    seed: int = 0
    """Of the directions and the order of sequences."""

    def __post_init__(self) -> None:
        check_zeroth_order(self.zo_eps, self.seed)
        if self.num_perturbations < 2:
            raise InputError(f"num_perturbations is {self.num_perturbations}, expected at least 2, one for each half")
        if self.max_perturbations < self.num_perturbations:
            raise InputError(
                f"max_perturbations is {self.max_perturbations}, expected at least num_perturbations, "
                f"{self.num_perturbations}"
            )
        if not self.max_variance > 0:
            raise InputError(f"max_variance is {self.max_variance}, expected a positive number; inf opens the gate")
        if self.num_batch_sequences < 1:
            raise InputError(f"num_batch_sequences is {self.num_batch_sequences}, expected at least 1")


def variance_of_halves(numbers: TunedNumbers, slopes: Sequence[Slope]) -> float:
    """How far the forward gradients of both halves are apart, see this module's head.

    Args:
        numbers: that the directions are over.
        slopes: at least 2; the first half and the rest.
    """
    half = len(slopes) // 2
    weights = [
        slope.value / half if i < half else -slope.value / (len(slopes) - half) for i, slope in enumerate(slopes)
    ]
    directions = [numbers.direction(slope.seed, num_pages=1) for slope in slopes]
    total = sum(float((block.combine(directions, weights).double() ** 2).sum()) for block in numbers.blocks())
    return total / (2 * numbers.num_numbers)


def differentiate_forward(
    tuner: InPlaceTuner[BatchT], state: InPlaceState, batch: BatchT, direction: Direction
) -> tuple[float, float]:
    """Loss, and its exact derivative along a direction, by one forward pass with tangents.

    Raises:
        InputError: an operation of the model has no forward derivative.
        NonFiniteLossError: the loss or the derivative is nan or inf.
    """
    tangents = {name: torch.zeros_like(tensor) for name, tensor in state.params.items()}
    for block, tangent in zip(state.numbers.blocks(), TunedNumbers(tangents, tuner.mask).blocks(), strict=True):
        tangent.write(block.signs(direction, block.flat.dtype))

    def loss_of(params: dict[str, Tensor]) -> Tensor:
        losses = tuner.objective(tuner.model, params, batch)
        return losses.sums.sum() / losses.counts.sum()

    try:
        # The other kernels of attention have no forward derivative.
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # PyTorch's own rules of differentiation use what it deprecates.
            warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)
            pair = torch.func.jvp(loss_of, (dict(state.params),), (tangents,))
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"forward_mode is True, but {type(tuner.model).__name__} has an operation without forward derivative "
            f"({str(error).splitlines()[0][:200]}); take forward_mode False, which needs two passes and no derivative"
        ) from error
    loss, derivative = (float(value) for value in pair)
    if not (math.isfinite(loss) and math.isfinite(derivative)):
        raise NonFiniteLossError(state.num_steps, loss if not math.isfinite(loss) else derivative)
    return loss, derivative


class ForwardGradientTuner(InPlaceTuner[BatchT]):
    """Descent along means of forward gradients; a step changes the model's own parameters.

    Args:
        model: with an adapter attached, or as it is.
        config: how to tune.
        objective: what to lower; differentiable for `forward_mode`.
        mask: of the tuned numbers; None tunes all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: ForwardGradientConfig,
        objective: Objective[BatchT],
        *,
        mask: SparseMask | None = None,
    ) -> None:
        super().__init__(model, objective, mask)
        self._config = config

    @torch.no_grad()
    def step(self, state: InPlaceState, batch: BatchT) -> tuple[InPlaceState, Metrics]:
        """More directions, and a step if the gate is open.

        Reports `loss`, `variance`, `num_perturbations` that waited, and `stepped`, 1 or 0.
        """
        config, added, loss = self._config, [], 0.0
        for index in range(config.num_perturbations):
            direction = state.numbers.direction(direction_seed(config.seed, state.num_steps, index))
            each_loss, slope = self._slope(state, batch, direction)
            added.append(Slope(state.num_steps, direction.seed, slope))
            loss += each_loss / config.num_perturbations
        slopes = [*state.slopes, *added]
        variance = variance_of_halves(state.numbers, slopes)
        is_open = variance <= config.max_variance or len(slopes) >= config.max_perturbations
        if is_open:
            state.numbers.add(
                [state.numbers.direction(slope.seed, num_pages=1) for slope in slopes],
                [-state.learning_rate * slope.value / len(slopes) for slope in slopes],
            )
        state.slopes = [] if is_open else slopes
        state.num_steps += 1
        return state, {
            "loss": loss,
            "variance": variance,
            "num_perturbations": float(len(slopes)),
            "stepped": float(is_open),
        }

    def _slope(self, state: InPlaceState, batch: BatchT, direction: Direction) -> tuple[float, float]:
        if self._config.forward_mode:
            return differentiate_forward(self, state, batch, direction)
        difference = measure_along(self, state, batch, direction, zo_eps=self._config.zo_eps)
        return difference.loss, difference.projected_grad


@dataclass(frozen=True, kw_only=True)
class ForwardGradientResult:
    """What was learnt.

    Attributes:
        params: the trained tensors, on the CPU, by the names of what was tuned.
        config: as they were trained.
        curve: losses by epoch; epoch 0 is before training.
        best_epoch: the epoch whose parameters `params` has.
    """

    params: dict[str, Tensor]
    config: ForwardGradientConfig
    curve: list[EpochRecord]
    best_epoch: int


def tune_forward_gradient(
    backbone: Backbone,
    fresh: Attachable,
    examples: Sequence[EncodedExample],
    config: ForwardGradientConfig,
    *,
    mask: SparseMask | None = None,
    heldout: Sequence[EncodedExample] = (),
    run_dir: Path | None = None,
    resume: bool = False,
    progress: Callable[[LoopProgress], None] | None = None,
) -> ForwardGradientResult:
    """Tune anything that attaches to a model, on answers; the backbone is as before afterwards.

    Arguments, errors and the use of other objectives as in `cotune.tuning.zeroth_order.tune_zeroth_order`.

    Example:
        >>> fresh = BottleneckAdapter.fresh(backbone.model, 16)  # doctest: +SKIP
        >>> result = tune_forward_gradient(backbone, fresh, examples, ForwardGradientConfig())  # doctest: +SKIP
    """
    size, pad_token_id = config.num_batch_sequences, backbone.spec.pad_token_id
    about = (config, mask and mask.digest(), backbone.spec.backbone_digest, digest_examples(examples, heldout))

    def make_tuner(model: PreTrainedModel) -> ForwardGradientTuner[TokenBatch]:
        return ForwardGradientTuner(model, config, AnswerNats(), mask=mask)

    params, result = tune_in_place(
        backbone.model,
        fresh,
        make_tuner,
        TokenBatches(examples, size, pad_token_id=pad_token_id, seed=config.seed),
        config.loop,
        heldout=TokenBatches(heldout, size, pad_token_id=pad_token_id, seed=0) if heldout else None,
        fingerprint=hashlib.sha256(repr(about).encode()).hexdigest(),
        run_dir=run_dir,
        resume=resume,
        progress=progress,
    )
    return ForwardGradientResult(params=params, config=config, curve=result.curve, best_epoch=result.best_epoch)
