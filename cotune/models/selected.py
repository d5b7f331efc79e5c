"""A model's own parameters, some or all, with other values: attached for a while, never for good.

Full fine-tuning, tuning of biases and norms (BitFit, Zaken et al., arXiv 2106.10199) and of chosen blocks, and every
adapter that was merged, are this: named tensors in the place of the model's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cotune.durable import is_free, replacing
from cotune.errors import InputError
from cotune.models.anatomy import decoder_layers
from cotune.models.weights import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_FILE = "selected.safetensors"
_FORMAT = "cotune selected parameters 1"


@dataclass(frozen=True, kw_only=True)
class SelectedParameters:
    """Values for some of a model's parameters, apart from the model.

    Attributes:
        params: by the names of `model.named_parameters()`; tied parameters once, by their first name.
    """

    params: dict[str, Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel, names: Iterable[str]) -> SelectedParameters:
        """The model's own values, not copied: whoever changes them puts them back.

        Raises:
            InputError: the model lacks a name, or its tensor is no floating-point one, as in a low-bit model.
        """
        own = dict(model.named_parameters())
        names = list(names)
        unknown = [name for name in names if name not in own]
        if unknown or not names:
            what = f"lacks {unknown[0]}" if unknown else "has none of the parameters that were asked for"
            raise InputError(f"{type(model).__name__} {what}; give names of its named_parameters()")
        whole = [name for name in names if not own[name].dtype.is_floating_point or _is_packed(own[name])]
        if whole:
            raise InputError(
                f"{whole[0]} is stored in few bits ({own[whole[0]].dtype}) and cannot be tuned; tune an adapter, "
                "such as lora, or load the model without base bits"
            )
        return cls(params={name: own[name].detach() for name in names})

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.params.values())

    @property
    def num_virtual_tokens(self) -> int:
        """None: the sequence is as it was."""
        return 0

    @contextmanager
    def attach(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Inside, `model` computes with these values, for every holder of it; afterwards it has its own again.

        Nothing is copied where the model's device and number type are those of `params`. Only these parameters
        require a gradient inside.

        Raises:
            InputError: the values do not fit the model.
        """
        self._check_fit(model)
        own = dict(model.named_parameters())
        trainable = {name: parameter.requires_grad for name, parameter in own.items()}
        # Tied parameters live in several places.
        places = [
            (module, short, parameter)
            for module in model.modules()
            for short, parameter in module._parameters.items()
            if parameter is not None
        ]
        names = {id(parameter): name for name, parameter in own.items()}
        was_training = model.training
        model.requires_grad_(False)
        values = {name: nn.Parameter(tensor.detach().to(own[name])) for name, tensor in self.params.items()}
        try:
            for module, short, parameter in places:
                if names[id(parameter)] in values:
                    module._parameters[short] = values[names[id(parameter)]]
            model.eval()
            yield model
        finally:
            for module, short, parameter in places:
                module._parameters[short] = parameter
            model.train(was_training)
            for name, parameter in own.items():
                parameter.requires_grad_(trainable[name])

    def trained(self, params: Mapping[str, Tensor]) -> SelectedParameters:
        """The same with other values."""
        return replace(self, params=dict(params))

    def merge(self, model: PreTrainedModel) -> SelectedParameters:
        """Itself: the changed weights of the model with this attached."""
        self._check_fit(model)
        return self

    def save(self, folder: Path, model: PreTrainedModel) -> None:
        """Write `selected.safetensors`: the tensors that differ from the model's own, and what all of them are.

        The file's header holds, as JSON, the SHA-256 of each of the model's own tensors that was open to change, so
        that the file is attached to no other model, and of each new one.

        Raises:
            InputError: the values do not fit the model, or the folder cannot be written.
        """
        self._check_fit(model)
        own = dict(model.named_parameters())
        before = {name: _digest(own[name]) for name in self.params}
        after = {name: _digest(tensor) for name, tensor in self.params.items()}
        changed = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.params.items()
            if before[name] != after[name]
        }
        metadata = {"format": _FORMAT, "before": json.dumps(before), "after": json.dumps(after)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / WEIGHTS_FILE, mode=None) as unfinished:
                save_file(changed, unfinished, metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise InputError(f"the tuned parameters cannot be written to {folder}: {error}") from error

    @classmethod
    def load(cls, folder: Path, model: PreTrainedModel) -> SelectedParameters:
        """Read what `save` wrote; tensors that did not change are the model's own.

        Raises:
            InputError: the file is missing or damaged, or was tuned on other weights.
        """
        path = folder / WEIGHTS_FILE
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
                before, after = _digests(metadata["before"]), _digests(metadata["after"])
                changed = {name: file.get_tensor(name) for name in file.offset_keys()}
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder} holds no tuned parameters ({error}); write it with save") from error
        own = dict(model.named_parameters())
        foreign = [name for name, digest in before.items() if name not in own or _digest(own[name]) != digest]
        if foreign:
            raise InputError(
                f"{folder} was tuned on other weights than these: {foreign[0]} differs; load the model that it was "
                "tuned on, with the same dtype"
            )
        tuned = cls(params={name: changed.get(name, own[name].detach()) for name in before})
        if {name: _digest(tensor) for name, tensor in tuned.params.items()} != after:
            raise InputError(f"{path} is damaged: a tensor is not what its header says; copy it again")
        tuned._check_fit(model)
        return tuned

    def save_model(self, folder: Path, model: PreTrainedModel, tokenizer_json: bytes) -> None:
        """Write a whole Hugging Face folder of the model with these values: weights, configs and `tokenizer.json`.

        Raises:
            InputError: the folder holds something, or cannot be written.
        """
        if not is_free(folder):
            raise InputError(f"{folder} holds something already; give a new folder for the whole model")
        try:
            with self.attach(model) as tuned, quiet():
                tuned.save_pretrained(str(folder), safe_serialization=True)
            (folder / "tokenizer.json").write_bytes(tokenizer_json)
        except (OSError, SafetensorError) as error:
            raise InputError(f"the model cannot be written to {folder}: {error}") from error

    def _check_fit(self, model: PreTrainedModel) -> None:
        own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        for name, tensor in self.params.items():
            if own.get(name) != tuple(tensor.shape):
                raise InputError(
                    f"{name} {tuple(tensor.shape)} does not fit this {type(model).__name__}, which has "
                    f"{own.get(name, 'no such parameter')}; take the model that it was tuned on"
                )


