"""LoRA adapters (Hu et al., arXiv 2106.09685) on a frozen model, through peft: attached for a while, never for good.

    y = W x + s B A x,    s = alpha / rank, or alpha / sqrt(rank) with rsLoRA (Kalajdzievski, arXiv 2312.03732)

With DoRA (Liu et al., arXiv 2402.09353) the length of each row of W + s B A is trained apart from its direction:

    y = m (W + s B A) x / ||W + s B A||

Symbols: W a frozen linear layer; A (rank, in) random and B (out, rank) zero at the start; m (out,) at the start the row
norms of W, so that a fresh adapter is exactly the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from cotune.errors import InputError
from cotune.models.low_bit import is_eight_bit
from cotune.models.peft_adapter import WEIGHTS_FILE, PeftAdapter, read_config
from cotune.models.selected import SelectedParameters

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel

__all__ = [
    "WEIGHTS_FILE",
    "LoraAdapter",
    "LoraShape",
    "check_inner_width",
    "linear_targets",
    "lora_config",
    "rank_for_budget",
]


@dataclass(frozen=True, kw_only=True)
class LoraShape:
    """How large an adapter is and where it sits."""

    rank: int = 8
    """Width of the bottleneck."""
    alpha: float = 16.0
    """Strength; the product B A x is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Last names of the adapted layers, such as `q_proj`; empty: every linear layer but the output embedding."""
    use_dora: bool = False
    """Train the length of each row of the weights apart from its direction."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so that large ranks learn as fast as small ones."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank is {self.rank}, expected at least 1")
        if not 0 < self.alpha < float("inf"):
            raise InputError(f"alpha is {self.alpha}, expected a positive number")

    @property
    def scale(self) -> float:
        """s, what B A x is multiplied by."""
        return float(self.alpha / self.rank**0.5) if self.use_rslora else self.alpha / self.rank


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
        return cls(shape=shape, params=PeftAdapter.fresh(model, lora_config(model, shape), seed=seed).params)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.params.values())

    @property
    def num_virtual_tokens(self) -> int:
        """None: it stands in layers."""
        return 0

    def attach(self, model: PreTrainedModel) -> AbstractContextManager[peft.PeftModel]:
        """Inside, `model` itself is the adapted one, for every holder of it; afterwards it is as before, also on error.

        A `Backbone` whose `model` has an adapter attached generates and gives features as the adapted model.

        Raises:
            InputError: the adapter does not fit the model.
        """
        return self._in_peft(model).attach(model)

    def trained(self, params: Mapping[str, Tensor]) -> LoraAdapter:
        """The same with other values."""
        return replace(self, params=dict(params))

    def merge(self, model: PreTrainedModel) -> SelectedParameters:
        """The adapted layers' weights with the adapter inside; `model` is as before afterwards.

        Raises:
            InputError: the model has low-bit weights.
        """
        return self._in_peft(model).merge(model)

    def save(self, folder: Path, model: PreTrainedModel) -> None:
        """Write a peft adapter folder, safetensors only.

        Raises:
            InputError: the folder cannot be written.
        """
        self._in_peft(model).save(folder, model)

    @classmethod
    def load(cls, folder: Path, model: PreTrainedModel) -> LoraAdapter:
        """Read a LoRA folder that `save` or peft wrote; `model` is as before afterwards.

        Raises:
            InputError: a file is missing or damaged, does not fit the model, or has ranks or strengths that differ
                from layer to layer, which `PeftAdapter.load` reads.
        """
        import peft

        config = read_config(folder)
        is_even = config.peft_type is peft.PeftType.LORA and not (config.rank_pattern or config.alpha_pattern)
        names = config.target_modules if is_even else None
        if not isinstance(names, set) or any("." in name for name in names):
            raise InputError(
                f"{folder} holds no LoRA adapter of one rank and strength on layers by their last names; "
                "read it with PeftAdapter.load"
            )
        shape = LoraShape(
            rank=config.r,
            alpha=float(config.lora_alpha),
            targets=tuple(sorted(names)),
            use_dora=bool(config.use_dora),
            use_rslora=bool(config.use_rslora),
        )
        adapter = cls(shape=shape, params=PeftAdapter.load(folder, model).params)
        with adapter.attach(model):
            return adapter

    def _in_peft(self, model: PreTrainedModel) -> PeftAdapter:
        return PeftAdapter(config=lora_config(model, self.shape), params=self.params)


def lora_config(model: PreTrainedModel, shape: LoraShape) -> peft.LoraConfig:
    """peft's config of that shape for that model.

    Raises:
        InputError: a target is no linear layer of the model, or DoRA meets int8 weights.
    """
    import peft

    if shape.use_dora and is_eight_bit(model):
        raise InputError("DoRA of peft does not compute on 8-bit weights; take 4 bits, whole weights, or lora")
    return peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=list(checked_targets(model, shape.targets)),
        use_dora=shape.use_dora,
        use_rslora=shape.use_rslora,
        fan_in_fan_out=has_transposed_weights(model),
    )


def has_transposed_weights(model: PreTrainedModel) -> bool:
    """Whether it stores its weights as (in, out), as GPT-2 does."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def linear_targets(model: PreTrainedModel) -> tuple[str, ...]:
    """Last names of all linear layers of a model but its output embedding, in order of appearance.

    Llama, Qwen2, Qwen3, Mistral and Gemma: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`,
    `down_proj`. GPT-2: `c_attn`, `c_proj`, `c_fc`.
    """
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in linear_sizes(model)))


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
    chosen = checked_targets(model, targets)
    per_rank = sum(sum(shape) for name, shape in linear_sizes(model).items() if name.rpartition(".")[2] in chosen)
    if num_parameters < per_rank:
        raise InputError(
            f"num_parameters is {num_parameters}, expected at least {per_rank:,} for rank 1 on {', '.join(chosen)}; "
            "raise the budget or adapt fewer layers"
        )
    return num_parameters // per_rank


def linear_sizes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(in, out) of the linear layers by module name, without the output embedding."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    sizes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            # Asked of the module: a low-bit weight has another shape.
            sizes[name] = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            sizes[name] = module.nx, module.nf
    return sizes


def check_inner_width(model: PreTrainedModel, name: str, width: int) -> None:
    """Refuse an adapter that is wider inside than the model is anywhere, before room for it is taken.

    Args:
        model: to adapt.
        name: of the setting, for the error.
        width: of a bottleneck, or a rank.

    Raises:
        InputError: it is wider.
    """
    widest = max((max(sizes) for sizes in linear_sizes(model).values()), default=width)
    if width > widest:
        raise InputError(f"{name} is {width}, expected at most {widest}, the width of the model's widest layer")


def checked_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The targets, or all where there are none.

    Raises:
        InputError: one is no linear layer of the model.
    """
    known = linear_targets(model)
    unknown = [name for name in targets if name not in known]
    if unknown:
        raise InputError(
            f"targets has {', '.join(unknown)}, which {type(model).__name__} lacks; expected some of {', '.join(known)}"
        )
    return targets or known
