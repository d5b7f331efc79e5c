"""LoRA (Hu et al., arXiv 2106.09685) through peft, with DoRA and rsLoRA as shapes of it; it needs the backbone here.

The loss is that of the side network, -log p(target) over answer tokens only, in the same loop; logits are computed
at target positions alone. The frozen backbone carries the adapter only while it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.models.adapters import LoraAdapter, LoraShape, check_inner_width
from cotune.models.backbone import Backbone
from cotune.tuning.attached import AttachedTuner, Tunable, check_attached, tune_attached
from cotune.tuning.loop import EpochRecord, LoopConfig, LoopProgress
from cotune.tuning.lora_init import initial_lora
from cotune.wire.features import FeatureSource


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """How to train a LoRA adapter."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=3, learning_rate=1e-3))
    """Epochs, time and learning rate."""
    shape: LoraShape = field(default_factory=LoraShape)
    """Rank, strength and adapted layers; `rank_for_budget` gives a rank for a number of parameters."""
    num_batch_sequences: int = 8
    """Sequences in one step."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay of the adapter."""
    max_grad_norm: float = 1.0
    """Total norm that a step's gradient is clipped to."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping what is inside it."""
    seed: int = 0
    """Of the initial adapter and the order of sequences."""

    def __post_init__(self) -> None:
        check_attached(self)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA and how it starts."""

    shape: LoraShape = field(default_factory=LoraShape)
    """Rank, strength and adapted layers."""
    init: str = "default"
    """A name in `cotune.tuning.lora_init.INITS`."""

    def fresh(self, backbone: Backbone, examples: Sequence[EncodedExample], *, seed: int) -> Tunable:
        """See `initial_lora`.

        Raises:
            InputError: an unknown start, or one that does not go with the shape, the model or the texts.
        """
        check_inner_width(backbone.model, "rank", self.shape.rank)
        return initial_lora(backbone, self.shape, self.init, examples, seed=seed)


class LoraTuner(AttachedTuner):
    """Descent with the LoRA's tensors as parameters; see `AttachedTuner`."""


@dataclass(frozen=True, kw_only=True)
class LoraResult:
    """A trained adapter.

    Attributes:
        adapter: attach it to the backbone's model to generate with it or to judge it, see `LoraAdapter.attach`.
        config: as it was trained.
        curve: losses by epoch; epoch 0 is the base model.
        best_epoch: the epoch whose parameters `adapter` has.
    """

    adapter: LoraAdapter
    config: LoraConfig
    curve: list[EpochRecord]
    best_epoch: int


def tune_lora(
    backbone: Backbone,
    examples: Sequence[EncodedExample],
    config: LoraConfig,
    *,
    heldout: Sequence[EncodedExample] = (),
    run_dir: Path | None = None,
    resume: bool = False,
    progress: Callable[[LoopProgress], None] | None = None,
) -> LoraResult:
    """Train a LoRA adapter on a backbone in this process; the backbone is as before afterwards.

    Args:
        backbone: of any architecture; serves nobody else meanwhile.
        examples: token ids and where the targets begin.
        config: how to train.
        heldout: examples to judge each epoch by; the best epoch wins. Empty: the last one does.
        run_dir: for metrics and checkpoints.
        resume: go on from the checkpoint in `run_dir`, if there is one.
        progress: called after each step.

    Raises:
        InputError: nothing to train on.
        NonFiniteLossError: a loss is nan or inf.

    Example:
        >>> result = tune_lora(backbone, examples, LoraConfig())  # doctest: +SKIP
        >>> with result.adapter.attach(backbone.model):  # doctest: +SKIP
        ...     generation = generate(backbone, None, request)
    """
    fresh = LoraAdapter.fresh(backbone.model, config.shape, seed=config.seed)
    params, result = tune_attached(
        backbone,
        fresh,
        LoraTuner,
        examples,
        config,
        heldout=heldout,
        run_dir=run_dir,
        resume=resume,
        progress=progress,
    )
    return LoraResult(
        adapter=LoraAdapter(shape=config.shape, params=params),
        config=config,
        curve=result.curve,
        best_epoch=result.best_epoch,
    )


def target_nats(source: FeatureSource, examples: Sequence[EncodedExample]) -> NDArray[np.float32]:
    """-log p(target) of every target position under the source's own model, exact, float32 (positions,).

    Perplexity is exp of the mean. With an adapter attached to a backbone's model it is the adapted model's.
    """
    if not examples:
        raise InputError("there are no examples, expected at least one")
    features = [source.features(example.input_ids, example.first_target, 1) for example in examples]
    return np.concatenate([each.log_normalizer - each.target_logits for each in features])
