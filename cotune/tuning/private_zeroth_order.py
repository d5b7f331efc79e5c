"""DP-ZO: tuning with forward passes only, and a promise for each text (Tang et al., arXiv 2401.04343).

With l_i the loss of text i, z_1 .. z_K the public directions of a step, B the expected number of texts in it:

    g_ik = (l_i(theta + eps z_k) - l_i(theta - eps z_k)) / (2 eps)
    g_k = 1/B ( sum over sampled i of clip(g_ik, -C, C) + N(0, K (sigma C)^2) )

All that a step tells of the texts is K numbers. Adding or taking away one text changes them by at most sqrt(K) C
together, so a step is a Gaussian mechanism with noise multiplier sigma, like one of DP-SGD (`cotune.tuning.private`):
the same Poisson sampling, the same account. What follows from g_k, momentum and Adam included, costs no privacy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.data.batches import EncodedExample, TokenBatch, pad_batch
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import digest_examples
from cotune.tuning.attached import Attachable
from cotune.tuning.directions import direction_seed
from cotune.tuning.in_place import InPlaceState, InPlaceTuner, Slope, tune_in_place
from cotune.tuning.loop import LoopProgress
from cotune.tuning.objectives import AnswerNats
from cotune.tuning.poisson import NOISE, PoissonBatch, PoissonBatches, SecretSeed, WholeBatches
from cotune.tuning.private import SECRET, PrivateConfig, PrivateResult
from cotune.tuning.sparse_mask import SparseMask
from cotune.tuning.tuner import Metrics, Params
from cotune.tuning.zeroth_order import ZerothOrderConfig, measure_along

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def private_scalars(
    slopes: NDArray[np.float64],
    *,
    clip: float,
    noise_multiplier: float,
    num_expected: float,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """What a step releases: g_k of this module's head, one for each direction.

    A unit is whatever the promise is for: a text, or a device of a federation. Taking one away changes the sums by at
    most sqrt(K) clip together, so that this is a Gaussian mechanism with noise multiplier `noise_multiplier`.

    Args:
        slopes: of each unit along each direction, (units, directions); there may be no unit.
        clip: C, the most that one of them counts for.
        noise_multiplier: sigma.
        num_expected: B, units expected in a step, never the number that came, which is private under Poisson sampling.
        generator: of the noise; a secret.

    Returns:
        (directions,).

    Raises:
        InputError: a slope that is nan, another shape, or a size that is not positive.

    Example:
        >>> slopes = np.array([[0.5], [30.0], [-2.0], [-0.25]])
        >>> quiet = {"clip": 1.0, "noise_multiplier": 0.0, "num_expected": 4}
        >>> private_scalars(slopes, **quiet, generator=np.random.default_rng(0)).tolist()
        [0.0625]
    """
    if slopes.ndim != 2 or slopes.shape[1] < 1 or bool(np.isnan(slopes).any()):
        raise InputError(f"slopes has shape {slopes.shape}, expected (units, directions), at least one, and no nan")
    for name, value in (("clip", clip), ("num_expected", num_expected)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} is {value}, expected a positive number")
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise InputError(f"noise_multiplier is {noise_multiplier}, expected 0 or more")
    num_directions = slopes.shape[1]
    noise = math.sqrt(num_directions) * noise_multiplier * clip * generator.standard_normal(num_directions)
    released: NDArray[np.float64] = (slopes.clip(-clip, clip).sum(0) + noise) / num_expected
    return released


@dataclass
class PrivateInPlaceState(InPlaceState):
    """An `InPlaceState` with the secret that noise and sampling come from."""

    secret: SecretSeed = field(default_factory=SecretSeed.draw)

    def to_tensors(self) -> dict[str, Tensor]:
        """As `InPlaceState.to_tensors`, and `secret_seed`."""
        return {**super().to_tensors(), SECRET: self.secret.to_tensor()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if SECRET not in tensors:
            raise InputError("the checkpoint is of a run without differential privacy; start without resuming")
        super().load_tensors(tensors)
        self.secret.load_tensor(tensors[SECRET])


class PrivateZerothOrderTuner:
    """Descent along random directions by noisy scalars; a step changes the model's own parameters.

    Args:
        model: with an adapter attached, or as it is.
        steps: directions, distance and rule; its loop, batch and weight decay do not count.
        private: clipping, noise, sampling, loop and weight decay.
        secret: shared with the batches, so that sampling resumes with it.
        mask: of the tuned numbers; None tunes all. Not chosen by looking at the private texts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        steps: ZerothOrderConfig,
        private: PrivateConfig,
        secret: SecretSeed,
        *,
        mask: SparseMask | None = None,
    ) -> None:
        self._plain: InPlaceTuner[TokenBatch] = InPlaceTuner(model, AnswerNats(), mask)
        self._steps, self._private, self._secret = steps, private, secret

    def init(self, params: Params) -> PrivateInPlaceState:
        plain = self._plain.init(params)
        return PrivateInPlaceState(numbers=plain.numbers, secret=self._secret)

    @torch.no_grad()
    def step(self, state: PrivateInPlaceState, batch: PoissonBatch[TokenBatch]) -> tuple[PrivateInPlaceState, Metrics]:
        """2 K forward passes over the texts that were drawn. The metrics are computed without noise: not private."""
        steps, private = self._steps, self._private
        seeds = [direction_seed(steps.seed, state.num_steps, index) for index in range(steps.num_directions)]
        losses: list[float] = []
        columns = []
        for seed in seeds:
            direction, column = state.numbers.direction(seed), [np.empty(0)]
            for part in batch.parts:
                difference = measure_along(self._plain, state, part, direction, zo_eps=steps.zo_eps)
                column.append(difference.slopes().cpu().numpy())
                losses.append(difference.loss)
            columns.append(np.concatenate(column))
        slopes = np.stack(columns, axis=1)  # (texts, directions)
        values = private_scalars(
            slopes,
            clip=private.clip,
            noise_multiplier=private.noise_multiplier,
            num_expected=private.num_batch_texts,
            generator=state.secret.generator(NOISE, state.num_steps),
        )
        measured = [Slope(state.num_steps, seed, value) for seed, value in zip(seeds, values.tolist(), strict=True)]
        kept = [slope for slope in state.slopes if slope.step > state.num_steps - steps.rule.window]
        steps.rule.apply(
            state.numbers, kept + measured, learning_rate=state.learning_rate, weight_decay=private.weight_decay
        )
        state.slopes = kept + measured if steps.rule.window > 1 else []
        state.num_steps += 1
        return state, {
            "loss": sum(losses) / len(losses) if losses else 0.0,
            "num_texts": float(len(slopes)),
            "clipped_share": float((np.abs(slopes) > private.clip).mean()) if slopes.size else 0.0,
        }

    @torch.no_grad()
    def evaluate(self, state: PrivateInPlaceState, batch: PoissonBatch[TokenBatch]) -> tuple[float, int]:
        sums = [self._plain.evaluate(state, part) for part in batch.parts]
        return sum(nats for nats, _ in sums), sum(count for _, count in sums)


