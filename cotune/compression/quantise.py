"""Quantise a model in memory, by any method, and say what became of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from cotune.compression.awq import Awq
from cotune.compression.calibration import (
    CalibrationTexts,
    LayerProgress,
    LayerStatistics,
    check_finite,
    head_statistics,
    squared_outputs,
)
from cotune.compression.gptq import Gptq
from cotune.compression.grid import Grid
from cotune.compression.round_to_nearest import RoundToNearest, round_to_nearest
from cotune.errors import InputError
from cotune.models.anatomy import output_embedding
from cotune.models.packed_weights import PackedWeight

LOOKUP_SHARE = 0.3
"""Of a weight that is both head and embedding: what an error of a looked-up row weighs in all directions alike, beside
the directions that the head reads. The best of 0.01 to 10 on a model of 8 million parameters, and flat around it."""
_ROWS_AT_A_TIME = 16384


class Quantiser(Protocol):
    """A way to quantise the linear layers of a model's decoder blocks. Its settings are its fields."""

    def quantise_layer(self, weight: Tensor, statistics: LayerStatistics, grid: Grid) -> PackedWeight:
        """Quantise a weight (out, in) by what it reads, each row by itself."""
        ...

    def quantise_linears(
        self,
        model: PreTrainedModel,
        input_ids: NDArray[np.int64] | None,
        grid: Grid,
        *,
        skip: Collection[str] = (),
        batch_size: int = 4,
        on_layer: Callable[[LayerProgress], None] | None = None,
    ) -> dict[str, PackedWeight]:
        """Give the layers the values of the packed weights, which come back by layer.

        Arguments as of `compress_linears`; `input_ids` are None where there are no texts.

        Raises:
            InputError: as there; or it learns from texts and there are none.
        """
        ...


QUANTISERS: dict[str, type[Quantiser]] = {"rtn": RoundToNearest, "gptq": Gptq, "awq": Awq}
"""Each with its settings as keywords."""


@dataclass(frozen=True, kw_only=True)
class QuantisedLayer:
    """What became of one weight.

    Attributes:
        name: of the parameter in the model.
        shape: (out, in).
        bits, group_size, is_symmetric: of its packed form.
        size_bytes: in a file.
        output_error: share of the layer's squared output on the calibration texts that is lost; None where none were
            given, and for an embedding that is no head.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    is_symmetric: bool
    size_bytes: int
    output_error: float | None


@dataclass(frozen=True, kw_only=True)
class QuantisationReport:
    """What became of a model.

    Attributes:
        method: a key of `QUANTISERS`.
        layers: the quantised weights, in the model's order.
        packed: the weights themselves, by the names of their parameters.
        whole_numbers: how many numbers of the model stay whole.
    """

    method: str
    layers: tuple[QuantisedLayer, ...]
    packed: dict[str, PackedWeight] = field(repr=False)
    whole_numbers: int

    @property
    def bits_per_weight(self) -> float:
        """Of the quantised weights, with scales and zero points."""
        return 8 * sum(layer.size_bytes for layer in self.layers) / sum(np.prod(layer.shape) for layer in self.layers)

    @property
    def size_bytes(self) -> int:
        """Of the whole model, whole numbers in 16 bits."""
        return sum(layer.size_bytes for layer in self.layers) + 2 * self.whole_numbers

    @property
    def share_of_bf16(self) -> float:
        """The model's size against all its numbers in 16 bits."""
        quantised = sum(int(np.prod(layer.shape)) for layer in self.layers)
        return self.size_bytes / (2 * (quantised + self.whole_numbers))

    def as_json(self) -> dict[str, Any]:
        """All but the weights, JSON values only."""
        return {
            "method": self.method,
            "layers": [vars(layer) | {"shape": list(layer.shape)} for layer in self.layers],
            "whole_numbers": self.whole_numbers,
            "bits_per_weight": self.bits_per_weight,
            "size_bytes": self.size_bytes,
            "share_of_bf16": self.share_of_bf16,
        }


