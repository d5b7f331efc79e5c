"""What can be tuned on one device, by the name of the method: one entry for each, and nothing else to register.

How it is updated is chosen apart, in `cotune.tuning.estimators`. The side network is not in this table: it is trained
from features, without the model, by `cotune.tuning.side`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cotune.errors import InputError
from cotune.models.adapters import LoraShape
from cotune.tuning.adapter import Bottlenecks
from cotune.tuning.bias import BiasAndNorms
from cotune.tuning.blocks import Blocks
from cotune.tuning.full import Full
from cotune.tuning.ia3 import Ia3
from cotune.tuning.lora import Lora
from cotune.tuning.p_tuning import PTuning
from cotune.tuning.prefix import Prefix
from cotune.tuning.soft_prompt import SoftPrompt
from cotune.tuning.tune import Adaptation
from cotune.tuning.vera import Vera


@dataclass(frozen=True, kw_only=True)
class AdaptationOptions:
    """What a user may say about a method; None is the method's own default."""

    rank: int | None = None
    """Of a low-rank adapter."""
    alpha: float | None = None
    """LoRA's strength; twice the default rank of 8 if left out."""
    init: str | None = None
    """LoRA's start."""
    width: int | None = None
    """Of a bottleneck."""
    num_virtual_tokens: int | None = None
    """Of a soft prompt or prefix."""
    memory_budget_bytes: int | None = None
    """For training, above the weights and one inference."""
    gradient_checkpointing: bool = False
    """Whether the training uses it; counts for a memory budget."""
    num_batch_sequences: int = 8
    """Sequences in one step; counts for a memory budget."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to adapt a model.

    Attributes:
        summary: for people.
        learning_rate: a usual one with AdamW.
        options: fields of `AdaptationOptions` that it listens to, beside those that all share.
        make: what is tuned.
        num_virtual_tokens: positions that it takes from the model's context.
        is_mergeable: whether it becomes a part of the model's weights.
    """

    summary: str
    learning_rate: float
    options: tuple[str, ...] = ()
    make: Callable[[AdaptationOptions], Adaptation]
    num_virtual_tokens: Callable[[AdaptationOptions], int] = lambda options: 0
    is_mergeable: bool = True


def _lora(options: AdaptationOptions, *, use_dora: bool = False, use_rslora: bool = False) -> Lora:
    shape = LoraShape(
        rank=8 if options.rank is None else options.rank,
        alpha=16.0 if options.alpha is None else options.alpha,
        use_dora=use_dora,
        use_rslora=use_rslora,
    )
    return Lora(shape=shape, init=options.init or "default")


def _blocks(options: AdaptationOptions) -> Blocks:
    if options.memory_budget_bytes is None:
        raise InputError("method blocks needs a memory budget; give one, such as --memory-budget 500MB")
    return Blocks(
        memory_budget_bytes=options.memory_budget_bytes,
        num_batch_sequences=options.num_batch_sequences,
        gradient_checkpointing=options.gradient_checkpointing,
    )


def _virtual(options: AdaptationOptions) -> int:
    return 20 if options.num_virtual_tokens is None else options.num_virtual_tokens


_LORA = ("rank", "alpha", "init")
_PROMPT = ("num_virtual_tokens",)

ADAPTATIONS: dict[str, Method] = {
    "full": Method(summary="every parameter of the model", learning_rate=2e-4, make=lambda options: Full()),
    "lora": Method(summary="low-rank matrices beside the weights", learning_rate=1e-3, options=_LORA, make=_lora),
    "dora": Method(
        summary="LoRA with the lengths of the weights' rows apart",
        learning_rate=1e-3,
        options=_LORA,
        make=lambda options: _lora(options, use_dora=True),
    ),
    "rslora": Method(
        summary="LoRA whose strength does not fall with the rank",
        learning_rate=1e-3,
        options=_LORA,
        make=lambda options: _lora(options, use_rslora=True),
    ),
    "ia3": Method(summary="scales of keys, values and feed-forward", learning_rate=1e-2, make=lambda options: Ia3()),
    "vera": Method(
        summary="scales of shared random matrices",
        learning_rate=1e-2,
        options=("rank",),
        make=lambda options: Vera() if options.rank is None else Vera(rank=options.rank),
    ),
    "adapter": Method(
        summary="bottlenecks behind attention and feed-forward",
        learning_rate=1e-3,
        options=("width",),
        make=lambda options: Bottlenecks() if options.width is None else Bottlenecks(width=options.width),
        is_mergeable=False,
    ),
    "soft_prompt": Method(
        summary="embeddings in front of the text",
        learning_rate=3e-2,
        options=_PROMPT,
        make=lambda options: SoftPrompt(num_virtual_tokens=_virtual(options)),
        num_virtual_tokens=_virtual,
        is_mergeable=False,
    ),
    "p_tuning": Method(
        summary="a soft prompt that an MLP makes",
        learning_rate=1e-2,
        options=_PROMPT,
        make=lambda options: PTuning(num_virtual_tokens=_virtual(options)),
        num_virtual_tokens=_virtual,
        is_mergeable=False,
    ),
    "prefix": Method(
        summary="keys and values in front of each layer's",
        learning_rate=1e-2,
        options=_PROMPT,
        make=lambda options: Prefix(num_virtual_tokens=_virtual(options)),
        num_virtual_tokens=_virtual,
        is_mergeable=False,
    ),
    "bias": Method(summary="biases and norms only", learning_rate=1e-3, make=lambda options: BiasAndNorms()),
    "blocks": Method(
        summary="the layers with the largest gradients that a memory budget holds",
        learning_rate=2e-4,
        options=("memory_budget_bytes",),
        make=_blocks,
    ),
}


def adaptation_named(name: str, options: AdaptationOptions) -> Adaptation:
    """What the method of that name tunes.

    Raises:
        InputError: an unknown name, or an option that this method does not have.

    Example:
        >>> adaptation_named("adapter", AdaptationOptions(width=4))
        Bottlenecks(width=4)
    """
    if name not in ADAPTATIONS:
        raise InputError(f"method is {name!r}, expected one of {', '.join(ADAPTATIONS)}")
    method = ADAPTATIONS[name]
    for option in ("rank", "alpha", "init", "width", "num_virtual_tokens", "memory_budget_bytes"):
        if getattr(options, option) is not None and option not in method.options:
            users = [other for other, each in ADAPTATIONS.items() if option in each.options]
            raise InputError(
                f"{option} is {getattr(options, option)}, which method {name} does not have; "
                f"leave it out, or take {' or '.join(users)}"
            )
    return method.make(options)