def tune_private_zeroth_order(
    backbone: Backbone,
    fresh: Attachable,
    examples: Sequence[EncodedExample],
    steps: ZerothOrderConfig,
    private: PrivateConfig,
    *,
    mask: SparseMask | None = None,
    heldout: Sequence[EncodedExample] = (),
    run_dir: Path | None = None,
    resume: bool = False,
    progress: Callable[[LoopProgress], None] | None = None,
) -> PrivateResult:
    """Tune anything that attaches to a model, with differential privacy for each text, in the memory of inference.

    Args:
        backbone: serves nobody else meanwhile; as before afterwards.
        fresh: what to tune, not made by looking at the private texts.
        examples: an example is a text, the unit of privacy.
        steps: directions, distance, rule and the seed of the directions.
        private: clipping (nats per token and unit step along z), noise, sampling and loop, best from `for_budget`.
        mask: of the tuned numbers, not chosen by looking at the private texts.
        heldout: to choose the best epoch by. They should be public: what they decide is not covered.
        run_dir: for metrics and checkpoints; keep it private, it has the secret seed.
        resume: go on from the checkpoint in `run_dir`, if there is one.
        progress: called after each step.

    Raises:
        InputError: nothing to train on, an impossible value, or Opacus is not installed.
        NonFiniteLossError: a loss is nan or inf; the parameters are as before the step.

    Example:
        >>> private = PrivateConfig.for_budget(len(examples), epsilon=8.0)  # doctest: +SKIP
        >>> result = tune_private_zeroth_order(  # doctest: +SKIP
        ...     backbone, fresh, examples, ZerothOrderConfig(), private
        ... )
        >>> print(result.account.summary())  # doctest: +SKIP
    """
    if not examples:
        raise InputError("there are no texts to train on, expected at least one")
    secret = SecretSeed.draw() if private.secret_seed is None else SecretSeed(private.secret_seed)

    def take_from(texts: Sequence[EncodedExample]) -> Callable[[NDArray[np.int64]], TokenBatch]:
        return lambda chosen: pad_batch([texts[index] for index in chosen], backbone.spec.pad_token_id)

    batches = PoissonBatches(
        len(examples),
        sample_rate=private.sample_rate(len(examples)),
        num_part_texts=private.num_part_texts,
        secret=secret,
        take=take_from(examples),
    )
    about = (
        type(fresh).__name__,
        steps,
        private,
        mask and mask.digest(),
        backbone.spec.backbone_digest,
        digest_examples(examples, heldout),
    )
    params, result = tune_in_place(
        backbone.model,
        fresh,
        lambda model: PrivateZerothOrderTuner(model, steps, private, secret, mask=mask),
        batches,
        private.loop,
        heldout=WholeBatches(len(heldout), private.num_part_texts, take_from(heldout)) if heldout else None,
        fingerprint=hashlib.sha256(repr(about).encode()).hexdigest(),
        run_dir=run_dir,
        resume=resume,
        progress=progress,
    )
    return PrivateResult(
        params=params,
        config=private,
        curve=result.curve,
        best_epoch=result.best_epoch,
        account=private.account(len(examples), result.state.num_steps),
    )
