"""Large pages: which memory is asked for, and that the kernel gives it."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest

from cotune.device.offline import huge_pages as module
from cotune.device.offline.huge_pages import added, aligned, huge_pages

MAPS = """\
00400000-00600000 r-xp 00000000 fe:00 99 /usr/bin/python
01000000-01400000 rw-p 00000000 00:00 0 [heap]
7f0000000000-7f0000{end} rw-p 00000000 00:00 0
7f0001000000-7f0001800000 rw-s 00000000 00:00 0
7f0002000000-7f0002800000 rw-p 00000000 fe:00 98 /a file
7f0003000000-7f0003800000 r--p 00000000 00:00 0
7ffc00000000-7ffc00800000 rw-p 00000000 00:00 0 [stack]
"""


def regions_of(numbers: set[int]) -> list[tuple[int, int]]:
    """Runs of numbers, as regions."""
    starts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number + 1 for number in numbers if number + 1 not in numbers)
    return list(zip(starts, ends, strict=True))


def test_what_was_added_is_the_difference_of_sets() -> None:
    """For all sets of six numbers before and after."""
    sets = [{number for number in range(6) if bits >> number & 1} for bits in range(64)]
    for before in sets:
        for after in sets:
            found = added(regions_of(before), regions_of(after))
            numbers = [number for start, end in found for number in range(start, end)]
            assert numbers == sorted(after - before)
            assert all(start < end for start, end in found)


def test_only_whole_pages_count() -> None:
    assert aligned([(0, 8), (9, 31), (33, 39), (39, 41)], 8) == [(0, 8), (16, 24)]


def system(root: Path, *, enabled: str, end: str = "400000") -> None:
    """Files that tell about memory, below another root."""
    folder = root / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "enabled").write_text(enabled)
    (folder / "hpage_pmd_size").write_text("2097152\n")
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/maps").write_text(MAPS.format(end=end))


@pytest.mark.parametrize(
    "enabled", ["always [madvise] never\n", "[always] madvise never\n", "always madvise [never]\n"]
)
def test_new_private_memory_is_asked_for_unless_the_system_forbids_it(
    enabled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    heap: list[int] = []
    monkeypatch.setattr(module, "_advise", asked.append)
    monkeypatch.setattr(module, "_take_from_heap", heap.append)
    system(tmp_path, enabled=enabled)
    with huge_pages(tmp_path):
        system(tmp_path, enabled=enabled, end="a00000")
        assert heap == ([] if "[never]" in enabled else [2**25])
    if "[never]" in enabled:
        assert asked == heap == []
    else:
        assert asked == [(0x7F0000400000, 0x7F0000A00000)] and heap == [2**25, 2**18]


def test_pieces_are_mapped_again_after_an_error_and_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heap: list[int] = []
    monkeypatch.setattr(module, "_advise", lambda region: pytest.fail(str(region)))
    monkeypatch.setattr(module, "_take_from_heap", heap.append)
    system(tmp_path, enabled="[always]")
    with pytest.raises(RuntimeError, match="damaged"), huge_pages(tmp_path):
        system(tmp_path, enabled="[always]", end="a00000")
        raise RuntimeError("damaged")
    assert heap == [2**25, 2**18]


def test_a_system_that_says_nothing_is_asked_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_advise", lambda region: pytest.fail(str(region)))
    with huge_pages(tmp_path):
        pass
    system(tmp_path, enabled="[always]")
    (tmp_path / "proc/self/maps").unlink()
    with huge_pages(tmp_path):
        system(tmp_path, enabled="[always]")
        (tmp_path / "proc/self/maps").write_text("")


def huge_bytes(address: int) -> int:
    """Of the region with an address, bytes in large pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "AnonHugePages:":
            return 1024 * int(line.split()[1])
    return 0


def touched(size: int) -> mmap.mmap:
    """Memory with a number in each small page."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for start in range(0, size, 4096):
        memory[start] = start // 4096 % 251
    return memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library is not glibc")
def test_pieces_below_a_size_lie_in_the_heap() -> None:
    """The heap ends at the break; what is mapped lies elsewhere."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = (ctypes.c_size_t,), (ctypes.c_void_p,)
    for below_bytes, is_heap in ((module._USUAL_HEAP_PIECE, False), (module._LARGEST_HEAP_PIECE, True)):
        module._take_from_heap(below_bytes)
        piece = libc.malloc(24 * 2**20)
        module._take_from_heap(module._USUAL_HEAP_PIECE)
        heap_end = libc.sbrk(0)
        libc.free(piece)
        assert (piece < heap_end) == is_heap


def test_the_kernel_gives_them_and_the_bytes_stay() -> None:
    size = 32 * 2**20
    try:
        touched(size).madvise(25)
    except (OSError, ValueError, AttributeError):
        pytest.skip("this system has no large pages for memory that is there already")
    with huge_pages():
        memory = touched(size)
    assert all(memory[start] == start // 4096 % 251 for start in range(0, size, 4096))
    assert huge_bytes(ctypes.addressof(ctypes.c_char.from_buffer(memory))) >= size // 2
