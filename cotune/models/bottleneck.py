"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751) on a frozen model: attached for a while, never for good.

Two in each layer, after attention and after the feed-forward layer, before the residual sum; y is what a half puts out:

    y' = y + U gelu(D y + b_D) + b_U

Symbols: D (width, hidden) and b_D random, U (hidden, width) and b_U zero at the start, so that a fresh adapter is
exactly the base model. Deviations: layer norms stay frozen; in Gemma 2 and 3, y is taken before the norm that follows
each half. peft 0.21 has no such adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cotune.errors import InputError
from cotune.models.anatomy import decoder_layers
from cotune.models.selected import SelectedParameters
from cotune.models.side_network import uniform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_FILE = "bottleneck.safetensors"
MAX_WIDTH = 2**20
_FORMAT = "cotune bottleneck 1"
_NAME = "bottleneck"

# The layers that put out a half's y, by architecture: Llama, Qwen, Mistral and Gemma; GPT-2.
_OUTPUTS = (("self_attn.o_proj", "mlp.down_proj"), ("attn.c_proj", "mlp.c_proj"))


class Bottleneck(nn.Module):
    """U gelu(D y + b_D) + b_U, in float32; see this module's head."""

    def __init__(self, hidden_size: int, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.down_weight = nn.Parameter(uniform((width, hidden_size), hidden_size, generator))
        self.down_bias = nn.Parameter(uniform((width,), hidden_size, generator))
        self.up_weight = nn.Parameter(torch.zeros(hidden_size, width))
        self.up_bias = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, y: Tensor) -> Tensor:
        inner = F.gelu(F.linear(y.to(self.down_weight.dtype), self.down_weight, self.down_bias))
        return F.linear(inner, self.up_weight, self.up_bias).to(y.dtype)


class _Adapted(nn.Module):
    """A frozen layer with a bottleneck behind it; stands in the layer's place."""

    def __init__(self, layer: nn.Module, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.layer = layer
        self.bottleneck = bottleneck

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.layer(*args, **kwargs)
        change: Tensor = self.bottleneck(y)
        return y + change


@dataclass(frozen=True, kw_only=True)
class BottleneckAdapter:
    """Bottlenecks apart from their model.

    Attributes:
        width: of each bottleneck.
        params: their tensors, by the layer that each follows.
    """

    width: int
    params: dict[str, Tensor]

    @classmethod
    def fresh(cls, model: PreTrainedModel, width: int, *, seed: int = 0) -> BottleneckAdapter:
        """An untrained adapter; it changes no logit.

        Raises:
            InputError: an impossible width, or an architecture without the two halves.
        """
        check_width(width)
        generator = torch.Generator().manual_seed(seed)
        params: dict[str, Tensor] = {}
        for place in output_layers(model):
            bottleneck = Bottleneck(_hidden_size(model), width, generator)
            params |= {f"{place}.{_NAME}.{name}": p.detach() for name, p in bottleneck.named_parameters()}
        return cls(width=width, params=params)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.params.values())

    @property
    def num_virtual_tokens(self) -> int:
        """None: it stands in layers."""
        return 0

    def trained(self, params: Mapping[str, Tensor]) -> BottleneckAdapter:
        """The same with other values."""
        return replace(self, params=dict(params))

    @contextmanager
    def attach(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Inside, `model` is the adapted one, for every holder of it; afterwards it is as before, also on error.

        Only the adapter's own parameters require a gradient inside; the model has them by the names of `params`.

        Raises:
            InputError: the adapter does not fit the model.
        """
        places, hidden = output_layers(model), _hidden_size(model)
        like = {name: tuple(p.shape) for name, p in _empty(hidden, self.width).items()}
        expected = {f"{place}.{_NAME}.{name}": shape for place in places for name, shape in like.items()}
        if {name: tuple(tensor.shape) for name, tensor in self.params.items()} != expected:
            raise InputError(
                f"the bottleneck adapter of width {self.width} does not fit this {type(model).__name__}; "
                "attach it to the model that it was tuned on"
            )
        trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        was_training = model.training
        layers = {place: model.get_submodule(place) for place in places}
        for place, layer in layers.items():
            bottleneck = Bottleneck(hidden, self.width, torch.Generator())
            bottleneck.load_state_dict({name: self.params[f"{place}.{_NAME}.{name}"] for name in like})
            model.set_submodule(place, _Adapted(layer, bottleneck.to(next(layer.parameters()).device)))
        try:
            model.requires_grad_(False)
            model.eval()
            for place in places:
                model.get_submodule(f"{place}.{_NAME}").requires_grad_(True)
            yield model
        finally:
            for place, layer in layers.items():
                model.set_submodule(place, layer)
            model.train(was_training)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trainable[name])

    def save(self, folder: Path, model: PreTrainedModel | None = None) -> None:
        """Write `bottleneck.safetensors` into a folder, which is made if it is not there.

        Args:
            folder: where to.
            model: not needed; here because other adapters are saved with it.

        Raises:
            InputError: the folder cannot be written.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.params.items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": _FORMAT, "width": str(self.width)})
        except OSError as error:
            raise InputError(f"the adapter cannot be written to {folder}: {error.strerror}") from error

    def merge(self, model: PreTrainedModel) -> SelectedParameters:
        """Not possible.

        Raises:
            InputError: always; what a bottleneck does is no part of a weight.
        """
        raise InputError("a bottleneck adapter cannot be merged into weights; keep it as an adapter folder")

    @classmethod
    def load(cls, folder: Path, model: PreTrainedModel) -> BottleneckAdapter:
        """Read what `save` wrote; `model` is as before afterwards.

        Raises:
            InputError: the file is missing or damaged, or does not fit the model.
        """
        try:
            with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
                width = check_width(int(metadata["width"]))
                params = {name: file.get_tensor(name) for name in file.offset_keys()}
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder} holds no bottleneck adapter ({error}); write it with save") from error
        adapter = cls(width=width, params=params)
        with adapter.attach(model):
            return adapter


