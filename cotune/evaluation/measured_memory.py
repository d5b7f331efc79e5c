"""The memory that work really takes: PyTorch's counters on CUDA, the resident set of a child process on a CPU.

The resident set of a process moves with things that are not the work's: libraries whose pages are read when first
used, memory that the allocator keeps for later, arenas of threads. So the work runs in a child with an allocator that
gives every larger block back at once, after the same work on something tiny, and the baseline is what is resident
right before it.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cotune.errors import CotuneError, InputError

# glibc's: blocks from 64 KiB on have pages of their own, which go when they are freed; one arena for all threads.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
# What the kernel takes as the order to forget the peak.
_FORGET_PEAK = "5"


def peak_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that `work` held at most beyond what was held before.

    On a CPU, Linux only, the growth of this process's resident set: call it in a child of `run_measured`, after the
    same work on something tiny.

    Args:
        work: done once.
        device: where its tensors are.

    Raises:
        InputError: the system has no such count, or PyTorch finds no such device.
    """
    if not device.startswith("cuda"):
        before = _forget_peak()
        work()
        return max(0, _resident("VmHWM") - before)
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"device is {device!r}, which PyTorch does not find here; take cpu")
    torch.cuda.synchronize(device)
    meter = PeakMeter(device)
    work()
    torch.cuda.synchronize(device)
    return meter.read() or 0


class PeakMeter:
    """What a process holds at most from now on, beyond what it holds now, while it goes about its own work.

    On CUDA by PyTorch's counter. Elsewhere by the resident set, which also has what libraries read when first used and
    what the allocator keeps for later: an upper bound, and for small models a rough one. `peak_bytes` in a
    child is exact.

    Args:
        device: where the work's tensors are.

    Example:
        >>> meter = PeakMeter()
        >>> read = meter.read()
        >>> read is None or read >= 0
        True
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device, self._before = device, 0
        self._counts = True
        if device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        try:
            self._before = _forget_peak()
        except InputError:
            self._counts = False

    def read(self) -> int | None:
        """Bytes; None where the system does not count them."""
        if not self._counts:
            return None
        if self._device.startswith("cuda"):
            import torch

            return int(torch.cuda.max_memory_allocated(self._device) - self._before)
        return max(0, _resident("VmHWM") - self._before)


def run_measured(
    arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, timeout_s: float = 600.0
) -> dict[str, Any]:
    """Run Python with these arguments in a child whose allocator gives back what is freed.

    Args:
        arguments: after the interpreter's name; what runs must print one JSON object as its last line.
        environment: variables to set beside those of the allocator.
        timeout_s: how long it may take.

    Returns:
        The object that it printed.

    Raises:
        CotuneError: it failed, or took too long.

    Example:
        >>> run_measured(["-c", "print('{\\"peak_bytes\\": 5}')"])
        {'peak_bytes': 5}
    """
    variables = {**os.environ, **ALLOCATOR, **(environment or {})}
    what = " ".join(arguments[:3])
    try:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False, env=variables
        )
    except subprocess.TimeoutExpired as error:
        raise CotuneError(f"{what} took longer than {timeout_s:g} s; raise timeout_s or measure less") from error
    try:
        if done.returncode:
            raise ValueError(f"exit status {done.returncode}")
        found = json.loads(done.stdout.strip().splitlines()[-1])
        if not isinstance(found, dict):
            raise ValueError("its last line is no JSON object")
    except (ValueError, IndexError) as error:
        said = " / ".join(done.stderr.strip().splitlines()[-3:])
        raise CotuneError(f"{what} gave no measurement ({error}): {said or 'it said nothing'}") from error
    return found


def _forget_peak() -> int:
    """Bytes that are resident now, from which the peak counts from now on."""
    _trim()
    try:
        _CLEAR.write_text(_FORGET_PEAK, encoding="ascii")
    except OSError as error:
        raise InputError(
            f"the peak of the resident set cannot be reset here ({error.strerror}); measure on Linux, or on CUDA"
        ) from error
    return _resident("VmRSS")


def _trim() -> None:
    """Give free pages back, so that work cannot use them without being counted."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _resident(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise InputError(f"{_STATUS} has no {name}; measure on Linux, or on CUDA")
