"""LoRA (Hu et al., arXiv 2106.09685) through peft, the baseline: it needs the backbone in the training process.

The loss is that of the side network, -log p(target) over answer tokens only, in the same loop; logits are computed
at target positions alone. The frozen backbone carries the adapter only while it trains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.data.batches import EncodedExample, TokenBatch
from cotune.errors import InputError
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import TokenBatches, answer_nats, digest_examples
from cotune.tuning.gradient import GradientState
from cotune.tuning.loop import EpochRecord, LoopConfig, LoopProgress, run_loop
from cotune.tuning.tuner import Metrics, Params
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
    seed: int = 0
    """Of the initial adapter and the order of sequences."""

    def __post_init__(self) -> None:
        if self.num_batch_sequences < 1:
            raise InputError(f"num_batch_sequences is {self.num_batch_sequences}, expected at least 1")
        if not self.weight_decay >= 0:
            raise InputError(f"weight_decay is {self.weight_decay}, expected 0 or more")
        if not self.max_grad_norm > 0:
            raise InputError(f"max_grad_norm is {self.max_grad_norm}, expected a positive number")


class LoraTuner:
    """Gradient descent on -log p(target) with an adapter's tensors as parameters.

    Args:
        model: with an adapter attached; its own adapter weights are not touched.
        config: weight decay and clipping.
    """

    def __init__(self, model: peft.PeftModel, config: LoraConfig) -> None:
        self._model, self._config = model, config

    def init(self, params: Params) -> GradientState:
        return GradientState.start(params, weight_decay=self._config.weight_decay)

    def step(self, state: GradientState, batch: TokenBatch) -> tuple[GradientState, Metrics]:
        loss = self._nats(state.params, batch).mean()
        return state, state.descend(loss, max_grad_norm=self._config.max_grad_norm)

    @torch.no_grad()
    def evaluate(self, state: GradientState, batch: TokenBatch) -> tuple[float, int]:
        nats = self._nats(state.params, batch)
        return float(nats.double().sum()), len(nats)

    def _nats(self, params: dict[str, Tensor], batch: TokenBatch) -> Tensor:
        return answer_nats(self._model, self._model.get_output_embeddings(), params, batch)


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
    size, pad_token_id = config.num_batch_sequences, backbone.spec.pad_token_id
    batches = TokenBatches(examples, size, pad_token_id=pad_token_id, seed=config.seed)
    judges = TokenBatches(heldout, size, pad_token_id=pad_token_id, seed=0) if heldout else None
    adapter = LoraAdapter.fresh(backbone.model, config.shape, seed=config.seed)
    with adapter.attach(backbone.model) as model:
        tuner = LoraTuner(model, config)
        result = run_loop(
            tuner,
            tuner.init({name: tensor.to(model.device) for name, tensor in adapter.params.items()}),
            batches,
            config.loop,
            heldout=judges,
            run_dir=run_dir,
            fingerprint=_fingerprint(backbone, examples, heldout, config),
            resume=resume,
            progress=progress,
        )
    return LoraResult(
        adapter=LoraAdapter(shape=config.shape, params={n: p.detach().cpu() for n, p in result.state.params.items()}),
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


def _fingerprint(
    backbone: Backbone,
    examples: Sequence[EncodedExample],
    heldout: Sequence[EncodedExample],
    config: LoraConfig,
) -> str:
    about = repr((config, backbone.spec.backbone_digest, digest_examples(examples, heldout)))
    return hashlib.sha256(about.encode()).hexdigest()
