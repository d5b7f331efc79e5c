"""Settings of the C library's allocator for this process; glibc alone has them."""

from __future__ import annotations

import ctypes

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def map_blocks(from_bytes: int, *, keep_bytes: int) -> bool:
    """Give blocks from a size on pages of their own, which go when they are freed; smaller ones come from the heap.

    Args:
        from_bytes: the least size of such a block.
        keep_bytes: how much may stay free at the heap's end.

    Returns:
        Whether it did; False where the C library has no such setting.

    Example:
        >>> done = map_blocks(2**20, keep_bytes=2**20)
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, from_bytes) and mallopt(_M_TRIM_THRESHOLD, keep_bytes))
