"""How a device that was away comes to the server's adapter: steps that each device replays, kept for some rounds.

A state has `start/NAME`, the adapter before the oldest step that is kept; `step/NUMBER`, the combined numbers of each
later round; and `now/NAME`, the tuned arrays after all of them. Only the algorithm knows what a step does to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cotune.federation.algorithm import Job
from cotune.federation.arrays import Arrays
from cotune.federation.descend import names_like

STEP, START, NOW = "step/", "start/", "now/"
T = TypeVar("T")
# The tuned arrays after a step: from those before it, the number of its round, and the step.
After = Callable[[Arrays, int, NDArray[np.float32]], dict[str, NDArray[np.float32]]]


def first_state(adapter: Arrays, tuned: str) -> Arrays:
    """Before round 1, for the arrays that a pattern fits."""
    return prefixed(START, adapter) | {NOW + name: adapter[name] for name in names_like(adapter, tuned)}


def lacked(state: Arrays, round_number: int, since: int | None) -> dict[str, NDArray[np.float32]]:
    """What a device lacks of a state: the steps that it missed, or all if they are not kept any more."""
    steps = {name: array for name, array in state.items() if name.startswith(STEP)}
    kept = min((round_of(name) for name in steps), default=round_number)
    if since is not None and since >= kept:
        return {name: array for name, array in steps.items() if round_of(name) >= since}
    return prefixed(START, under(START, state)) | steps


def with_step(
    state: Arrays, round_number: int, step: NDArray[np.float32], after: After, *, keep_steps: int
) -> dict[str, NDArray[np.float32]]:
    """The state after one more step; the oldest goes into the start when there are more than `keep_steps`."""
    found = dict(state) | {f"{STEP}{round_number:06d}": step}
    found |= prefixed(NOW, after(under(NOW, state), round_number, step))
    steps = sorted(name for name in found if name.startswith(STEP))
    for name in steps[: max(0, len(steps) - keep_steps)]:
        tuned = {n: array for n, array in under(START, found).items() if NOW + n in found}
        found |= prefixed(START, after(tuned, round_of(name), found.pop(name)))
    return found


def whole_adapter(state: Arrays) -> dict[str, NDArray[np.float32]]:
    """After all steps."""
    return under(START, state) | under(NOW, state)


def caught_up(job: Job, tuned: str, after: After) -> dict[str, NDArray[np.float32]]:
    """The adapter before this round. The device remembers it, with the last round whose step is inside."""
    fresh = under(START, job.arrays)
    # `arrays` has all that ever came: after a new start, steps before it are history.
    now = under(NOW, job.memory) or {name: fresh[name] for name in names_like(fresh, tuned)}
    last = int(job.memory.get("last", np.array(-1)))
    for name in sorted(name for name in job.arrays if name.startswith(STEP) and round_of(name) > last):
        now = after(now, round_of(name), job.arrays[name])
        last = round_of(name)
    job.memory.update(prefixed(NOW, now) | {"last": np.array(last, np.float32)})
    return fresh | now


def round_of(name: str) -> int:
    """The round of a step's name."""
    return int(name.removeprefix(STEP))


def under(prefix: str, arrays: Mapping[str, T]) -> dict[str, T]:
    """The arrays or tensors below a prefix, without it.

    Example:
        >>> under("now/", {"now/b": np.zeros(1, np.float32), "start/b": np.ones(1, np.float32)})
        {'b': array([0.], dtype=float32)}
    """
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def prefixed(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The arrays with a prefix."""
    return {prefix + name: array for name, array in arrays.items()}
