"""How fast a text is read and written, whatever runs it: prefill and decode, each as a median with its quartiles."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from measurement import Spread

from cotune.device.offline.model import OfflineText


def random_prompt(num_tokens: int, vocab_size: int, *, seed: int = 0) -> list[int]:
    """Token ids that any model of this vocabulary reads; what they say does not change what a step costs."""
    found: list[int] = np.random.default_rng(seed).integers(0, vocab_size, num_tokens).tolist()
    return found


def prefill_s(text: OfflineText, prompt: Sequence[int]) -> float:
    """Seconds to read a prompt in one piece, from an empty text."""
    text.truncate(0)
    started_s = time.perf_counter()
    text.extend(prompt)
    return time.perf_counter() - started_s


def decode_s(text: OfflineText, num_tokens: int) -> list[float]:
    """Seconds of each of some greedy steps behind what the text holds."""
    token, seconds = 0, []
    for _ in range(num_tokens):
        started_s = time.perf_counter()
        token = int(text.extend([token])[0].argmax())
        seconds.append(time.perf_counter() - started_s)
    return seconds


def speeds(text: OfflineText, prompt: Sequence[int], *, num_tokens: int, runs: int) -> dict[str, Spread]:
    """Tokens per second.

    Args:
        text: of a model that is loaded.
        prompt: what is read in each run, in one piece.
        num_tokens: that are written behind it.
        runs: after one that warms up and does not count.

    Returns:
        `prefill` over runs and `decode` over all steps, both by the clock; `decode_cpu_ms`, milliseconds of processor
        time of a step over runs, of all threads together, which other work on the machine changes little.
    """
    prefills: list[float] = []
    steps: list[float] = []
    worked: list[float] = []
    for run in range(runs + 1):
        seconds = prefill_s(text, prompt)
        before_s = time.process_time()
        written = decode_s(text, num_tokens)
        worked_s = time.process_time() - before_s
        if run:
            prefills.append(len(prompt) / seconds)
            steps += [1 / step for step in written]
            worked.append(1e3 * worked_s / num_tokens)
    return {"prefill": Spread.of(prefills), "decode": Spread.of(steps), "decode_cpu_ms": Spread.of(worked)}
