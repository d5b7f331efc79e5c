"""Likelihoods under a model with a soft prompt or a prefix, which the features of a `Backbone` do not know of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.data.batches import EncodedExample, pad_batch
from cotune.errors import InputError
from cotune.tuning.answer_loss import answer_nats

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def prompted_nats(model: PreTrainedModel, examples: Sequence[EncodedExample]) -> NDArray[np.float32]:
    """-log p(target) of every target position, float32 (positions,), as `target_nats` gives it for a backbone.

    Args:
        model: what `attach` gives.
        examples: one after another, in this order.

    Raises:
        InputError: there are no examples.
    """
    if not examples:
        raise InputError("there are no examples, expected at least one")
    params = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = model.get_output_embeddings()
    # One text at a time needs no padding token.
    return np.concatenate([answer_nats(model, head, params, pad_batch([each], 0)).cpu().numpy() for each in examples])
