"""Training of what is attached to a frozen backbone in this process: LoRA, soft prompts, the model's own parameters.

They differ in what is attached; loss, batches, descent and checkpoints are the same and are here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from cotune.data.batches import EncodedExample, TokenBatch
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.models.selected import SelectedParameters
from cotune.tuning.answer_loss import TokenBatches, answer_nats, digest_examples
from cotune.tuning.gradient import GradientState, check_descent
from cotune.tuning.gradient_checkpointing import gradient_checkpointing
from cotune.tuning.loop import LoopConfig, LoopProgress, LoopResult, run_loop
from cotune.tuning.own_tensors import own_tensors_restored, taken
from cotune.tuning.tuner import Metrics, Params, StateT, Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AttachedConfig(Protocol):
    """What the configurations of these methods have in common. Their `repr` tells which run a checkpoint is of."""

    @property
    def loop(self) -> LoopConfig: ...

    @property
    def num_batch_sequences(self) -> int: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def max_grad_norm(self) -> float: ...

    @property
    def gradient_checkpointing(self) -> bool: ...

    @property
    def seed(self) -> int: ...


class Attachable(Protocol):
    """An adapter apart from its model."""

    @property
    def params(self) -> Mapping[str, Tensor]:
        """Its tensors, by the names that they have in what `attach` gives."""
        ...

    def attach(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """Inside, the model is the adapted one; afterwards it is as before."""
        ...

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that it takes from the model's context."""
        ...


class Tunable(Attachable, Protocol):
    """An adapter that also becomes a file."""

    @property
    def num_parameters(self) -> int: ...

    def trained(self, params: Mapping[str, Tensor]) -> Tunable:
        """The adapter with these values, as it is used and saved."""
        ...

    def save(self, folder: Path, model: PreTrainedModel) -> None:
        """Write it into a folder, in peft's own format where peft has one."""
        ...

    def merge(self, model: PreTrainedModel) -> SelectedParameters:
        """The model's weights with it inside them.

        Raises:
            InputError: it cannot be a part of weights.
        """
        ...


class MakeTuner(Protocol[StateT]):
    """How an attached model is updated: back-propagation, or anything else that is a `Tuner`."""

    def __call__(self, model: PreTrainedModel, config: AttachedConfig, /) -> Tuner[StateT, TokenBatch]: ...


def check_attached(config: AttachedConfig) -> None:
    """Refuse settings that make no sense.

    Raises:
        InputError: one is out of range.
    """
    if config.num_batch_sequences < 1:
        raise InputError(f"num_batch_sequences is {config.num_batch_sequences}, expected at least 1")
    check_descent(weight_decay=config.weight_decay, max_grad_norm=config.max_grad_norm)


def check_lengths(examples: Sequence[EncodedExample], backbone: Backbone, adapter: Attachable) -> None:
    """Refuse texts that are longer than the model reads with this adapter attached.

    Raises:
        InputError: there is one.
    """
    # The last token is predicted, never read.
    longest = max((len(example.input_ids) - 1 for example in examples), default=0)
    room = backbone.spec.max_context - adapter.num_virtual_tokens
    if longest > room:
        taken = f" beside {adapter.num_virtual_tokens} virtual tokens" if adapter.num_virtual_tokens else ""
        raise InputError(
            f"a text has {longest + 1} tokens, expected at most {room + 1}{taken} in the model's context of "
            f"{backbone.spec.max_context}; give max_length when encoding"
        )


class AttachedTuner:
    """Gradient descent on -log p(target) with an adapter's tensors as parameters, in the model that has it attached.

    Args:
        model: with an adapter attached, or as it is; its own tensors are trained, without a copy.
        config: weight decay and clipping.
    """

    def __init__(self, model: PreTrainedModel, config: AttachedConfig) -> None:
        self._model, self._config = model, config

    def init(self, params: Params) -> GradientState:
        """Write `params` into the model, whose tensors the state then is."""
        return GradientState.inside(self._model, params, weight_decay=self._config.weight_decay)

    def step(self, state: GradientState, batch: TokenBatch) -> tuple[GradientState, Metrics]:
        loss = self._nats(state.params, batch).mean()
        return state, state.descend(loss, max_grad_norm=self._config.max_grad_norm)

    @torch.no_grad()
    def evaluate(self, state: GradientState, batch: TokenBatch) -> tuple[float, int]:
        nats = self._nats(state.params, batch)
        return float(nats.double().sum()), len(nats)

    def _nats(self, params: dict[str, Tensor], batch: TokenBatch) -> Tensor:
        return answer_nats(self._model, self._model.get_output_embeddings(), params, batch)


def tune_attached(
    backbone: Backbone,
    fresh: Attachable,
    make_tuner: MakeTuner[StateT],
    examples: Sequence[EncodedExample],
    config: AttachedConfig,
    *,
    heldout: Sequence[EncodedExample],
    run_dir: Path | None,
    resume: bool,
    progress: Callable[[LoopProgress], None] | None,
) -> tuple[dict[str, Tensor], LoopResult[StateT]]:
    """Train an adapter; the backbone is as before afterwards.

    Where `fresh` is the model's own parameters, these are trained, and what they were waits on disk meanwhile.

    Args:
        backbone: serves nobody else meanwhile.
        fresh: the adapter to start from.
        make_tuner: how it is updated, such as `AttachedTuner`.
        examples, heldout: to train on, and to judge each epoch by; empty `heldout`: the last epoch wins.
        config: how to train.
        run_dir: for metrics and checkpoints, and for what waits on disk; with `heldout` and without it, the best
            epoch's parameters are kept in memory.
        resume: go on from the checkpoint in `run_dir`, if there is one.
        progress: called after each step.

    Returns:
        The adapter's trained tensors on the CPU, and how the loop went; its state's tensors are no longer trained ones.

    Raises:
        InputError: nothing to train on, or a text that does not fit the model's context.
        NonFiniteLossError: a loss is nan or inf.
    """
    check_lengths([*examples, *heldout], backbone, fresh)
    size, pad_token_id = config.num_batch_sequences, backbone.spec.pad_token_id
    batches = TokenBatches(examples, size, pad_token_id=pad_token_id, seed=config.seed)
    judges = TokenBatches(heldout, size, pad_token_id=pad_token_id, seed=0) if heldout else None
    number_types = sorted({str(parameter.dtype) for parameter in backbone.model.parameters()})
    about = repr((config, backbone.spec.backbone_digest, number_types, digest_examples(examples, heldout)))
    checkpointing = gradient_checkpointing(backbone.model, enabled=config.gradient_checkpointing)
    with (
        fresh.attach(backbone.model) as model,
        own_tensors_restored(model, fresh.params, run_dir),
        checkpointing,
    ):
        tuner = make_tuner(model, config)
        result = run_loop(
            tuner,
            tuner.init(fresh.params),
            batches,
            config.loop,
            heldout=judges,
            run_dir=run_dir,
            fingerprint=hashlib.sha256(about.encode()).hexdigest(),
            resume=resume,
            progress=progress,
        )
        return taken(result.state.params), result
