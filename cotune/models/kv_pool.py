"""The keys and values of many sequences, in blocks of one size that they share out among them.

As in PagedAttention (Kwon et al., 2023): a sequence owns whole blocks, in any order, so that memory is bounded and
none is lost between sequences. Blocks are counted by owner: a fork shares the blocks of its parent, and whoever
writes to a shared one copies it first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cotune.errors import CacheFullError, InputError

BLOCK_SIZE = 64
"""Tokens in a block. Attention reads whole blocks, and kernels that read multiples of 64 keys add in one order."""

_FIRST_BLOCKS = 16


class KVPool:
    """Blocks of keys and values, one pair of tensors (blocks, block_size, kv_heads, head_dim) for each layer.

    The tensors are made by the first write, in the shape, type and place of what is written, and grow by doubling.

    Args:
        max_blocks: the most there may be; None for as many as memory holds.

    Example:
        >>> pool = KVPool(max_blocks=4)
        >>> pool.take(3)
        [0, 1, 2]
        >>> pool.num_free
        1
    """

    def __init__(self, max_blocks: int | None = None) -> None:
        if max_blocks is not None and max_blocks < 1:
            raise InputError(f"max_blocks is {max_blocks}, expected at least 1")
        self.max_blocks = max_blocks
        self._owners: list[int] = []
        self._free: list[int] = []
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks that there are by now."""
        return len(self._owners)

    @property
    def num_used(self) -> int:
        """Blocks with an owner."""
        return len(self._owners) - len(self._free)

    @property
    def num_free(self) -> int | None:
        """Blocks that can still be taken; None without a bound."""
        return None if self.max_blocks is None else self.max_blocks - self.num_used

    @property
    def size_bytes(self) -> int:
        """Memory of all blocks."""
        return sum(t.nbytes for t in [*self._keys.values(), *self._values.values()])

    def take(self, num_blocks: int) -> list[int]:
        """Own `num_blocks` more blocks, in ascending order where possible.

        Raises:
            CacheFullError: there are not that many; none is taken.
        """
        free = self.num_free
        if free is not None and num_blocks > free:
            raise CacheFullError(num_blocks, free)
        while len(self._free) < num_blocks:
            first = len(self._owners)
            more = max(_FIRST_BLOCKS, first)
            if self.max_blocks is not None:
                more = min(more, self.max_blocks - first)
            self._owners += [0] * more
            # The free list is a stack: the lowest number comes off first.
            self._free[:0] = range(first + more - 1, first - 1, -1)
        taken = [self._free.pop() for _ in range(num_blocks)]
        for block in taken:
            self._owners[block] = 1
        return taken

    def grow_to(self, num_blocks: int) -> None:
        """Have at least so many blocks. The new ones are owned from outside: another pool hands them out."""
        self._owners += [1] * (num_blocks - len(self._owners))

    def share(self, blocks: list[int]) -> None:
        """One more owner for each of `blocks`."""
        for block in blocks:
            self._owners[block] += 1

    def drop(self, blocks: list[int]) -> None:
        """One owner less for each of `blocks`; those without one are free."""
        for block in reversed(blocks):
            self._owners[block] -= 1
            assert self._owners[block] >= 0
            if self._owners[block] == 0:
                self._free.append(block)

    def is_shared(self, block: int) -> bool:
        return self._owners[block] > 1

    def copy(self, source: int, target: int) -> None:
        """Copy what is in one block to another, in all layers."""
        with torch.inference_mode():
            for tensors in (self._keys, self._values):
                for layer, tensor in tensors.items():
                    if len(tensor) < len(self._owners):
                        tensors[layer] = self._grown(tensor)
                    tensors[layer][target] = tensors[layer][source]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values (tokens, kv_heads, head_dim) into `slots`, int64 (tokens,): block * size + offset."""
        for tensors, new in ((self._keys, keys), (self._values, values)):
            tensor = tensors.get(layer)
            if tensor is None:
                tensor = tensors[layer] = new.new_zeros((len(self._owners), BLOCK_SIZE, *new.shape[1:]))
            elif len(tensor) < len(self._owners):
                tensor = tensors[layer] = self._grown(tensor)
            tensor.view(-1, *new.shape[1:]).index_copy_(0, slots, new)

    def read(self, layer: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, blocks * size, kv_heads, head_dim) of `table`, int64 (rows, blocks), copied."""
        return _gather(self._keys[layer], table), _gather(self._values[layer], table)

    def view(self, layer: int, first: int, num_blocks: int) -> tuple[Tensor, Tensor]:
        """As `read`, for one row of consecutive blocks, not copied."""
        keys, values = self._keys[layer], self._values[layer]
        window = slice(first, first + num_blocks)
        return keys[window].flatten(0, 1)[None], values[window].flatten(0, 1)[None]

    def _grown(self, tensor: Tensor) -> Tensor:
        grown = tensor.new_zeros((len(self._owners), *tensor.shape[1:]))
        grown[: len(tensor)] = tensor
        return grown


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // BLOCK_SIZE)


def _gather(tensor: Tensor, table: Tensor) -> Tensor:
    rows, blocks = table.shape
    return torch.index_select(tensor, 0, table.flatten().to(tensor.device)).view(
        rows, blocks * BLOCK_SIZE, *tensor.shape[2:]
    )
