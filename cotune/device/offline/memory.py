"""Whether an offline model fits into memory, worked out before it is loaded.

    bytes = weights on disk + texts * keys and values + logits of one piece of a prompt + the runtime itself

Weights are mapped from the file: what the system cannot keep in memory is read again for every token, which is worse
than an error. Keys and values: 2 * layers * kv_heads * context * head_dim numbers for each text.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cotune.device.offline.folder import OfflineFolder
from cotune.device.offline.model import OfflineSettings
from cotune.errors import InputError

PROMPT_PIECE = 64
"""Tokens of a prompt that are read at once."""
RUNTIME_BYTES = 48 * 2**20
"""What ONNX Runtime with its working memory adds to a process, measured with a small model."""

# Of keys and values: float32 in a graph for processors, float16 in llama.cpp.
_BYTES_PER_CACHED_NUMBER = {"onnx": 4, "gguf": 2}


@dataclass(frozen=True, kw_only=True)
class MemoryNeed:
    """Bytes that a model needs, by what they are for."""

    weights: int
    caches: int
    logits: int
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.logits + self.runtime


def memory_need(folder: OfflineFolder, settings: OfflineSettings) -> MemoryNeed:
    """What a model will need.

    Raises:
        InputError: the context is more than the model was made for.
    """
    description, context = folder.description, settings.context_of(folder.description)
    numbers = 2 * description.num_layers * description.num_kv_heads * description.head_dim * context
    return MemoryNeed(
        weights=folder.num_model_bytes,
        caches=settings.num_texts * numbers * _BYTES_PER_CACHED_NUMBER[description.runtime],
        logits=min(PROMPT_PIECE, context) * description.vocab_size * 4,
    )


def fit_memory(
    folder: OfflineFolder, settings: OfflineSettings, available: Callable[[], int | None] | None = None
) -> OfflineSettings:
    """The same settings with as many texts at once as there is room for, if there is room for one.

    Args:
        folder: of the model.
        settings: with the limit, if there is one, and the most texts at once.
        available: says how many bytes are free; None asks the system.

    Raises:
        InputError: one text needs more than the limit, or than there is.
    """
    need = memory_need(folder, replace(settings, num_texts=1))
    limit, whose = settings.memory_limit_bytes, "the memory limit"
    free = (available or available_bytes)()
    if free is not None and (limit is None or free < limit):
        limit, whose = free, "the memory that is free"
    if limit is None:
        return settings
    if need.total > limit:
        raise InputError(
            f"the offline model in {folder.path} needs {_mib(need.total)} ({_mib(need.weights)} of weights, "
            f"{_mib(need.caches)} for keys and values), expected at most {_mib(limit)}, {whose}; take a shorter "
            "context or a smaller model"
        )
    num_more = (limit - need.total) // need.caches
    return replace(settings, num_texts=min(settings.num_texts, 1 + num_more))


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take: of the machine, of its control group, and of its own limit.

    Args:
        root: where the files of the system are.

    Returns:
        None where the system does not say.
    """
    found = [_machine(root), _control_group(root), _own_limit(root)]
    known = [one for one in found if one is not None]
    return max(0, min(known)) if known else None


def _machine(root: Path) -> int | None:
    return _field(root / "proc/meminfo", "MemAvailable")


def _control_group(root: Path) -> int | None:
    """Of version 2, else of version 1. Within a container the own group is the root of what is seen."""
    for limit, used, files in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        base = root / "sys/fs/cgroup"
        most, current = _number(base / limit), _number(base / used)
        if most is not None and current is not None:
            # Pages of files count as used, and make room for others when it is needed.
            return most - current + (_field(base / files, "inactive_file", unit=1) or 0)
    return None


def _own_limit(root: Path) -> int | None:
    """Of `ulimit -v`, which counts addresses: those in use are taken off."""
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _field(root / "proc/self/status", "VmSize")
    return None if most == resource.RLIM_INFINITY or used is None else most - used


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _field(path: Path, name: str, *, unit: int = 1024) -> int | None:
    for line in _text(path).splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[0] == name and words[1].isdecimal():
            return int(words[1]) * unit
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
