"""A causal model of any architecture with an adapter from a folder, such as the proxy with what a federation learnt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cotune.errors import InputError
from cotune.federation.causal_model import CausalModel
from cotune.models.adapter_folder import load_adapter
from cotune.models.peft_adapter import PeftAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TunedModel:
    """A model that is not loaded.

    Attributes:
        model: as it was given.
        adapter: folder of what it has learnt, in its layers; None: nothing beside its weights.

    Example:
        >>> with TunedModel(CausalModel("starter")).loaded() as model:
        ...     model.device.type
        'cpu'
    """

    model: CausalModel
    adapter: Path | None = None

    @contextmanager
    def loaded(self) -> Iterator[PreTrainedModel]:
        """The frozen model with its adapter, for as long as the block.

        Raises:
            InputError: the model or its adapter cannot be loaded, or the adapter stands in front of the text.
        """
        with self.model.loaded() as model:
            if self.adapter is None:
                yield model
                return
            found = load_adapter(self.adapter, model)
            if isinstance(found, PeftAdapter) and found.config.is_prompt_learning:
                kind = found.config.peft_type.value
                raise InputError(
                    f"{self.adapter} holds a {kind} adapter, which stands in front of the text, expected one in the "
                    "model's layers; take a LoRA one"
                )
            with found.attach(model):
                yield model
