"""What a run took, counted the same way whatever it did: the cloud, the edge, bytes, time, memory.

Operations of a model on the edge are 2 N for each token forwards and 6 N forwards and backwards, N its parameters
without the input embedding. There may be several: one that merges and rewrites, and another one that writes prompts.
"""

from __future__ import annotations

import resource
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cotune.sandwich.cost import Cost, shown_usd

WHOLE = "whole"
"""The stage that is a request from its text to its answer."""
_FORWARD_FLOPS = 2
_BOTH_WAYS_FLOPS = 6


@dataclass(frozen=True, kw_only=True)
class Taken:
    """All of it, at one moment.

    Attributes:
        cloud: what was paid in this process.
        cached: answers that cost nothing, since they were paid for before.
        retries: requests that were sent again.
        bytes_out, bytes_in: of requests and answers, without HTTP's headers.
        edge_forward_tokens, edge_backward_tokens: read or written by models on the edge; learnt from.
        edge_flops: operations for them, of each model by its own size.
        seconds: on the clock, since the account was opened.
        stage_seconds: of each stage, in the order of the requests.
        peak_memory_bytes: the most that this process ever had resident, other runs in it included.
        cloud_by_kind: `cloud` by what was asked for: `chat`, `reflection`.
    """

    cloud: Cost
    cached: int
    retries: int
    bytes_out: int
    bytes_in: int
    edge_forward_tokens: int
    edge_backward_tokens: int
    edge_flops: int
    seconds: float
    stage_seconds: Mapping[str, tuple[float, ...]] = field(repr=False)
    peak_memory_bytes: int
    cloud_by_kind: Mapping[str, Cost] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Flat, with the median and the 95th percentile of each stage instead of its list."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("cloud", "stage_seconds")}
        stages = {name: percentiles(values) for name, values in self.stage_seconds.items()}
        return {**asdict(self.cloud), **fields, "seconds": round(self.seconds, 3), "stages": stages}

    def to_text(self) -> str:
        """A few lines for people."""
        cloud = self.cloud
        lines = [
            f"paid        {cloud.calls:,} calls ({self.cached:,} answers were there, {self.retries:,} asked again), "
            f"{cloud.tokens_in:,} tokens in, {cloud.tokens_out:,} out{shown_usd(cloud.usd)}",
            f"wire        {self.bytes_out:,} bytes out, {self.bytes_in:,} in",
            f"edge        {self.edge_forward_tokens:,} tokens forwards, {self.edge_backward_tokens:,} learnt from, "
            f"{self.edge_flops:.3g} operations",
            f"took        {self.seconds:.1f} s, {self.peak_memory_bytes / 2**20:,.0f} MiB at most",
        ]
        for kind, part in self.cloud_by_kind.items() if len(self.cloud_by_kind) > 1 else ():
            lines.append(
                f"{kind:<11} {part.calls:,} calls of these, {part.tokens_in:,} tokens in, {part.tokens_out:,} out"
                + shown_usd(part.usd)
            )
        for name, values in self.stage_seconds.items():
            found = percentiles(values)
            lines.append(f"{name:<11} {1e3 * found['p50']:.0f} ms (median), {1e3 * found['p95']:.0f} ms (95 %)")
        if WHOLE in self.stage_seconds:
            # The cloud is asked anyway, so the edge's stages must be won back by shorter answers or prompts.
            found = percentiles(self.stage_seconds[WHOLE])
            lines.append(
                f"break-even  faster than the cloud alone where that takes more than {1e3 * found['p50']:.0f} ms "
                f"(median), {1e3 * found['p95']:.0f} ms (95 %)"
            )
        return "\n".join(lines)


class Account:
    """Counts; many threads may write.

    Args:
        num_edge_parameters: of the edge model, where no others are named.

    Example:
        >>> account = Account(num_edge_parameters=10)
        >>> account.edge(forward_tokens=5)
        >>> account.taken().edge_flops
        100
    """

    def __init__(self, *, num_edge_parameters: int = 0) -> None:
        self.num_edge_parameters = num_edge_parameters
        self._lock = threading.Lock()
        self._cloud: dict[str, Cost] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self._stages: dict[str, list[float]] = defaultdict(list)
        self._started = time.monotonic()

    def paid(self, cost: Cost, *, kind: str = "chat") -> None:
        """A request of a kind that was sent, whatever came of it."""
        with self._lock:
            self._cloud[kind] = self._cloud.get(kind, Cost()) + cost

    def count(self, **amounts: int) -> None:
        """Add to `cached`, `retries`, `bytes_out` or `bytes_in`."""
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def edge(self, *, forward_tokens: int = 0, backward_tokens: int = 0, num_parameters: int | None = None) -> None:
        """Tokens through a model on the edge.

        Args:
            forward_tokens: read or written.
            backward_tokens: learnt from; they went forwards as well and are not to be named twice.
            num_parameters: of the model, without the input embedding; None: `num_edge_parameters`.
        """
        size = self.num_edge_parameters if num_parameters is None else num_parameters
        with self._lock:
            self._counts["forward"] += forward_tokens
            self._counts["backward"] += backward_tokens
            self._counts["flops"] += size * (_FORWARD_FLOPS * forward_tokens + _BOTH_WAYS_FLOPS * backward_tokens)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what runs inside as one pass of a stage."""
        began = time.monotonic()
        yield
        with self._lock:
            self._stages[name].append(time.monotonic() - began)

    def taken(self) -> Taken:
        """The state now."""
        with self._lock:
            counts = self._counts
            return Taken(
                cloud=sum(self._cloud.values(), Cost()),
                cached=counts["cached"],
                retries=counts["retries"],
                bytes_out=counts["bytes_out"],
                bytes_in=counts["bytes_in"],
                edge_forward_tokens=counts["forward"],
                edge_backward_tokens=counts["backward"],
                edge_flops=counts["flops"],
                seconds=time.monotonic() - self._started,
                stage_seconds={name: tuple(values) for name, values in self._stages.items()},
                peak_memory_bytes=peak_memory_bytes(),
                cloud_by_kind=dict(self._cloud),
            )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile, as `p50` and `p95`.

    Example:
        >>> percentiles([1.0, 2.0, 3.0])["p50"]
        2.0
    """
    p50, p95 = np.percentile(np.asarray(values, np.float64), [50, 95])
    return {"p50": float(p50), "p95": float(p95)}


def peak_memory_bytes() -> int:
    """The most that this process ever had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