def output_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the layers that put out attention and feed-forward, two for each decoder layer, in order.

    Raises:
        InputError: an architecture without them.
    """
    places: list[str] = []
    names = {id(module): name for name, module in model.named_modules()}
    for layer in decoder_layers(model):
        parts = dict(layer.named_modules())
        found = next((pair for pair in _OUTPUTS if all(part in parts for part in pair)), None)
        if found is None:
            raise InputError(
                f"{type(model).__name__} is not supported: no output layers of attention and feed-forward in it; "
                "take a decoder-only model such as Llama, Qwen, Mistral, Gemma or GPT-2"
            )
        places += [f"{names[id(layer)]}.{part}" for part in found]
    return tuple(places)


def count_parameters(*, hidden_size: int, num_layers: int, width: int) -> int:
    """Trained numbers of an adapter: two bottlenecks in each layer.

    Example:
        >>> count_parameters(hidden_size=4096, num_layers=32, width=48)  # 0.377 % of Llama-7B
        25431040
    """
    return 2 * num_layers * (2 * hidden_size * width + width + hidden_size)


def width_for_budget(model: PreTrainedModel, num_parameters: int) -> int:
    """The largest width whose adapter has at most `num_parameters` parameters.

    Raises:
        InputError: not even width 1 fits.
    """
    shape = {"hidden_size": _hidden_size(model), "num_layers": len(output_layers(model)) // 2}
    narrowest = count_parameters(**shape, width=1)
    per_width = count_parameters(**shape, width=2) - narrowest
    if num_parameters < narrowest:
        raise InputError(
            f"num_parameters is {num_parameters}, expected at least {narrowest:,} for bottlenecks of width 1; "
            "raise the budget"
        )
    return 1 + (num_parameters - narrowest) // per_width


def _empty(hidden_size: int, width: int) -> dict[str, nn.Parameter]:
    with torch.device("meta"):
        return dict(Bottleneck(hidden_size, width).named_parameters())


def _hidden_size(model: PreTrainedModel) -> int:
    return int(model.config.hidden_size)


def check_width(width: int) -> int:
    """The width, if there is such a bottleneck.

    Raises:
        InputError: there is not.
    """
    if not 1 <= width <= MAX_WIDTH:
        raise InputError(f"width is {width}, expected 1 to {MAX_WIDTH}")
    return width
