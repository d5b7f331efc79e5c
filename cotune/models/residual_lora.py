"""A LoRA that starts inside the weights: PiSSA, OLoRA, CorDA and LoRA-GA move a part of W into the adapter.

    y = (W - s B0 A0) x + s B A x,    B = B0 and A = A0 at the start

Symbols: as in `cotune.models.adapters`; B0, A0 the start. The frozen part is another one than the model's, so such an
adapter is none for the model as it is. What is trained becomes an ordinary LoRA of twice the rank:

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cotune.models.adapters import LoraAdapter
from cotune.models.selected import SelectedParameters

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ResidualLora:
    """A LoRA adapter and the rest of the weights that it was taken from.

    Attributes:
        adapter: with A and B as they are now.
        start: A0 and B0, by the names of the adapter's `params`.
        residual: W - s B0 A0 of the adapted layers.
    """

    adapter: LoraAdapter
    start: dict[str, Tensor]
    residual: SelectedParameters

    @property
    def params(self) -> dict[str, Tensor]:
        return self.adapter.params

    @property
    def num_parameters(self) -> int:
        return self.adapter.num_parameters

    @property
    def num_virtual_tokens(self) -> int:
        """None: it stands in layers."""
        return 0

    @contextmanager
    def attach(self, model: PreTrainedModel) -> Iterator[peft.PeftModel]:
        """Inside, `model` is the residual with the adapter; afterwards it has its own weights again, bit for bit."""
        with self.residual.attach(model), self.adapter.attach(model) as wrapped:
            yield wrapped

    def trained(self, params: Mapping[str, Tensor]) -> LoraAdapter:
        """The ordinary LoRA of twice the rank, for the model as it is, that does what A and B in `params` do here."""
        joined: dict[str, Tensor] = {}
        for name, now in params.items():
            before = self.start[name].to(now.device)
            is_a = ".lora_A." in name
            joined[name] = torch.cat([now, before], dim=0) if is_a else torch.cat([now, -before], dim=1)
        shape = self.adapter.shape
        # alpha / (2 rank) and alpha / sqrt(2 rank) have to be what they were.
        alpha = shape.alpha * (2**0.5 if shape.use_rslora else 2)
        return LoraAdapter(shape=replace(shape, rank=2 * shape.rank, alpha=alpha), params=joined)

    def merge(self, model: PreTrainedModel) -> SelectedParameters:
        """The adapted layers' weights with what A and B do now.

        Raises:
            InputError: the model has low-bit weights.
        """
        return self.trained(self.params).merge(model)

    def save(self, folder: Path, model: PreTrainedModel) -> None:
        """Write the ordinary LoRA of twice the rank.

        Raises:
            InputError: the folder cannot be written.
        """
        self.trained(self.params).save(folder, model)
