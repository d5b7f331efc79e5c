"""Random directions of signs (Rademacher) from counter-based bits: the same on every CPU and GPU.

    z_e = 1 - 2 b,   b = bit 15 - (e mod 32) div 2 + 16 (e mod 2) of word e div 32

Symbols: e counts the tuned numbers; word w is number w mod 4 of the block Philox 4x32-10 (Salmon et al., SC 2011,
"Parallel random numbers: as easy as 1, 2, 3") with the seed as its 64-bit key and w div 4 as its 128-bit counter. So a
sign is a pure function of (seed, e). Integer arithmetic makes it, and nothing rounds: all devices agree bit for bit.
The order of bits lets one shift serve two 16-bit numbers. E[z z^T] = I, as MeZO needs it, and z^2 = 1 exactly.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.errors import InputError

SIGNS_PER_WORD = 32
SIGNS_PER_BLOCK = 128
"""Signs of one Philox block; each parameter begins at a multiple of it."""
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_FACTORS = np.array(_MULTIPLIERS, np.uint64)[:, None]
_KEYS_OF_ROUNDS = np.arange(_ROUNDS, dtype=np.uint32)[:, None] * np.array(_KEY_STEPS, np.uint32)
_MASK = 0xFFFFFFFF
# Signs of one page, in which words are made: few calls, and integers that stay in the cache.
_PAGE_SIGNS = {"cpu": 2**20}
_PAGE_SIGNS_ELSEWHERE = 2**26


def philox(seed: int, counters: Tensor) -> Tensor:
    """Philox 4x32-10.

    Args:
        seed: the key, 0 <= seed < 2^64.
        counters: int64 (n,), the low 64 bits of each block's counter; the high ones are 0.

    Returns:
        int64 (n, 4), numbers below 2^32.

    Example:
        >>> [f"{word:08x}" for word in philox(0, torch.tensor([0]))[0].tolist()]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    if counters.device.type == "cpu":
        return torch.from_numpy(_philox_in_numpy(seed, counters.numpy()))
    return _philox_in_torch(seed, counters)


def _philox_in_torch(seed: int, counters: Tensor) -> Tensor:
    """For accelerators, where each operation costs a launch, and many numbers are made at once."""
    c0, c1 = counters & _MASK, (counters >> 32) & _MASK
    c2, c3 = torch.zeros_like(counters), torch.zeros_like(counters)
    keys = (seed & _MASK, seed >> 32)
    for _ in range(_ROUNDS):
        # Products of two 32-bit numbers: int64 wraps round, and the mask takes the sign's copies away again.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (second >> 32).bitwise_and_(_MASK).bitwise_xor_(c1).bitwise_xor_(keys[0])
        c2 = (first >> 32).bitwise_and_(_MASK).bitwise_xor_(c3).bitwise_xor_(keys[1])
        c1, c3 = second.bitwise_and_(_MASK), first.bitwise_and_(_MASK)
        keys = ((keys[0] + _KEY_STEPS[0]) & _MASK, (keys[1] + _KEY_STEPS[1]) & _MASK)
    return torch.stack((c0, c1, c2, c3), dim=1)


def _philox_in_numpy(seed: int, counters: NDArray[np.int64]) -> NDArray[np.int64]:
    """For CPUs, where a tensor operation costs as much as thousands of numbers: both products in one operation."""
    wide = counters.view(np.uint64)
    first, second = np.zeros((2, 2, len(wide)), np.uint64)  # (c0, c2), (c1, c3)
    first[0], second[0] = wide & np.uint64(_MASK), wide >> np.uint64(32)
    keys = (_KEYS_OF_ROUNDS + np.array((seed & _MASK, seed >> 32), np.uint32)).astype(np.uint64)
    for key in keys:
        product = first * _FACTORS
        # What comes of one product goes into the other half.
        first = (product >> np.uint64(32))[::-1] ^ second
        first ^= key[:, None]
        product &= np.uint64(_MASK)
        second = product[::-1]
    return np.stack((first[0], second[0], first[1], second[1]), axis=1).view(np.int64)


def direction_seed(seed: int, *path: int) -> int:
    """The seed of one direction of a run, below 2^63, so that int64 holds it.

    Args:
        seed: of the run, 0 or more.
        path: which direction, such as its step and its number in the step; 0 or more each.

    Example:
        >>> direction_seed(0, 3, 1) == direction_seed(0, 3, 1) != direction_seed(0, 1, 3)
        True
    """
    return int(np.random.SeedSequence((seed, *path)).generate_state(1, np.uint64)[0]) >> 1


