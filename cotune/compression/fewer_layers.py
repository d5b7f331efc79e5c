"""A model with some of its decoder layers left out: pruned in place, or as a student beside its teacher.

DistilBERT (Sanh et al., arXiv 1910.01108) starts from every other layer of its teacher; here the layers that stay are
given, or spread evenly over the teacher's with the first and the last among them. Embeddings, norms and head are the
teacher's.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cotune.errors import InputError
from cotune.models.anatomy import decoder_layers
from cotune.models.backbone import Backbone
from cotune.models.low_bit import is_low_bit


def drop_blocks(model: PreTrainedModel, blocks: Collection[int]) -> None:
    """Take blocks out of a model in place; the others move up, and the config says how many there are.

    Args:
        model: of any architecture whose blocks are alike but for what `layer_types` of the config says.
        blocks: their indices; one block at least stays.

    Raises:
        InputError: there are no such blocks, or none would stay.

    Example:
        >>> drop_blocks(model, [3, 4])  # doctest: +SKIP
    """
    layers = decoder_layers(model)
    gone = set(blocks)
    if not gone <= set(range(len(layers))) or not 0 < len(gone) < len(layers):
        raise InputError(
            f"the blocks to drop are {sorted(gone)}, expected some but not all of 0 to {len(layers) - 1}, the model's"
        )
    for index in sorted(gone, reverse=True):
        del layers[index]
    for index, layer in enumerate(layers):
        for part in layer.modules():
            # Attention finds its keys and values in the cache by it.
            if "layer_idx" in vars(part):
                vars(part)["layer_idx"] = index
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    if types is not None:
        config.layer_types = [kind for index, kind in enumerate(types) if index not in gone]
    config.num_hidden_layers = len(layers)


def spread_layers(num_layers: int, num_kept: int) -> tuple[int, ...]:
    """Indices of `num_kept` of `num_layers` layers, evenly spread, with the first and the last; the first alone for 1.

    Raises:
        InputError: none is kept, or more than there are.

    Example:
        >>> spread_layers(12, 4)
        (0, 4, 7, 11)
    """
    if not 1 <= num_kept <= num_layers:
        raise InputError(f"num_kept is {num_kept}, expected 1 to {num_layers}, the layers of the teacher")
    if num_kept == 1:
        return (0,)
    return tuple(round(index * (num_layers - 1) / (num_kept - 1)) for index in range(num_kept))


def with_fewer_layers(teacher: Backbone, kept: Sequence[int]) -> Backbone:
    """A model of its own with copies of the teacher's weights, ready to be trained.

    Args:
        teacher: stays as it is.
        kept: indices of its decoder layers that the student has, ascending, counted from 0.

    Raises:
        InputError: an index that is no layer, another order, or weights of few bits.

    Example:
        >>> teacher = Backbone.from_pretrained("starter")  # doctest: +SKIP
        >>> student = with_fewer_layers(teacher, spread_layers(teacher.spec.num_layers, 2))  # doctest: +SKIP
    """
    model = teacher.model
    num_layers = teacher.spec.num_layers
    chosen = list(kept)
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= num_layers:
        raise InputError(f"kept is {chosen}, expected ascending indices of layers, some of 0 to {num_layers - 1}")
    if is_low_bit(model):
        raise InputError("the teacher has weights of few bits, expected whole ones to copy; load it without base bits")
    gone = set(range(num_layers)) - set(chosen)
    student = _copied(model, [layer for index, layer in enumerate(decoder_layers(model)) if index in gone])
    if gone:
        drop_blocks(student, gone)
    return Backbone.from_model(student, teacher.tokenizer_json)


def _copied(model: PreTrainedModel, shared: Sequence[nn.Module]) -> PreTrainedModel:
    """A copy without the hooks of whoever watches the model; `shared` modules, which will leave it, are not copied."""
    memo: dict[int, Any] = {id(module): module for module in shared}
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            memo[id(hooks)] = OrderedDict()
    return copy.deepcopy(model, memo)
