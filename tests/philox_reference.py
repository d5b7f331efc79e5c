"""Directions of signs in NumPy, written from the formula and sharing no code with `cotune.tuning.directions`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def philox_block(seed: int, counter: list[int]) -> list[int]:
    """Philox 4x32-10, the round function as its authors print it, with Python's integers."""
    c, key = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        low, high = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(high >> 32) ^ c[1] ^ key[0], high & 0xFFFFFFFF, (low >> 32) ^ c[3] ^ key[1], low & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def reference_signs(seed: int, start: int, num: int) -> NDArray[np.float64]:
    """Signs `start` to `start + num`, one by one."""
    blocks: dict[int, list[int]] = {}
    signs = []
    for e in range(start, start + num):
        block, place = divmod(e // 32, 4)
        if block not in blocks:
            blocks[block] = philox_block(seed, [block & 0xFFFFFFFF, block >> 32, 0, 0])
        signs.append(1 - 2 * (blocks[block][place] >> (15 - e % 32 // 2 + 16 * (e % 2)) & 1))
    return np.array(signs, np.float64)