def place_parameters(sizes: Mapping[str, int]) -> dict[str, int]:
    """Where each parameter's signs begin: names in alphabetical order, one after another, in whole blocks.

    Args:
        sizes: how many numbers of each parameter are tuned.

    Example:
        >>> place_parameters({"b": 5, "a": 130})
        {'a': 0, 'b': 256}
    """
    places, end = {}, 0
    for name in sorted(sizes):
        places[name] = end
        end += -(-sizes[name] // SIGNS_PER_BLOCK) * SIGNS_PER_BLOCK
    return places


class Direction:
    """One direction; `signs` gives any piece of it, and only pieces are ever in memory.

    Args:
        seed: 0 <= seed < 2^64.
        device: where its signs are wanted.
        num_pages: pages of packed signs to keep, 128 KiB each on a CPU and 8 MiB elsewhere. A direction of few numbers
            is so made once for both forward passes and the update.
        num_signs: how many are wanted in all, where that is known: short directions have short pages.

    Raises:
        InputError: the seed is out of range.

    Example:
        >>> z = Direction(7)
        >>> bool((z.signs(0, 1000)[300:310] == z.signs(300, 10)).all())
        True
    """

    def __init__(
        self, seed: int, device: torch.device | str = "cpu", *, num_pages: int = 4, num_signs: int | None = None
    ) -> None:
        if not 0 <= seed < 2**64:
            raise InputError(f"seed is {seed}, expected 0 <= seed < 2^64")
        self.seed, self.device = seed, torch.device(device)
        page_signs = _PAGE_SIGNS.get(self.device.type, _PAGE_SIGNS_ELSEWHERE)
        if num_signs is not None:
            page_signs = min(page_signs, max(1, -(-num_signs // SIGNS_PER_BLOCK)) * SIGNS_PER_BLOCK)
        self._words_per_page = page_signs // SIGNS_PER_WORD
        self._num_pages = num_pages
        self._pages: OrderedDict[int, Tensor] = OrderedDict()

    def words(self, first: int, num: int) -> Tensor:
        """Packed signs: words `first` to `first + num`, int32 (num,)."""
        size, pieces = self._words_per_page, []
        for page in range(first // size, (first + num - 1) // size + 1):
            begin, end = max(first - page * size, 0), min(first + num - page * size, size)
            pieces.append(self._page(page)[begin:end])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def signs(self, start: int, num: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Signs `start` to `start + num`, +1 or -1 in `dtype`, (num,); a new tensor."""
        first, stop = start // SIGNS_PER_WORD, -(-(start + num) // SIGNS_PER_WORD)
        skipped = start - first * SIGNS_PER_WORD
        return unpack(self.words(first, stop - first), dtype)[skipped : skipped + num]

    def rows(self, starts: Tensor, width: int, dtype: torch.dtype = torch.float32, *, aligned: bool = False) -> Tensor:
        """`width` signs from each of these places on, (n, width); the words in between are not made.

        Args:
            starts: int64 (n,).
            width: signs of each row.
            dtype: of the result.
            aligned: every start is a multiple of `SIGNS_PER_BLOCK`, which saves work.
        """
        num_blocks = -(-width // SIGNS_PER_BLOCK) + (not aligned)
        counters = starts[:, None] // SIGNS_PER_BLOCK + torch.arange(num_blocks, device=starts.device)  # (n, blocks)
        words = _to_int32(philox(self.seed, counters.reshape(-1)))
        signs = unpack(words.reshape(-1), dtype).view(len(starts), num_blocks * SIGNS_PER_BLOCK)
        if aligned:
            return signs[:, :width]
        wanted = (starts % SIGNS_PER_BLOCK)[:, None] + torch.arange(width, device=starts.device)
        return signs.gather(1, wanted)

    def _page(self, page: int) -> Tensor:
        if page in self._pages:
            self._pages.move_to_end(page)
            return self._pages[page]
        num_counters = self._words_per_page // 4
        counters = torch.arange(page * num_counters, (page + 1) * num_counters, device=self.device)
        if len(self._pages) == self._num_pages:
            self._pages.popitem(last=False)
        self._pages[page] = _to_int32(philox(self.seed, counters)).reshape(-1)
        return self._pages[page]


def unpack(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Signs of packed words, 32 for each.

    Args:
        words: int32 (n,).
        dtype: a floating-point type.

    Returns:
        +1 or -1, (32 n,); a new tensor.

    Raises:
        InputError: no floating-point type.
    """
    if not dtype.is_floating_point:
        raise InputError(f"dtype is {dtype}, expected a floating-point type such as torch.float32")
    half = dtype in (torch.bfloat16, torch.float16)
    one, sign, shifts = _lanes(dtype if half else torch.float32, words.device)
    bits = (words[:, None] << shifts).bitwise_and_(sign).bitwise_or_(one)
    return bits.view(-1).view(dtype) if half else bits.view(-1).view(torch.float32).to(dtype)


@lru_cache
def _lanes(dtype: torch.dtype, device: torch.device) -> tuple[int, int, Tensor]:
    """How to unpack: the bits of 1, the bits of the sign, and the shifts that bring each lane's bit there."""
    shifts = torch.arange(16, dtype=torch.int32, device=device)
    if dtype == torch.float32:
        one = int(torch.tensor(1.0).view(torch.int32))
        return one, -0x80000000, torch.stack((shifts + 16, shifts), dim=1).view(-1)
    # Two numbers in one int32, the first in its low half: bit 15 is the sign of one, bit 31 that of the other.
    return int(torch.tensor([1.0, 1.0], dtype=dtype).view(torch.int32)), -0x7FFF8000, shifts


def _to_int32(words: Tensor) -> Tensor:
    """Numbers below 2^32 as int32 with the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
