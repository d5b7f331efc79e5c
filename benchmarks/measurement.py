"""What all benchmarks share: medians with their spread, targets with a verdict, and result files.

A result file holds the settings, the versions, the machine and the load on it at the start, so that a number can
be judged and repeated. A missed target is printed and stored; it does not change the exit status.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cotune.cli.run_folder import plain, versions, write_json

RESULTS = Path(__file__).parent / "results"

# Does one thing and says how many seconds it took; what it prepares before does not count.
Timed = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles of repeated measurements.

    Example:
        >>> str(Spread.of([1.0, 2.0, 3.0]))
        '2.000 (1.500 to 2.500)'
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        lower, median, upper = np.percentile(np.asarray(values, np.float64), [25, 50, 75]).tolist()
        return cls(median=median, lower_quartile=lower, upper_quartile=upper, num=len(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.lower_quartile:.3f} to {self.upper_quartile:.3f})"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A number that the project wants to reach.

    Attributes:
        what: in words.
        measured, limit, unit: what came, and what it is held against.
        is_upper: the limit is the most that is allowed; otherwise the least.
    """

    what: str
    measured: float
    limit: float
    unit: str
    is_upper: bool = True

    @property
    def verdict(self) -> str:
        met = self.measured <= self.limit if self.is_upper else self.measured >= self.limit
        return "PASS" if met else "MISS"

    def __str__(self) -> str:
        bound = "at most" if self.is_upper else "at least"
        return f"{self.verdict}  {self.what}: {self.measured:.4g} {self.unit}, {bound} {self.limit:g}"


def time_call(work: Callable[[], object]) -> Timed:
    """The seconds of a whole call."""

    def timed() -> float:
        started_s = time.perf_counter()
        work()
        return time.perf_counter() - started_s

    return timed


def interleave(calls: Mapping[str, Timed], *, runs: int, calls_per_run: int, warm_up: int) -> dict[str, dict[str, Any]]:
    """Time several things in turns, so that noise hits all alike; milliseconds per call.

    Args:
        calls: what to time, by name.
        runs: how often all take their turn.
        calls_per_run: calls in one turn; the median of a turn is one measurement.
        warm_up: calls of each before anything counts.

    Returns:
        By name: `ms`, the spread of the turns' medians, and `p95_ms` over all calls.
    """
    for call in calls.values():
        for _ in range(warm_up):
            call()
    seconds: dict[str, list[list[float]]] = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            seconds[name].append([call() for _ in range(calls_per_run)])
    return {
        name: {
            "ms": Spread.of([1e3 * float(np.median(turn)) for turn in turns]),
            "p95_ms": 1e3 * float(np.percentile(np.concatenate(turns), 95)),
        }
        for name, turns in seconds.items()
    }


def make_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser with examples and the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        prog=f"python benchmarks/{name}.py",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json", help="result file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    return parser


def finish(
    name: str, args: argparse.Namespace, machine: Mapping[str, Any], results: Any, targets: list[Target]
) -> None:
    """Print the verdicts and write the result file."""
    # Paths say where somebody works, not what was measured.
    config = {key: _named(value) for key, value in vars(args).items() if not isinstance(value, Path)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": name,
        "config": _values(config),
        "versions": versions(),
        "machine": dict(machine),
        "targets": [{**vars(target), "verdict": target.verdict} for target in targets],
        "results": _values(results),
    }
    write_json(args.out, record)
    print()
    for target in targets:
        print(target)
    print(f"all numbers: {args.out}")


def _named(value: Any) -> Any:
    """A model's folder by its name; anything else as it is."""
    return Path(value).name if isinstance(value, str) and os.sep in value and Path(value).exists() else value


def describe_machine() -> dict[str, Any]:
    """What the numbers were measured on; call it first, since it notes the load before the benchmark's own."""
    return {
        "cores": os.cpu_count(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def _values(value: Any) -> Any:
    return json.loads(json.dumps(plain(value), allow_nan=False))
