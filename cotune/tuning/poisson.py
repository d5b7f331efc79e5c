"""Poisson sampling of texts from a secret seed: what the privacy accounts of DP training assume.

At each step every text is in the batch with probability q, independently of all others and of all other steps (Abadi
et al., arXiv 1607.00133, section 3.1; Mironov et al., arXiv 1908.10530). So batches differ in size, and may be empty.

Who knows the seed knows which texts were in which step and what the noise was, and can take the noise away: nothing
is then private. So the seed comes from the operating system, is part of the state (the checkpoint, which only its
owner may read) and stands in no config or report. Delete the checkpoint when the run is over.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.errors import InputError
from cotune.tuning.tuner import BatchT

SEED_BITS = 128
# What a stream of random numbers is for; two purposes never share one.
SAMPLING, NOISE = 0, 1


@dataclass
class SecretSeed:
    """128 bits that all randomness of a private run follows from.

    Attributes:
        value: the bits; a resumed run takes over those of its checkpoint.
    """

    value: int

    def __post_init__(self) -> None:
        if not 0 <= self.value < 2**SEED_BITS:
            raise InputError(f"the secret seed has {self.value.bit_length()} bits, expected at most {SEED_BITS}")

    def __repr__(self) -> str:
        return "SecretSeed(...)"  # it must not end up in a log

    @classmethod
    def draw(cls) -> SecretSeed:
        """A new one, from the operating system."""
        return cls(secrets.randbits(SEED_BITS))

    def generator(self, purpose: int, step: int) -> np.random.Generator:
        """The random numbers of one step for one purpose, the same at each call, on every machine.

        Example:
            >>> seed = SecretSeed(7)
            >>> float(seed.generator(NOISE, 3).random()) == float(seed.generator(NOISE, 3).random())
            True
        """
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.value, purpose, step))))

    def to_tensor(self) -> Tensor:
        """uint8 (16,), for a checkpoint."""
        return torch.tensor(list(self.value.to_bytes(SEED_BITS // 8, "little")), dtype=torch.uint8)

    def load_tensor(self, tensor: Tensor) -> None:
        """Take over what `to_tensor` gave."""
        if tensor.dtype != torch.uint8 or tensor.shape != (SEED_BITS // 8,):
            raise InputError("the checkpoint's secret seed is damaged, expected 16 bytes; start without resuming")
        self.value = int.from_bytes(bytes(tensor.tolist()), "little")


@dataclass(frozen=True)
class PoissonBatch(Generic[BatchT]):
    """The texts of one step, in parts that fit the memory together with the gradient of each text.

    Attributes:
        parts: batches of at least one text each; none where no text was drawn.
    """

    parts: tuple[BatchT, ...]


class PoissonBatches(Generic[BatchT]):
    """Batches of texts drawn with probability q each: `len` of them make up an epoch, round(1 / q).

    Args:
        num_texts: N.
        sample_rate: q, 0 to 1.
        num_part_texts: the most in one part.
        secret: read when an epoch begins, so that a resumed state can bring its own.
        take: from ascending int64 (texts,) indices to a part.

    Raises:
        InputError: no texts, or an impossible rate or part.
    """

    def __init__(
        self,
        num_texts: int,
        *,
        sample_rate: float,
        num_part_texts: int,
        secret: SecretSeed,
        take: Callable[[NDArray[np.int64]], BatchT],
    ) -> None:
        if num_texts < 1:
            raise InputError("there are no texts, expected at least one")
        if not 0 < sample_rate <= 1:
            raise InputError(f"sample_rate is {sample_rate}, expected above 0 and at most 1")
        if num_part_texts < 1:
            raise InputError(f"num_part_texts is {num_part_texts}, expected at least 1")
        self._num_texts, self._sample_rate, self._num_part_texts = num_texts, sample_rate, num_part_texts
        self._secret, self._take = secret, take

    def __len__(self) -> int:
        return round(1 / self._sample_rate)

    def epoch(self, epoch: int) -> Iterator[PoissonBatch[BatchT]]:
        for number in range(len(self)):
            yield self._batch(self.draw(epoch * len(self) + number))

    def draw(self, step: int) -> NDArray[np.int64]:
        """Which texts step number `step` reads, int64 (texts,), ascending."""
        chances = self._secret.generator(SAMPLING, step).random(self._num_texts)
        return np.flatnonzero(chances < self._sample_rate)

    def _batch(self, texts: NDArray[np.int64]) -> PoissonBatch[BatchT]:
        if not len(texts):
            return PoissonBatch(())
        num_parts = -(-len(texts) // self._num_part_texts)
        return PoissonBatch(tuple(self._take(part) for part in np.array_split(texts, num_parts)))


class WholeBatches(Generic[BatchT]):
    """Every text once, in order, as the same kind of batches: to judge by, not to learn from.

    Args:
        num_texts: there are.
        num_part_texts: the most in one batch.
        take: as in `PoissonBatches`.
    """

    def __init__(self, num_texts: int, num_part_texts: int, take: Callable[[NDArray[np.int64]], BatchT]) -> None:
        self._parts = np.array_split(np.arange(num_texts), -(-num_texts // num_part_texts))
        self._take = take

    def __len__(self) -> int:
        return len(self._parts)

    def epoch(self, epoch: int) -> Iterator[PoissonBatch[BatchT]]:
        for part in self._parts:
            yield PoissonBatch((self._take(part),))
