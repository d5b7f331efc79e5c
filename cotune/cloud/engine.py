"""The cloud's compute: one batch for all rows, one forward pass after the other, in one thread.

Continuous batching (Orca, Yu et al., 2022): before each pass the rows that have something to compute are collected
anew, so rows join and leave at every token, and rows that wait for their device are simply not there. Long prompts
are read in pieces, a few tokens' worth in each pass. Rows that run ahead of their device come last, and only as long as
they cost the others less than they bring (`cotune.cloud.pass_time`): running ahead is for free room only.

One thread, because a pass uses the whole machine or accelerator anyway, and because caches and hooks then need no
locks. The event loop stays free to answer devices meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cotune.cloud.hosted import HostedModel
from cotune.cloud.pass_time import PassTime
from cotune.cloud.row import Plan, Row
from cotune.errors import CotuneError, InputError
from cotune.generation.gate import Gate, consult_many
from cotune.generation.protocols import RowWork, StepAbandonedError, StepFeatures
from cotune.wire.features import SequenceFeatures

logger = logging.getLogger("cotune.cloud")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of the batch.

    Attributes:
        max_batch_rows: sequences in one pass; a row with beams brings several.
        max_prompt_tokens: tokens of prompts in one pass; at least one piece of one prompt is always read.
        max_blocks: blocks of keys and values for all rows; None for no bound.
    """

    max_batch_rows: int = 64
    max_prompt_tokens: int = 256
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch_rows", "max_prompt_tokens", "max_blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")


@dataclass
class EngineCounters:
    """What the engine did since it started; times in seconds.

    Attributes:
        num_passes: forward passes over rows.
        num_row_steps: rows in them, all together.
        num_prompt_tokens: tokens of prompts read.
        num_abandoned: passes given up in the middle.
        busy_s: time in passes.
        queue_s: time that rows waited for a pass that they wanted.
    """

    num_passes: int = 0
    num_row_steps: int = 0
    num_prompt_tokens: int = 0
    num_abandoned: int = 0
    busy_s: float = 0.0
    queue_s: float = 0.0
    last_batch_rows: int = field(default=0)


@dataclass(frozen=True)
class _Job:
    row: Row
    plan: Plan


