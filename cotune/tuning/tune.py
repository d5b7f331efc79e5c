"""Tuning on one device: what is tuned and how it is updated are chosen apart from each other, and the loop is the same.

What: an `Adaptation`, one file for each method (`lora.py`, `full.py`, `soft_prompt.py`, ...), all in the table of
`cotune.tuning.adaptations`. How: an `Estimator`, back-propagation unless another is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cotune.data.batches import EncodedExample
from cotune.models.backbone import Backbone
from cotune.tuning.attached import Tunable, check_attached
from cotune.tuning.estimators import BackPropagation, Estimator
from cotune.tuning.loop import EpochRecord, LoopConfig, LoopProgress
from cotune.tuning.privacy_account import PrivacyAccount


class Adaptation(Protocol):
    """What is tuned: a frozen description whose `repr` tells it from any other."""

    def fresh(self, backbone: Backbone, examples: Sequence[EncodedExample], *, seed: int) -> Tunable:
        """What to start from; the backbone is as before afterwards.

        Args:
            backbone: to adapt.
            examples: training texts, for those that look at them first.
            seed: of what is random.

        Raises:
            InputError: it does not go with this model or these texts.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What to tune, and how long."""

    what: Adaptation
    """The parameters that change."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=3, learning_rate=1e-3))
    """Epochs, time and learning rate."""
    num_batch_sequences: int = 8
    """Sequences in one step."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    max_grad_norm: float = 1.0
    """Total norm that a step's gradient is clipped to."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping what is inside it."""
    seed: int = 0
    """Of the start and the order of sequences."""

    def __post_init__(self) -> None:
        check_attached(self)


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What was trained, and how it went.

    Attributes:
        adapter: attach it to the backbone's model, save it, and merge it where that makes sense.
        config: as it was trained.
        num_trained: numbers that were trained.
        curve: losses by epoch; epoch 0 is the start, in most methods the base model.
        best_epoch: the epoch whose parameters `adapter` has.
        account: what was spent of privacy; None where nothing is promised.
    """

    adapter: Tunable
    config: TuneConfig
    num_trained: int
    curve: list[EpochRecord]
    best_epoch: int
    account: PrivacyAccount | None = None


def tune(
    backbone: Backbone,
    examples: Sequence[EncodedExample],
    config: TuneConfig,
    *,
    estimator: Estimator | None = None,
    heldout: Sequence[EncodedExample] = (),
    run_dir: Path | None = None,
    resume: bool = False,
    progress: Callable[[LoopProgress], None] | None = None,
) -> TuneResult:
    """Tune on a backbone in this process; the backbone is as before afterwards.

    Args:
        backbone: serves nobody else meanwhile.
        examples: token ids and where the targets begin.
        config: what to tune, and how long.
        estimator: how the parameters are updated; None for back-propagation.
        heldout: examples to judge each epoch by; the best epoch wins. Empty: the last one does.
        run_dir: for metrics and checkpoints.
        resume: go on from the checkpoint in `run_dir`, if there is one.
        progress: called after each step.

    Raises:
        InputError: nothing to train on, or what is tuned does not go with the model or the texts.
        NonFiniteLossError: a loss is nan or inf.

    Example:
        >>> result = tune(backbone, examples, TuneConfig(what=SoftPrompt()))  # doctest: +SKIP
        >>> result.adapter.save(Path("my-prompt"), backbone.model)  # doctest: +SKIP
    """
    fresh = config.what.fresh(backbone, examples, seed=config.seed)
    update = BackPropagation() if estimator is None else estimator
    updated = update(
        backbone, fresh, examples, config, heldout=heldout, run_dir=run_dir, resume=resume, progress=progress
    )
    return TuneResult(
        adapter=fresh.trained(updated.params),
        config=config,
        num_trained=fresh.num_parameters,
        curve=updated.curve,
        best_epoch=updated.best_epoch,
        account=updated.account,
    )
