"""How many operations a second a matrix product of this machine does: what the time of a step is judged by."""

from __future__ import annotations

import statistics
import time

from cotune.errors import InputError
from cotune.evaluation.model_shape import ModelShape
from cotune.evaluation.workload import Workload

# Larger ones are no faster, and would need memory that a small device lacks.
_MOST_ROWS = 2048


def measure_flops_per_s(
    shape: ModelShape, load: Workload, *, device: str = "cpu", num_threads: int | None = None, seconds: float = 0.5
) -> float:
    """The median rate of products as a model's feed-forward half has them, (n, D) x (D, F).

    Args:
        shape: gives D and F, of each 2048 at most.
        load: gives n, 2048 at most, and the number type.
        device: a PyTorch device.
        num_threads: of PyTorch, afterwards as before; None leaves them.
        seconds: how long to measure.

    Raises:
        InputError: there is no such device.
    """
    import torch

    rows, inner, columns = (min(_MOST_ROWS, size) for size in (load.num_tokens, shape.hidden, shape.inner))
    before = torch.get_num_threads()
    try:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        try:
            left = torch.ones(rows, inner, dtype=getattr(torch, load.dtype), device=device)
            right = torch.ones(inner, columns, dtype=getattr(torch, load.dtype), device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"device is {device!r}, which cannot be used here: {reason}") from error
        rates: list[float] = []
        end = time.perf_counter() + seconds
        left @ right
        while not rates or time.perf_counter() < end:
            _wait(device)
            started = time.perf_counter()
            left @ right
            _wait(device)
            rates.append(2 * rows * inner * columns / (time.perf_counter() - started))
        return statistics.median(rates)
    finally:
        torch.set_num_threads(before)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
