"""What the device half of an algorithm may do with a device's model and texts.

Algorithms see nothing else, so each of them runs as well on a toy of three numbers, which is how their formulas are
tested. `cotune.federation.backbone_model` is the real one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.arrays import Arrays, Shapes
from cotune.federation.number_ranges import check_at_least, check_positive

OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True, kw_only=True)
class LocalSteps:
    """How a device goes through its own texts in one round."""

    num_steps: int = 10
    """Batches; after the last text it begins again, in another order."""
    batch_size: int = 8
    """Texts in one."""
    learning_rate: float = 1e-3
    optimizer: str = "adamw"
    """`adamw`, which starts without moments in every round, or `sgd`."""

    def __post_init__(self) -> None:
        check_at_least(1, num_steps=self.num_steps, batch_size=self.batch_size)
        check_positive(learning_rate=self.learning_rate)
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"optimizer is {self.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What local steps gave.

    Attributes:
        arrays: the trained arrays alone.
        loss: mean of the steps' losses, nats per token.
    """

    arrays: dict[str, NDArray[np.float32]]
    loss: float


class Walk(Protocol):
    """Forward-only steps: parameters that stay in the model and are moved along directions of signs.

    A direction is its seed, below 2^63; see `cotune.tuning.directions`.
    """

    def slope(self, direction_seed: int, zo_eps: float) -> float:
        """(L(theta + eps z) - L(theta - eps z)) / (2 eps) on the batch at hand, nats per token per unit along z.

        Raises:
            NonFiniteLossError: a loss is nan or inf.
        """
        ...

    def next_batch(self) -> None:
        """Later slopes are of the next batch of texts."""
        ...

    def move(self, direction_seeds: Sequence[int], amounts: Sequence[float]) -> None:
        """theta <- theta + sum_j amount_j z_j, each number rounded once."""
        ...

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """Theta, copied."""
        ...

    @property
    def loss(self) -> float:
        """Mean of the losses that the slopes so far were measured from; nan before the first."""
        ...


class HasTexts(Protocol):
    """What a device says of itself in every reply."""

    @property
    def num_examples(self) -> int:
        """Texts to learn from."""
        ...


class LocalModel(HasTexts, Protocol):
    """A device's model with its own texts. `params` is always a whole adapter."""

    @property
    def adapter_shapes(self) -> Shapes:
        """Of all arrays of an adapter, by name."""
        ...

    def descend(self, params: Arrays, trained: Sequence[str], steps: LocalSteps, *, seed: int) -> Trained:
        """Back-propagation from `params` on; only `trained` change.

        Raises:
            NonFiniteLossError: a loss is nan or inf.
        """
        ...

    def walk(self, params: Arrays, tuned: Sequence[str], *, batch_size: int, seed: int) -> AbstractContextManager[Walk]:
        """Forward-only steps from `params` on; directions are over `tuned`, in alphabetical order."""
        ...

    def gradient(
        self, params: Arrays, names: Sequence[str], *, num_batches: int, batch_size: int, seed: int
    ) -> dict[str, NDArray[np.float32]]:
        """Mean gradient of the loss over some batches, by name."""
        ...

    def activation_sketches(
        self, omegas: Arrays, *, num_batches: int, batch_size: int, seed: int
    ) -> dict[str, NDArray[np.float32]]:
        """X^T X Omega / tokens for each adapted layer, where X (tokens, in) are its inputs without an adapter.

        Args:
            omegas: Omega (in, width) by the name of the layer's A, as `cotune.federation.activation_statistics` has it.
            num_batches: of texts.
            batch_size: texts in one.
            seed: of their order.

        Returns:
            (in, width) by the same names.
        """
        ...

    def folded(self, params: Arrays) -> AbstractContextManager[None]:
        """Inside, the frozen weights hold W + s B A of these factors too; afterwards they are the same bits as before.

        Raises:
            InputError: it is no LoRA, or the weights have few bits.
        """
        ...

    def hidden_states(self, params: Arrays, *, batch_size: int, seed: int) -> list[NDArray[np.float32]]:
        """What each layer gives for one batch of texts, (batch, ...) for each layer; zero at padding."""
        ...

    def evaluate(self, params: Arrays) -> tuple[float, int]:
        """Sum of the loss over its texts in nats, and the number of tokens."""
        ...
