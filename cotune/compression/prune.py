"""Prune a model in memory, by any method, and say what became of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from cotune.compression.calibration import CalibrationTexts, LayerProgress, check_finite
from cotune.compression.channels import Channels
from cotune.compression.depth import Depth
from cotune.compression.heads import Heads
from cotune.compression.hidden_size import HiddenSize
from cotune.compression.magnitude import Magnitude
from cotune.compression.pruner import Amount, Facts, Pruner
from cotune.compression.sparse_gpt import SparseGpt
from cotune.compression.sparsity import share_of_zeros
from cotune.compression.wanda import Wanda
from cotune.compression.width import Width
from cotune.errors import InputError

PRUNERS: dict[str, type[Pruner]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparse_gpt": SparseGpt,
    "depth": Depth,
    "channels": Channels,
    "heads": Heads,
    "hidden_size": HiddenSize,
    "width": Width,
}
"""Each with its settings as keywords. The first three set weights to zero, the others make the model smaller."""

ZEROS_NOTE = (
    "Zeros are for study: files stay dense, and no CPU runtime here computes faster or in less memory with "
    "unstructured or 2:4 sparsity."
)


@dataclass(frozen=True, kw_only=True)
class PrunedLayer:
    """What became of one weight matrix.

    Attributes:
        name: of the layer before.
        shape: (out, in) before; of the embedding (vocab, hidden).
        new_shape: after; None where the layer is gone.
        sparsity: share of zeros after; None where the layer is gone.
        output_error: share of the layer's squared output on the calibration texts that is lost; None where it was not
            measured.
    """

    name: str
    shape: tuple[int, int]
    new_shape: tuple[int, int] | None
    sparsity: float | None
    output_error: float | None


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What became of a model.

    Attributes:
        method: a key of `PRUNERS`.
        amount: as it was asked for, in words.
        layers: all linear layers and the embedding as they were before, in the model's order.
        num_parameters, new_num_parameters: numbers in the model before and after, tied ones once.
        facts: what the method found and chose, such as `dropped_blocks`.
        note: what to know of the result; empty where there is nothing.
    """

    method: str
    amount: str
    layers: tuple[PrunedLayer, ...]
    num_parameters: int
    new_num_parameters: int
    facts: Facts
    note: str

    @property
    def share_of_parameters(self) -> float:
        """The model's size against what it was, zeros counted as numbers: so files and memory have it."""
        return self.new_num_parameters / self.num_parameters

    def as_json(self) -> dict[str, Any]:
        """JSON values only."""
        return {
            **vars(self),
            "layers": [vars(layer) for layer in self.layers],
            "facts": dict(self.facts),
            "share_of_parameters": self.share_of_parameters,
        }


def prune(
    model: PreTrainedModel,
    how: str | Pruner,
    amount: Amount,
    calibration: CalibrationTexts | None = None,
    *,
    skip: Collection[str] = (),
    batch_size: int = 4,
    on_layer: Callable[[LayerProgress], None] | None = None,
) -> PruneReport:
    """Prune a model in place.

    `magnitude`, `wanda` and `sparse_gpt` set weights to zero. That is for study: files stay dense, and no CPU runtime
    here computes faster or in less memory with unstructured or 2:4 sparsity. The others make it smaller and faster.

    What was made of the weights before, such as a `Backbone` around the model, is to be made anew. After an error the
    model may be changed in part. Nothing is random but the choice of texts, which has a seed of its own.

    Memory beside the model: the residual stream of all texts, and float64 Gram matrices of one block for methods that
    read them.

    Args:
        model: in evaluation mode, with whole weights (best as float32) and without adapters.
        how: a key of `PRUNERS`, or one with settings, such as `SparseGpt(damping=0.1)`.
        amount: a share of the weights (`magnitude`, `wanda`, `sparse_gpt`), of the feed-forward channels, the key-value
            heads or the hidden size, or of both widths (`width`), such as 0.25; for the first three also a pattern
            such as `2:4`; for `depth` a number of blocks.
        calibration: texts; `magnitude` needs none and then reports no errors.
        skip: see `compress_linears`; for the first three.
        batch_size: texts in one pass.
        on_layer: called after each layer, by methods that go layer by layer.

    Raises:
        InputError: an unknown method or an amount that it does not take; no texts where they are needed; a model or
            texts that cannot be used.

    Example:
        >>> backbone = Backbone.from_pretrained("starter")  # doctest: +SKIP
        >>> texts = CalibrationTexts.read("notes.jsonl", backbone.tokenizer_json)  # doctest: +SKIP
        >>> prune(backbone.model, "channels", 0.25, texts).share_of_parameters  # doctest: +SKIP
    """
    pruner = pruner_named(how) if isinstance(how, str) else how
    check_finite(model)
    before = {module: (name, _shape(module)) for name, module in model.named_modules() if _is_matrix(module)}
    num_parameters = int(model.num_parameters())
    errors: dict[str, float | None] = {}

    def note(progress: LayerProgress) -> None:
        errors[progress.name] = progress.error
        if on_layer is not None:
            on_layer(progress)

    input_ids = None if calibration is None else calibration.input_ids
    facts = pruner.prune(model, amount, input_ids, skip=skip, batch_size=batch_size, on_layer=note)
    left = set(model.modules())
    layers = tuple(
        PrunedLayer(
            name=name,
            shape=shape,
            new_shape=_shape(module) if module in left else None,
            sparsity=share_of_zeros(_weight(module)) if module in left else None,
            output_error=errors.get(name),
        )
        for module, (name, shape) in before.items()
    )
    return PruneReport(
        method=_name_of(pruner),
        amount=str(amount),
        layers=layers,
        num_parameters=num_parameters,
        new_num_parameters=int(model.num_parameters()),
        facts=facts,
        note=ZEROS_NOTE if isinstance(pruner, Magnitude | Wanda | SparseGpt) else "",
    )


def pruner_named(name: str) -> Pruner:
    """The method of this name with its default settings.

    Raises:
        InputError: there is none.
    """
    if name not in PRUNERS:
        raise InputError(f"the pruner is {name!r}, expected one of {', '.join(PRUNERS)}")
    return PRUNERS[name]()


def _name_of(pruner: Pruner) -> str:
    return next((name for name, known in PRUNERS.items() if type(pruner) is known), type(pruner).__name__)


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = _weight(module).shape
    return rows, columns
