"""A student to start from: the teacher's own weights with some of its decoder layers left out.

DistilBERT (Sanh et al., arXiv 1910.01108) starts from every other layer of its teacher; here the layers that stay are
given, or spread evenly over the teacher's with the first and the last among them. Embeddings, norms and head are the
teacher's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cotune.errors import InputError
from cotune.models.anatomy import decoder_layers
from cotune.models.backbone import Backbone
from cotune.models.low_bit import is_low_bit
from cotune.models.seeded import seeded


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
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(chosen)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in chosen]
    # Random values that are all written over; nobody else's draws change.
    with seeded(0):
        student: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    student.load_state_dict(_renumbered(model, chosen))
    student.generation_config = copy.deepcopy(model.generation_config)
    return Backbone.from_model(student.to(model.device), teacher.tokenizer_json)


def _renumbered(model: PreTrainedModel, kept: Sequence[int]) -> dict[str, Tensor]:
    """The model's tensors without those of other layers; layer kept[i] is called layer i."""
    layers = decoder_layers(model)
    (prefix,) = (name + "." for name, module in model.named_modules() if module is layers)
    numbers = {str(index): str(number) for number, index in enumerate(kept)}
    renumbered = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(prefix):
            renumbered[name] = tensor
            continue
        index, _, rest = name.removeprefix(prefix).partition(".")
        if index in numbers:
            renumbered[f"{prefix}{numbers[index]}.{rest}"] = tensor
    return renumbered
