"""Every byte that PyTorch allocates on the CPU while a function runs: the same number each time, for tests.

A process's resident set is what a device really has to give, but it moves with the allocator and the pages that it
keeps. Here PyTorch's own profiler reports each allocation and each release, temporaries inside kernels included.
What libraries below PyTorch take for themselves (packed blocks of a matrix product) is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch.autograd.profiler import profile

# The profiler's name for one allocation (bytes above 0) or one release (below).
_MEMORY_EVENT = "[memory]"


@dataclass(frozen=True, kw_only=True)
class Allocations:
    """What a run allocated on the CPU, counted from its beginning.

    Attributes:
        peak_bytes: the most that was held at one time beyond what was held before.
        left_bytes: what is still held afterwards; negative if more was released than allocated.
    """

    peak_bytes: int
    left_bytes: int

    @classmethod
    def of_changes(cls, changes: Iterable[int]) -> Allocations:
        """From the bytes of each allocation (positive) and release (negative), in order.

        Example:
            >>> Allocations.of_changes([100, 50, -100, 20])
            Allocations(peak_bytes=150, left_bytes=70)
        """
        held = peak = 0
        for change in changes:
            held += change
            peak = max(peak, held)
        return cls(peak_bytes=peak, left_bytes=held)


def count_allocations(work: Callable[[], object]) -> Allocations:
    """Run `work` once and count what it allocates on the CPU.

    Args:
        work: with one thread, so that the order of events is that of time.

    Example:
        >>> import torch
        >>> count_allocations(lambda: torch.ones(1000) + torch.ones(1000)).peak_bytes
        12000
    """
    # Not `torch.profiler`: its table of all operations, which nobody reads here, takes longer than the work.
    with profile(profile_memory=True) as profiler:
        work()
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == _MEMORY_EVENT]
    return Allocations.of_changes(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
