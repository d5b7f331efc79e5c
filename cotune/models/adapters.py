"""LoRA adapters (Hu et al., arXiv 2106.09685) on a frozen model, through peft: attached for a while, never for good.

    y = W x + (alpha / rank) B A x

Symbols: W a frozen linear layer; A (rank, in) random and B (out, rank) zero at the start, so that a fresh adapter is
exactly the base model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cotune.errors import InputError
from cotune.models.seeded import seeded

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """How large an adapter is and where it sits."""

    rank: int = 8
    """Width of the bottleneck."""
    alpha: float = 16.0
    """Strength; the product B A x is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Last names of the adapted layers, such as `q_proj`; empty: every linear layer but the output embedding."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank is {self.rank}, expected at least 1")
        if not self.alpha > 0:
            raise InputError(f"alpha is {self.alpha}, expected a positive number")


@dataclass(frozen=True, kw_only=True)
class LoraAdapter:
    """A LoRA adapter apart from its model.

    Attributes:
        shape: rank, strength and adapted layers.
        params: its tensors, named as in the `PeftModel` that `attach` gives.
    """

    shape: LoraShape
    params: dict[str, Tensor]

    @classmethod
    def fresh(cls, model: PreTrainedModel, shape: LoraShape, *, seed: int = 0) -> LoraAdapter:
        """An untrained adapter; it changes no logit. `model` is as before afterwards.

        Raises:
            InputError: a target is no linear layer of the model.
        """
        with _wrapped(model, shape, seed) as wrapped:
            params = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
        return cls(shape=shape, params=params)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.params.values())

    @contextmanager
    def attach(self, model: PreTrainedModel) -> Iterator[peft.PeftModel]:
        """Inside, `model` itself is the adapted one, for every holder of it; afterwards it is as before, also on error.

        A `Backbone` whose `model` has an adapter attached generates and gives features as the adapted model.

        Raises:
            InputError: the adapter does not fit the model.
        """
        with _wrapped(model, self.shape, seed=0) as wrapped:
            leaves = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
            if {n: p.shape for n, p in leaves.items()} != {n: t.shape for n, t in self.params.items()}:
                raise InputError(
                    f"the adapter of rank {self.shape.rank} does not fit this {type(model).__name__}; "
                    "attach it to the model that it was tuned on"
                )
            with torch.no_grad():
                for name, leaf in leaves.items():
                    leaf.copy_(self.params[name])
            wrapped.eval()
            yield wrapped

    def save(self, folder: Path, model: PreTrainedModel) -> None:
        """Write a peft adapter folder, safetensors only.

        Raises:
            InputError: the folder cannot be written.
        """
        try:
            with self.attach(model) as wrapped:
                # The embeddings are frozen; without the argument, peft asks the hub about the vocabulary.
                wrapped.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
        except OSError as error:
            raise InputError(f"the adapter cannot be written to {folder}: {error.strerror}") from error

    @classmethod
    def load(cls, folder: Path, model: PreTrainedModel) -> LoraAdapter:
        """Read a LoRA folder that `save` or peft wrote; `model` is as before afterwards.

        Raises:
            InputError: a file is missing or damaged, or does not fit the model.
        """
        try:
            config = peft.LoraConfig.from_pretrained(str(folder), local_files_only=True)
            tensors = load_file(folder / WEIGHTS_FILE)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise InputError(f"{folder} holds no LoRA adapter with safetensors: {error}") from error
        shape = LoraShape(
            rank=config.r, alpha=float(config.lora_alpha), targets=tuple(sorted(config.target_modules or ()))
        )
        params = {name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): tensor
                  for name, tensor in tensors.items()}  # fmt: skip
        adapter = cls(shape=shape, params=params)
        with adapter.attach(model):
            return adapter


def linear_targets(model: PreTrainedModel) -> tuple[str, ...]:
    """Last names of all linear layers of a model but its output embedding, in order of appearance.

    Llama, Qwen2, Qwen3, Mistral and Gemma: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`,
    `down_proj`. GPT-2: `c_attn`, `c_proj`, `c_fc`.
    """
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in _linear_layers(model)))


def rank_for_budget(model: PreTrainedModel, num_parameters: int, *, targets: tuple[str, ...] = ()) -> int:
    """The largest rank whose adapter has at most `num_parameters` parameters.

    Each adapted layer (in, out) costs in + out parameters per rank.

    Args:
        model: gives the layers.
        num_parameters: the budget.
        targets: as in `LoraShape`.

    Raises:
        InputError: not even rank 1 fits, or a target is no linear layer of the model.
    """
    chosen = _checked_targets(model, targets)
    per_rank = sum(
        sum(weight.shape) for name, weight in _linear_layers(model).items() if name.rpartition(".")[2] in chosen
    )
    if num_parameters < per_rank:
        raise InputError(
            f"num_parameters is {num_parameters}, expected at least {per_rank:,} for rank 1 on {', '.join(chosen)}; "
            "raise the budget or adapt fewer layers"
        )
    return num_parameters // per_rank


def _linear_layers(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of the linear layers by module name, without the output embedding."""
    head = model.get_output_embeddings()
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def _checked_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> tuple[str, ...]:
    known = linear_targets(model)
    unknown = [name for name in targets if name not in known]
    if unknown:
        raise InputError(
            f"targets has {', '.join(unknown)}, which {type(model).__name__} lacks; expected some of {', '.join(known)}"
        )
    return targets or known


@contextmanager
def _wrapped(model: PreTrainedModel, shape: LoraShape, seed: int) -> Iterator[peft.PeftModel]:
    """The model with a fresh adapter in its layers; they are taken out again at the end."""
    targets = _checked_targets(model, shape.targets)
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=list(targets),
        # GPT-2 stores its weights as (in, out).
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    was_training = model.training
    trainable: Mapping[str, bool] = {name: p.requires_grad for name, p in model.named_parameters()}
    with seeded(seed), warnings.catch_warnings():
        # peft asks transformers 5 by an old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        wrapped = peft.get_peft_model(model, config)
    try:
        yield wrapped
    finally:
        wrapped.unload()
        model.train(was_training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