def all_names(model: PreTrainedModel) -> list[str]:
    """Names of all parameters, for full fine-tuning."""
    return [name for name, _ in model.named_parameters()]


def bias_and_norm_names(model: PreTrainedModel) -> list[str]:
    """Names of all biases and of everything in norm layers, asked of the modules, not guessed from names.

    Llama-like models have no biases, so that there the norms' weights are tuned alone.

    Raises:
        InputError: a model without both.
    """

    def is_chosen(module: nn.Module, short: str) -> bool:
        return short == "bias" or "norm" in type(module).__name__.lower()

    names = _names_where(model, is_chosen)
    if not names:
        raise InputError(f"{type(model).__name__} has neither biases nor norms to tune; take another method, as lora")
    return names


def block_names(model: PreTrainedModel, blocks: Iterable[int]) -> list[str]:
    """Names of all parameters of the decoder layers with these indices, counted from 0.

    Raises:
        InputError: no such layer.
    """
    layers = decoder_layers(model)
    chosen = sorted(set(blocks))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(layers):
        raise InputError(f"blocks are {chosen}, expected some of 0 to {len(layers) - 1}")
    inside = {id(parameter) for index in chosen for parameter in layers[index].parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]


def _names_where(model: PreTrainedModel, is_chosen: Callable[[nn.Module, str], bool]) -> list[str]:
    chosen = {
        id(parameter)
        for module in model.modules()
        for short, parameter in module._parameters.items()
        if parameter is not None and is_chosen(module, short)
    }
    return [name for name, parameter in model.named_parameters() if id(parameter) in chosen]


def _is_packed(parameter: Tensor) -> bool:
    """Whether several numbers share a stored one, as in bitsandbytes' 4-bit tensors, whose storage may be a float."""
    return getattr(parameter, "quant_state", None) is not None


def _digest(tensor: Tensor) -> str:
    state = hashlib.sha256(json.dumps([str(tensor.dtype), list(tensor.shape)]).encode())
    state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _digests(text: str) -> dict[str, str]:
    value = json.loads(text)
    if not isinstance(value, dict) or not all(isinstance(digest, str) for digest in value.values()):
        raise ValueError("its header holds no digests")
    return value
