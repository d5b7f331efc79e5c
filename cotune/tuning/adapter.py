"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751), a baseline: it needs the backbone in the training process.

Loss, loop and batches are those of LoRA in `cotune.tuning.lora`; peft 0.21 has no such adapter, ours is
`cotune.models.bottleneck`. The frozen backbone carries it only while it trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cotune.data.batches import EncodedExample
from cotune.models.adapters import check_inner_width
from cotune.models.backbone import Backbone
from cotune.models.bottleneck import BottleneckAdapter, check_width
from cotune.tuning.attached import AttachedTuner, check_attached, tune_attached
from cotune.tuning.loop import EpochRecord, LoopConfig, LoopProgress


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """How to train a bottleneck adapter."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=3, learning_rate=1e-3))
    """Epochs, time and learning rate."""
    width: int = 16
    """Of each bottleneck; `width_for_budget` gives one for a number of parameters."""
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
        check_width(self.width)
        check_attached(self)


@dataclass(frozen=True, kw_only=True)
class Bottlenecks:
    """Bottlenecks behind attention and feed-forward of every layer."""

    width: int = 16
    """Of each bottleneck."""

    def __post_init__(self) -> None:
        check_width(self.width)

    def fresh(self, backbone: Backbone, examples: Sequence[EncodedExample], *, seed: int) -> BottleneckAdapter:
        """They change no logit.

        Raises:
            InputError: an impossible width, or an architecture without the two halves.
        """
        check_inner_width(backbone.model, "width", self.width)
        return BottleneckAdapter.fresh(backbone.model, self.width, seed=seed)


class AdapterTuner(AttachedTuner):
    """Descent with the bottlenecks' tensors as parameters; see `AttachedTuner`."""


@dataclass(frozen=True, kw_only=True)
class AdapterResult:
    """A trained adapter.

    Attributes:
        adapter: attach it to the backbone's model to generate with it or to judge it, see `BottleneckAdapter.attach`.
        config: as it was trained.
        curve: losses by epoch; epoch 0 is the base model.
        best_epoch: the epoch whose parameters `adapter` has.
    """

    adapter: BottleneckAdapter
    config: AdapterConfig
    curve: list[EpochRecord]
    best_epoch: int


def tune_adapter(
    backbone: Backbone,
    examples: Sequence[EncodedExample],
    config: AdapterConfig,
    *,
    heldout: Sequence[EncodedExample] = (),
    run_dir: Path | None = None,
    resume: bool = False,
    progress: Callable[[LoopProgress], None] | None = None,
) -> AdapterResult:
    """Train a bottleneck adapter on a backbone in this process; the backbone is as before afterwards.

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
        >>> result = tune_adapter(backbone, examples, AdapterConfig())  # doctest: +SKIP
        >>> with result.adapter.attach(backbone.model):  # doctest: +SKIP
        ...     generation = generate(backbone, None, request)
    """
    fresh = BottleneckAdapter.fresh(backbone.model, config.width, seed=config.seed)
    params, result = tune_attached(
        backbone,
        fresh,
        AdapterTuner,
        examples,
        config,
        heldout=heldout,
        run_dir=run_dir,
        resume=resume,
        progress=progress,
    )
    return AdapterResult(
        adapter=BottleneckAdapter(width=config.width, params=params),
        config=config,
        curve=result.curve,
        best_epoch=result.best_epoch,
    )