def quantise(
    model: PreTrainedModel,
    how: str | Quantiser = "gptq",
    *,
    bits: int = 4,
    group_size: int | None = 32,
    is_symmetric: bool = False,
    calibration: CalibrationTexts | None = None,
    embedding_bits: int | None = None,
    head_bits: int | None = None,
    skip: Collection[str] = (),
    batch_size: int = 4,
    on_layer: Callable[[LayerProgress], None] | None = None,
) -> QuantisationReport:
    """Quantise the linear layers of a model in place: afterwards it computes with the numbers that a file will hold.

    What was made of the weights before, such as a `Backbone` around the model, is to be made anew. After an error the
    model may be changed in part.

    Args:
        model: in evaluation mode, with whole weights (best as float32) and without adapters.
        how: a key of `QUANTISERS`, or one with settings, such as `Gptq(orders_by_activation=True)`.
        bits, group_size, is_symmetric: see `Grid`.
        calibration: texts; round-to-nearest needs none and then reports no errors.
        embedding_bits, head_bits: bits of input embedding and head, after all else; None leaves them whole. Where they
            are one weight, one of the two will do. With texts the head is quantised by the same method, for what it
            reads of them; an embedding of its own is rounded to nearest.
        skip, batch_size, on_layer: see `compress_linears`.

    Raises:
        InputError: an unknown method, bits or groups; no texts where they are needed; a model or texts that cannot be
            used.

    Example:
        >>> backbone = Backbone.from_pretrained("starter")  # doctest: +SKIP
        >>> report = quantise(backbone.model, "rtn", bits=4, group_size=64)  # doctest: +SKIP
        >>> report.share_of_bf16  # doctest: +SKIP
    """
    quantiser = quantiser_named(how) if isinstance(how, str) else how
    grid = Grid(bits=bits, group_size=group_size, is_symmetric=is_symmetric)
    ends = _ends(model, grid, embedding_bits, head_bits)
    check_finite(model)
    errors: dict[str, float | None] = {}

    def note(progress: LayerProgress) -> None:
        errors[f"{progress.name}.weight"] = progress.error
        if on_layer is not None:
            on_layer(progress)

    input_ids = None if calibration is None else calibration.input_ids
    by_layer = quantiser.quantise_linears(model, input_ids, grid, skip=skip, batch_size=batch_size, on_layer=note)
    packed = {f"{name}.weight": weight for name, weight in by_layer.items()}
    for name, own_grid in ends.items():
        parameter = model.get_parameter(name)
        if input_ids is not None and parameter is output_embedding(model).weight:
            reads = head_statistics(model, input_ids, batch_size=batch_size)
            packed[name], errors[name] = _quantised_head(model, quantiser, reads, own_grid)
        else:
            packed[name] = round_to_nearest(parameter.detach(), own_grid)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(packed[name].dequantised()))
    return QuantisationReport(
        method=_name_of(quantiser),
        layers=tuple(
            QuantisedLayer(
                name=name,
                shape=weight.shape,
                bits=weight.bits,
                group_size=weight.group_size,
                is_symmetric=weight.is_symmetric,
                size_bytes=weight.size_bytes,
                output_error=errors.get(name),
            )
            for name, weight in packed.items()
        ),
        packed=packed,
        whole_numbers=int(model.num_parameters()) - sum(weight.codes.size for weight in packed.values()),
    )


def _quantised_head(
    model: PreTrainedModel, quantiser: Quantiser, reads: LayerStatistics, grid: Grid
) -> tuple[PackedWeight, float]:
    """The head's weight, and the share of the squared logits that is lost."""
    embedding: nn.Module = model.get_input_embeddings()
    weight = output_embedding(model).weight
    weighed = reads.with_lookups(LOOKUP_SHARE) if weight is embedding.weight else reads
    parts, whole, lost = [], 0.0, 0.0
    # A vocabulary has very many rows, each of which is quantised by itself.
    for rows in torch.split(weight.detach().float(), _ROWS_AT_A_TIME):
        part = quantiser.quantise_layer(rows, weighed, grid)
        parts.append(part)
        whole += squared_outputs(rows, reads.gram)
        lost += squared_outputs(rows - torch.from_numpy(part.dequantised()).to(rows), reads.gram)
    return PackedWeight.of_rows(parts), lost / whole if whole > 0 else 0.0


def quantiser_named(name: str) -> Quantiser:
    """The method of this name with its default settings.

    Raises:
        InputError: there is none.
    """
    if name not in QUANTISERS:
        raise InputError(f"the quantiser is {name!r}, expected one of {', '.join(QUANTISERS)}")
    return QUANTISERS[name]()


def _name_of(quantiser: Quantiser) -> str:
    return next((name for name, known in QUANTISERS.items() if type(quantiser) is known), type(quantiser).__name__)


def _ends(model: PreTrainedModel, grid: Grid, embedding_bits: int | None, head_bits: int | None) -> dict[str, Grid]:
    """The grids of input embedding and head, by their parameters' names; tied ones once."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    embedding: nn.Module = model.get_input_embeddings()
    wanted = [(embedding.weight, embedding_bits), (output_embedding(model).weight, head_bits)]
    found: dict[str, Grid] = {}
    for weight, bits in wanted:
        if bits is None:
            continue
        own = Grid(bits=bits, group_size=grid.group_size, is_symmetric=grid.is_symmetric)
        if found.setdefault(names[weight], own) != own:
            raise InputError(
                f"embedding_bits are {embedding_bits} and head_bits {head_bits}, expected the same, since this model's "
                "embedding and head are one weight; give one of them"
            )
    return found
