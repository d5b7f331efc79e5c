"""Weights in pages of 2 MB instead of 4 kB, which a step through all of them reads faster.

A token reads every weight once, front to back. The processor fetches ahead only within a page, and looks each page up
in a table whose cache holds a few thousand entries; the weights of a small model have tens of thousands of small
pages. Linux has large ones for whoever asks (`man 2 madvise`, MADV_HUGEPAGE and, since 6.1, MADV_COLLAPSE), and most
systems give them to nobody else. Where there are none, nothing happens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cotune.malloc import map_blocks

_SETTINGS = "sys/kernel/mm/transparent_hugepage"
# Of linux/mman.h: large pages from now on, and for what is there already.
_ADVICE = (14, 25)
_LARGEST_HEAP_PIECE, _USUAL_HEAP_PIECE = 32 * 2**20, 256 * 2**10

Region = tuple[int, int]
"""Addresses from the first byte to the one behind the last."""


@contextmanager
def huge_pages(root: Path = Path("/")) -> Iterator[None]:
    """Ask for large pages for the memory that is taken inside and kept; a failure costs speed and nothing else.

    A weight of less than a few megabytes that is mapped by itself, as glibc does, has hardly a whole large page. Inside
    all but the largest come from the heap, one behind the other; afterwards pieces of 256 kB and more are mapped, so
    that what a text never touches takes no memory.

    Args:
        root: of the file system that tells about memory.

    Example:
        >>> with huge_pages():
        ...     weights = bytearray(2**23)
    """
    size = _page_bytes(root)
    before = _regions(root) if size else []
    if size:
        _take_from_heap(_LARGEST_HEAP_PIECE)
    try:
        yield
    finally:
        if size:
            _take_from_heap(_USUAL_HEAP_PIECE)
    if size:
        for region in aligned(added(before, _regions(root)), size):
            _advise(region)


def added(before: Sequence[Region], after: Sequence[Region]) -> list[Region]:
    """What of the later regions was in none of the earlier ones; both ascending and without overlaps.

    Example:
        >>> added([(2, 4), (8, 9)], [(0, 5), (8, 10)])
        [(0, 2), (4, 5), (9, 10)]
    """
    found = []
    for start, end in after:
        for known_start, known_end in before:
            if known_end <= start or end <= known_start:
                continue
            if start < known_start:
                found.append((start, known_start))
            start = known_end
        if start < end:
            found.append((start, end))
    return found


def aligned(regions: Sequence[Region], size: int) -> list[Region]:
    """The whole pages of `size` bytes within regions.

    Example:
        >>> aligned([(3, 21), (24, 31)], 8)
        [(8, 16)]
    """
    pages = [(-(-start // size) * size, end // size * size) for start, end in regions]
    return [(start, end) for start, end in pages if start < end]


def _page_bytes(root: Path) -> int:
    """Size of a large page; 0 where there are none, or the system is told to give none."""
    try:
        enabled = (root / _SETTINGS / "enabled").read_text(encoding="ascii")
        return 0 if "[never]" in enabled else int((root / _SETTINGS / "hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _regions(root: Path) -> list[Region]:
    """Memory of this process that is no file's and that it alone writes."""
    try:
        lines = (root / "proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, permissions, _, _, inode, *name = line.split(maxsplit=5)
        if permissions == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            start, end = addresses.split("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def _take_from_heap(below_bytes: int) -> None:
    """Let malloc map larger pieces alone; other libraries than glibc have no such setting."""
    map_blocks(below_bytes, keep_bytes=2 * below_bytes)


def _advise(region: Region) -> None:
    start, end = region
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for advice in _ADVICE:
        advise(start, end - start, advice)
