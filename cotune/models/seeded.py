"""Randomness of libraries that know only the global generator, without touching what others draw from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Inside, PyTorch's CPU generator starts from `seed`; afterwards it is as it was.

    Example:
        >>> with seeded(7, 1): a = torch.rand(())
        >>> with seeded(7, 1): b = torch.rand(())
        >>> bool(a == b)
        True
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
    try:
        yield
    finally:
        torch.set_rng_state(before)
