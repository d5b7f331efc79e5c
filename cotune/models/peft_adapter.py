"""Any adapter of peft on a frozen model, attached for a while, never for good.

What is different from method to method is in peft's config; the life of an adapter here is the same for all. Adapters
that stand in layers (LoRA, IA3, VeRA) change the model itself, for every holder of it. A soft prompt or a prefix stands
in front of the sequence: only the model that `attach` gives has it, and the bare model says so when it is asked.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cotune.errors import InputError
from cotune.models.low_bit import is_low_bit
from cotune.models.seeded import seeded
from cotune.models.selected import SelectedParameters

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KINDS = ("LORA", "IA3", "VERA", "LOHA", "LOKR", "OFT", "HRA", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
"""Kinds of peft that are read from folders."""

# Initialisations that change the frozen weights: peft's own files of them are no adapters of the model as it is.
MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
# What a folder must not ask for: other layers than the model has, or code of other packages.
_REFUSED_FIELDS = ("layer_replication", "megatron_config", "modules_to_save", "trainable_token_indices", "bias")


@dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """An adapter of peft apart from its model.

    Attributes:
        config: peft's; it is copied wherever peft would write into it.
        params: its tensors, named as in the `PeftModel` that `attach` gives.
    """

    config: peft.PeftConfig
    params: dict[str, Tensor]

    @classmethod
    def fresh(cls, model: PreTrainedModel, config: peft.PeftConfig, *, seed: int = 0) -> PeftAdapter:
        """An untrained adapter; `model` is as before afterwards.

        Raises:
            InputError: the config does not fit the model.
        """
        with wrapped_in_peft(model, config, seed) as wrapped:
            return cls(config=config, params={n: p.detach().clone() for n, p in _leaves(wrapped).items()})

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.params.values())

    @property
    def num_virtual_tokens(self) -> int:
        """Positions that it takes from the model's context; 0 for adapters that stand in layers."""
        return int(getattr(self.config, "num_virtual_tokens", None) or 0)

    @contextmanager
    def attach(self, model: PreTrainedModel) -> Iterator[peft.PeftModel]:
        """Inside, the model that it gives is the adapted one; afterwards `model` is as before, also on error.

        An adapter in layers adapts `model` itself, so that a `Backbone` generates with it. A soft prompt or a prefix
        does not, and `model` refuses to be called directly meanwhile.

        Raises:
            InputError: the adapter does not fit the model.
        """
        with wrapped_in_peft(model, self.config, seed=0) as wrapped:
            leaves = _leaves(wrapped)
            if {n: p.shape for n, p in leaves.items()} != {n: t.shape for n, t in self.params.items()}:
                raise InputError(
                    f"this {self.config.peft_type.value} adapter does not fit this {type(model).__name__}; "
                    "attach it to the model that it was tuned on"
                )
            with torch.no_grad():
                for name, leaf in leaves.items():
                    leaf.copy_(self.params[name])
            wrapped.requires_grad_(False)
            for leaf in leaves.values():
                leaf.requires_grad_(True)
            wrapped.eval()
            yield wrapped

    def trained(self, params: Mapping[str, Tensor]) -> PeftAdapter:
        """The same with other values."""
        return replace(self, params=dict(params))

    def merge(self, model: PreTrainedModel) -> SelectedParameters:
        """The weights of the model with this adapter inside them; `model` is as before afterwards.

        Raises:
            InputError: a soft prompt or a prefix is no weight of the model, or the model has low-bit weights.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer

        if self.config.is_prompt_learning:
            raise InputError(
                f"{self.config.peft_type.value} stands in front of the sequence and cannot be merged into weights; "
                "keep it as an adapter folder"
            )
        if is_low_bit(model):
            raise InputError("the model has low-bit weights; load it without base bits to merge an adapter")
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        merged: dict[str, Tensor] = {}
        with self.attach(model) as wrapped, torch.no_grad():
            for layer in [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]:
                own = dict(layer.get_base_layer().named_parameters())
                before = {short: parameter.data for short, parameter in own.items()}
                for parameter in own.values():
                    parameter.data = parameter.data.clone()
                try:
                    layer.merge()
                    for short, parameter in own.items():
                        if not torch.equal(parameter, before[short]):
                            merged[names[id(parameter)]] = parameter.data
                finally:
                    # Taken back as a whole, where peft would subtract.
                    for short, parameter in own.items():
                        parameter.data = before[short]
                    layer.merged_adapters.clear()
        return SelectedParameters(params=merged)

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
    def load(cls, folder: Path, model: PreTrainedModel) -> PeftAdapter:
        """Read an adapter folder that `save` or peft wrote; `model` is as before afterwards.

        Raises:
            InputError: a file is missing or damaged, of a kind that is not read, or does not fit the model.
        """
        import peft

        config = read_config(folder)
        try:
            tensors = load_file(folder / WEIGHTS_FILE)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder} holds no adapter with safetensors: {error}") from error
        with wrapped_in_peft(model, config, seed=0) as wrapped:
            like = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
            if {n: t.shape for n, t in like.items()} != {n: t.shape for n, t in tensors.items()}:
                raise InputError(
                    f"the adapter in {folder} does not fit this {type(model).__name__}; "
                    "attach it to the model that it was tuned on"
                )
            peft.set_peft_model_state_dict(wrapped, tensors)
            return cls(config=config, params={n: p.detach().clone() for n, p in _leaves(wrapped).items()})


def read_config(folder: Path) -> peft.PeftConfig:
    """The config of a peft adapter folder, with nothing in it that would do more than describe the adapter.

    Raises:
        InputError: it is missing or damaged, or asks for what is not read here.
    """
    import peft

    path = folder / CONFIG_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind = str(fields["peft_type"])
        if kind not in KINDS:
            raise InputError(f"{folder} is a {kind} adapter of peft, expected one of {', '.join(KINDS)}")
        asked = [name for name in _REFUSED_FIELDS if fields.get(name) not in (None, "none", False)]
        if asked:
            raise InputError(f"{path} sets {asked[0]}, which cotune does not read; train an adapter without it")
        init = fields.get("init_lora_weights")
        if isinstance(init, str) and init.startswith(MUTATING_INITS):
            raise InputError(
                f"{path} has init_lora_weights {init!r}, which changes the model's weights; convert it with peft's "
                "save_pretrained(path_initial_model_for_weight_conversion=...)"
            )
        config = peft.PeftConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} holds no adapter of peft: {error}") from error
    if kind == "LORA":
        config.init_lora_weights = True
    if kind == "PROMPT_TUNING":
        config.prompt_tuning_init = peft.PromptTuningInit.RANDOM
    if config.is_prompt_learning:
        # Of the model that it is attached to, which peft asks, not of the one that it was made for.
        config.token_dim = config.num_layers = config.num_attention_heads = config.num_transformer_submodules = None
    # Where an encoder made the prompt, the folder holds what it made; everything else is as in training.
    config.inference_mode = kind == "P_TUNING" or bool(getattr(config, "prefix_projection", False))
    return config


@contextmanager
def wrapped_in_peft(model: PreTrainedModel, config: peft.PeftConfig, seed: int) -> Iterator[peft.PeftModel]:
    """The model with a fresh adapter of that config; it is taken out again at the end.

    Raises:
        InputError: peft cannot put this adapter into this model.
    """
    import peft

    if is_low_bit(model) and not (config.is_prompt_learning or config.peft_type is peft.PeftType.LORA):
        raise InputError(
            f"peft cannot take a {config.peft_type.value} adapter out of a low-bit model again; "
            "take lora or a prompt, or load the model without base bits"
        )
    was_training = model.training
    trainable: Mapping[str, bool] = {name: p.requires_grad for name, p in model.named_parameters()}
    layers = [(module, dict(module._modules)) for module in model.modules()]
    config = copy.deepcopy(config)
    with ExitStack() as undoing:

        @undoing.callback
        def restore() -> None:
            # Where peft failed in the middle, some layers are wrapped and others are not.
            for module, children in layers:
                module._modules.clear()
                module._modules.update(children)
            model.train(was_training)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])

        with seeded(seed), warnings.catch_warnings():
            # peft asks transformers 5 by an old name.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            # A model's folder may have another name by now; whether the tensors fit is found out by themselves.
            warnings.filterwarnings("ignore", message=".*base_model_name_or_path. was renamed.*", category=UserWarning)
            try:
                wrapped = peft.get_peft_model(model, config)
            except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise InputError(
                    f"a {config.peft_type.value} adapter cannot be put into this {type(model).__name__}: {reason}"
                ) from error
        if config.is_prompt_learning:
            undoing.enter_context(_only_through_peft(model))
        else:
            undoing.callback(wrapped.unload)
        yield wrapped


def _leaves(wrapped: peft.PeftModel) -> dict[str, nn.Parameter]:
    """The adapter's own parameters that a training changes, by their names in the wrapped model."""
    config = wrapped.active_peft_config
    if config.is_prompt_learning:
        leaves = {f"prompt_encoder.{n}": p for n, p in wrapped.prompt_encoder.named_parameters()}
        # An encoder's shape at inference: only what it made is used.
        return {n: p for n, p in leaves.items() if not config.inference_mode or n.endswith(".embedding.weight")}
    return {n: p for n, p in wrapped.named_parameters() if p.requires_grad}


@contextmanager
def _only_through_peft(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the bare model refuses to read text, because it would read it without the prompt."""

    def refuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("inputs_embeds") is None and kwargs.get("past_key_values") is None:
            raise InputError(
                "a soft prompt or prefix is attached, which the bare model does not see; "
                "call the model that attach gives, or generate with PromptedModel"
            )

    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
