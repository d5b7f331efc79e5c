"""The cloud's compute: one thread that does the backbone's forward passes in the order they were asked for.

One thread, because a forward pass uses the whole machine or accelerator anyway, and because caches and hooks
then need no locks. The event loop stays free to answer devices meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cotune.cloud.hosted import HostedModel
from cotune.cloud.stream import StepPlan
from cotune.generation.protocols import Cursor, StepAbandonedError, StepFeatures
from cotune.wire.features import SequenceFeatures

T = TypeVar("T")


class Engine:
    """Runs a hosted model's forward passes.

    Args:
        model: what is hosted.
    """

    def __init__(self, model: HostedModel) -> None:
        self.model = model
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cotune-engine")

    async def step(
        self, cursor: Cursor, plan: StepPlan, is_wanted: Callable[[], bool]
    ) -> tuple[StepFeatures | None, float]:
        """Do `plan` on `cursor`; the features and the seconds that it took.

        `is_wanted` is asked during the pass, from the engine's thread; once it says no the pass is given up and the
        features are None.
        """
        return await self._run(lambda: _step(cursor, plan, is_wanted))

    async def features(self, input_ids: NDArray[np.int64], first_target: int, top_k: int) -> SequenceFeatures:
        """Teacher-force one sequence."""
        return await self._run(lambda: self.model.backbone.features(input_ids, first_target, top_k))

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Stop after the work in hand."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _step(cursor: Cursor, plan: StepPlan, is_wanted: Callable[[], bool]) -> tuple[StepFeatures | None, float]:
    started_s = time.perf_counter()
    if not is_wanted():
        return None, 0.0
    # What a dropped or cancelled step left behind goes too: the plan is the truth, not the cache.
    if cursor.length > plan.truncate_to:
        cursor.truncate(plan.truncate_to)
    try:
        features = cursor.extend(plan.token_ids, is_wanted)
    except StepAbandonedError:
        return None, time.perf_counter() - started_s
    return features, time.perf_counter() - started_s