class Engine:
    """Runs a hosted model's forward passes.

    Args:
        model: what is hosted.
        config: limits.
    """

    def __init__(self, model: HostedModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        self.counters = EngineCounters()
        self._rows: dict[int, Row] = {}
        self._num_reserved = 0
        self._pass_time = PassTime()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cotune-engine")
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    # Room for keys and values.

    def blocks_for(self, num_tokens: int, *, num_beams: int = 1, num_shared: int = 0) -> int:
        """Blocks that a row of so many tokens needs.

        Args:
            num_tokens: of each of its beams.
            num_beams: how many beams it may have.
            num_shared: tokens at the start that all beams share: the prompt.
        """
        block_size = self.model.backbone.block_size
        shared = num_shared // block_size if num_beams > 1 else 0
        return shared + num_beams * (-(-num_tokens // block_size) - shared)

    @property
    def num_free_blocks(self) -> int | None:
        """Blocks that no row has set aside; None without a bound."""
        return None if self.config.max_blocks is None else self.config.max_blocks - self._num_reserved

    @property
    def num_reserved_blocks(self) -> int:
        return self._num_reserved

    def reserve(self, row: Row, num_tokens: int, *, num_beams: int = 1, num_shared: int = 0) -> bool:
        """Set blocks aside for a row, as `blocks_for` counts them; whether there was room."""
        wanted = self.blocks_for(num_tokens, num_beams=num_beams, num_shared=num_shared) - row.place.num_blocks
        free = self.num_free_blocks
        if free is not None and wanted > free:
            return False
        row.place.num_blocks += wanted
        self._num_reserved += wanted
        return True

    def put_out(self, row: Row) -> None:
        """Take away a row's cache and its room; it can be computed again from its tokens."""
        self.stop(row)
        self._num_reserved -= row.place.num_blocks
        row.place.num_blocks = 0
        cursor, row.place.cursor = row.place.cursor, None
        if cursor is not None:
            row.steps.forget_cache()
            if not self._is_closed:
                # After the pass in hand, which may use it.
                self._thread.submit(cursor.close)

    # Rows.

    @property
    def num_rows(self) -> int:
        """Rows that are being generated."""
        return len(self._rows)

    def start(self, row: Row) -> None:
        """Compute whatever `row` wants from now on, until it is stopped. Its room must be reserved."""
        self._rows[id(row)] = row
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        self._news.set()

    def stop(self, row: Row) -> None:
        """Compute nothing more for `row`; its cache stays."""
        self._rows.pop(id(row), None)
        row.place.wanting_since_s = None

    def wake(self) -> None:
        """Something has changed that may make a row want a step."""
        self._news.set()

    async def features(self, input_ids: NDArray[np.int64], first_target: int, top_k: int) -> SequenceFeatures:
        """Teacher-force one sequence, between two passes."""
        return await self.run(lambda: self.model.backbone.features(input_ids, first_target, top_k))

    async def run(self, work: Callable[[], T]) -> T:
        """Do something else with the backbone, between two passes."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        """Stop after the pass in hand."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            self._task = None
        self._rows.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    # The loop.

    async def _run(self) -> None:
        while True:
            self._news.clear()
            now_s = time.monotonic()
            due_s = self._keep_time(now_s)
            jobs = self._next_batch(now_s)
            if jobs:
                await self._do(jobs)
                continue
            try:
                async with asyncio.timeout(None if due_s is None else max(0.0, due_s - now_s)):
                    await self._news.wait()
            except TimeoutError:
                continue

    def _keep_time(self, now_s: float) -> float | None:
        """Tell the rows whose time has come; returns when the next one's will."""
        for row in list(self._rows.values()):
            due_s = row.due_s
            if due_s is not None and due_s <= now_s:
                row.on_time(now_s)
        return min((row.due_s for row in self._rows.values() if row.due_s is not None), default=None)

    def _next_batch(self, now_s: float) -> list[_Job]:
        # With the chance that its step is of use, which is worth computing once.
        wanting: list[tuple[float, Row]] = []
        for row in list(self._rows.values()):
            if row.steps.wants_step() and not row.is_blocked:
                chance = row.steps.chance
                wanting.append((chance, row))
                if row.place.wanting_since_s is None and chance == 1.0:
                    row.place.wanting_since_s = now_s
            else:
                row.on_idle(now_s)
        # First those whose step is surely of use, among equals who has waited longest.
        wanting.sort(key=lambda one: (-one[0], one[1].place.last_pass))
        jobs: list[_Job] = []
        num_rows = prompt_tokens = 0
        tokens = 0.0
        for chance, row in wanting:
            if num_rows >= self.config.max_batch_rows:
                break
            # Running ahead is for room that is (nearly) free.
            if jobs and chance < 1.0 and not self._pass_time.is_worth(chance, num_rows=num_rows, tokens=tokens):
                break
            if row.steps.is_in_prompt and prompt_tokens >= self.config.max_prompt_tokens:
                continue
            whole = row.steps.plan(self.model.backbone.prompt_chunk)
            plan = whole.within(self.config.max_batch_rows - num_rows)
            if plan is None:
                if jobs:
                    continue
                # More beams than a pass has rows: alone they get one.
                plan = whole
            if row.steps.is_in_prompt:
                if prompt_tokens and prompt_tokens + len(plan.token_ids) > self.config.max_prompt_tokens:
                    continue
                prompt_tokens += len(plan.token_ids)
            num_rows += plan.num_rows
            tokens += plan.num_rows * chance
            jobs.append(_Job(row, plan))
        self.counters.num_prompt_tokens += prompt_tokens
        return jobs

    async def _do(self, jobs: list[_Job]) -> None:
        counters = self.counters
        now_s = time.monotonic()
        for job in jobs:
            place = job.row.place
            place.last_pass = counters.num_passes
            if place.wanting_since_s is not None:
                counters.queue_s += now_s - place.wanting_since_s
                place.wanting_since_s = None
        counters.num_passes += 1
        num_rows = sum(job.plan.num_rows for job in jobs)
        counters.num_row_steps += num_rows
        counters.last_batch_rows = num_rows
        try:
            outputs, seconds = await self.run(lambda: self._pass(jobs))
        except Exception as error:
            await self._on_failure(jobs, error)
            return
        counters.busy_s += seconds
        counters.num_abandoned += outputs is None
        if outputs is not None and not any(job.row.steps.is_in_prompt for job in jobs):
            self._pass_time.add(num_rows, seconds)
        now_s = time.monotonic()
        for i, job in enumerate(jobs):
            # A row that was stopped meanwhile has no use for it, and its cache may be gone.
            if id(job.row) in self._rows and job.row.place.cursor is not None:
                features = None if outputs is None else outputs[i]
                job.row.on_step(job.plan, features, seconds, now_s, job.plan.num_rows / num_rows)

    async def _on_failure(self, jobs: list[_Job], error: Exception) -> None:
        """One bad row spoils a pass, which then has changed nothing: try one by one, so that only the bad one ends."""
        if len(jobs) > 1:
            for job in jobs:
                if id(job.row) in self._rows:
                    await self._do([job])
            return
        (job,) = jobs
        if not isinstance(error, CotuneError):
            logger.error("a forward pass failed", exc_info=error)
            error = CotuneError("the cloud failed in this session; its log says why, try again")
        self.put_out(job.row)
        job.row.on_failure(error)

    def _pass(self, jobs: Sequence[_Job]) -> tuple[list[list[StepFeatures]] | None, float]:
        """In the engine's thread."""
        started_s = time.perf_counter()
        backbone = self.model.backbone

        def is_wanted() -> bool:
            return any(job.row.steps.is_current(job.plan) for job in jobs)

        outputs: list[list[StepFeatures]] | None = None
        try:
            work: list[RowWork] = []
            ends: list[int] = []
            for job in jobs:
                places = job.row.place.cursor
                if places is None:
                    places = job.row.place.cursor = job.plan.begin(backbone, job.row.steps.num_prompt)
                work += job.plan.prepare(places)
                ends.append(len(work))
            if is_wanted():
                outputs = backbone.extend(work, is_wanted)
                if len(outputs) > len(jobs):
                    outputs = _by_job(outputs, ends)
        except StepAbandonedError:
            outputs = None
        if outputs is not None:
            outputs = _ask_gates([job.row.steps.gate for job in jobs], outputs)
        return outputs, time.perf_counter() - started_s


def _by_job(outputs: list[list[StepFeatures]], ends: list[int]) -> list[list[StepFeatures]]:
    """The features of all sequences of each job in one list."""
    starts = [0, *ends[:-1]]
    return [[one for row in outputs[start:end] for one in row] for start, end in zip(starts, ends, strict=True)]


def _ask_gates(gates: Sequence[Gate | None], outputs: list[list[StepFeatures]]) -> list[list[StepFeatures]]:
    """The features with what each row's own gate says to them, from one gathered product."""
    asked = [(gate, features) for gate, row in zip(gates, outputs, strict=True) for features in row if gate is not None]
    if not asked:
        return outputs
    hidden = np.stack([features.hidden for _, features in asked])
    answers = iter(consult_many([gate for gate, _ in asked], hidden))
    return [
        row if gate is None else [replace(features, fires=next(answers)) for features in row]
        for gate, row in zip(gates, outputs, strict=True)
    ]
