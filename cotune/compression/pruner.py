"""What every way to prune a model can do, and how the amounts that it is asked for are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from cotune.compression.calibration import LayerProgress, chosen_linears
from cotune.compression.sparsity import Sparsity, parse_group
from cotune.errors import InputError

Amount = float | str | Sparsity
"""How much goes: a share such as 0.5, a number of blocks, a pattern such as `2:4`, or a `Sparsity`. Texts are read as
they would be written in Python."""

Facts = Mapping[str, Any]
"""What a method found and chose, JSON values."""


class Pruner(Protocol):
    """A way to prune a model. Its settings are its fields."""

    def prune(
        self,
        model: PreTrainedModel,
        amount: Amount,
        input_ids: NDArray[np.int64] | None,
        *,
        skip: Collection[str] = (),
        batch_size: int = 4,
        on_layer: Callable[[LayerProgress], None] | None = None,
    ) -> Facts:
        """Change a model in place.

        Args:
            model: in evaluation mode, with whole weights and without adapters.
            amount: how much goes.
            input_ids: int64 (num_texts, length), as in `CalibrationTexts`; None where there are none.
            skip: layers that stay as they are, see `compress_linears`; for methods that set weights to zero.
            batch_size: texts in one pass.
            on_layer: called after each layer that was changed, by methods that go layer by layer.

        Raises:
            InputError: an amount, texts or a model that the method cannot use; says what it expects.
        """
        ...


def sparsity_of(amount: Amount, of_share: Callable[[float], Sparsity]) -> Sparsity:
    """The pattern that is asked for; a share becomes that of `of_share`.

    Raises:
        InputError: it is no pattern and no share.

    Example:
        >>> from cotune.compression.sparsity import RowSparsity
        >>> sparsity_of("0.5", RowSparsity), sparsity_of("2:4", RowSparsity)
        (RowSparsity(share=0.5), GroupSparsity(kept=2, group=4))
    """
    if isinstance(amount, str) and ":" in amount:
        return parse_group(amount)
    if isinstance(amount, str | int | float):
        return of_share(share_of(amount))
    return amount


def share_of(amount: Amount) -> float:
    """The share that is asked for, above 0 and below 1.

    Raises:
        InputError: it is none.
    """
    share = _number(amount)
    if share is None or not 0 < share < 1:
        raise InputError(f"the amount is {amount!r}, expected a share above 0 and below 1, such as 0.25")
    return share


def count_of(amount: Amount) -> int:
    """The whole number that is asked for, at least 1.

    Raises:
        InputError: it is none.
    """
    count = _number(amount)
    if count is None or count < 1 or not count.is_integer():
        raise InputError(f"the amount is {amount!r}, expected a whole number of blocks, such as 2")
    return int(count)


def texts_of(input_ids: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """The texts.

    Raises:
        InputError: there are none.
    """
    if input_ids is None:
        raise InputError("no calibration texts came, which this method learns from; give some, or take magnitude")
    return input_ids


def refuse_skip(skip: Collection[str]) -> None:
    """Raise `InputError` where layers are to be left out of a method that makes all of them smaller."""
    if skip:
        raise InputError(f"skip is {list(skip)}, expected none: this method makes all blocks alike")


def check_layers(model: PreTrainedModel, sparsity: Sparsity, skip: Collection[str]) -> None:
    """Raise `InputError` where a layer cannot have the pattern, before any is changed."""
    for linear in chosen_linears(model, skip).values():
        sparsity.check(linear.in_features)


def _number(amount: Amount) -> float | None:
    if isinstance(amount, str | int | float):
        try:
            return float(amount)
        except ValueError:
            return None
    return None
