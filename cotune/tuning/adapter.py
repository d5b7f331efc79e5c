"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751), a baseline: it needs the backbone in the training process.

Loss, loop and batches are those of LoRA in `cotune.tuning.lora`; peft 0.21 has no such adapter, ours is
`cotune.models.bottleneck`. The frozen backbone carries it only while it trains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cotune.data.batches import EncodedExample, TokenBatch
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.models.bottleneck import BottleneckAdapter
from cotune.tuning.answer_loss import TokenBatches, answer_nats, digest_examples
from cotune.tuning.gradient import GradientState
from cotune.tuning.loop import EpochRecord, LoopConfig, LoopProgress, run_loop
from cotune.tuning.tuner import Metrics, Params


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
    seed: int = 0
    """Of the initial adapter and the order of sequences."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"width is {self.width}, expected at least 1")
        if self.num_batch_sequences < 1:
            raise InputError(f"num_batch_sequences is {self.num_batch_sequences}, expected at least 1")
        if not self.weight_decay >= 0:
            raise InputError(f"weight_decay is {self.weight_decay}, expected 0 or more")
        if not self.max_grad_norm > 0:
            raise InputError(f"max_grad_norm is {self.max_grad_norm}, expected a positive number")


class AdapterTuner:
    """Gradient descent on -log p(target) with an adapter's tensors as parameters.

    Args:
        model: with an adapter attached; its own adapter weights are not touched.
        config: weight decay and clipping.
    """

    def __init__(self, model: PreTrainedModel, config: AdapterConfig) -> None:
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
    size, pad_token_id = config.num_batch_sequences, backbone.spec.pad_token_id
    batches = TokenBatches(examples, size, pad_token_id=pad_token_id, seed=config.seed)
    judges = TokenBatches(heldout, size, pad_token_id=pad_token_id, seed=0) if heldout else None
    fresh = BottleneckAdapter.fresh(backbone.model, config.width, seed=config.seed)
    about = repr((config, backbone.spec.backbone_digest, digest_examples(examples, heldout)))
    with fresh.attach(backbone.model) as model:
        tuner = AdapterTuner(model, config)
        result = run_loop(
            tuner,
            tuner.init({name: tensor.to(model.device) for name, tensor in fresh.params.items()}),
            batches,
            config.loop,
            heldout=judges,
            run_dir=run_dir,
            fingerprint=hashlib.sha256(about.encode()).hexdigest(),
            resume=resume,
            progress=progress,
        )
    trained = {name: parameter.detach().cpu() for name, parameter in result.state.params.items()}
    return AdapterResult(
        adapter=BottleneckAdapter(width=config.width, params=trained),
        config=config,
        curve=result.curve,
        best_epoch=result.best_epoch,
    )
