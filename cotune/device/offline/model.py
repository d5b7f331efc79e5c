"""A language model that runs on the device by itself, whatever runs it: one small interface for all runtimes.

A model makes texts, a text is extended and cut back, and each extension gives logits. What is generated, drafted or
served is made of these alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cotune.device.offline.folder import OfflineDescription, OfflineFolder
from cotune.errors import InputError

MAX_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class OfflineSettings:
    """How a model is run.

    Attributes:
        context: tokens that a text may have, prompt included; None for as many as the model was made for.
        num_threads: that compute one step; None for all processors that this process may use.
        memory_limit_bytes: for weights, caches and logits together; None for what the system says is free.
        num_texts: texts at once, each with a cache of its own; fewer where memory has no room for so many.
        has_adapter: an adapter will be loaded, so that a runtime that has two ways opens the one that takes it.
    """

    context: int | None = None
    num_threads: int | None = None
    memory_limit_bytes: int | None = None
    num_texts: int = 1
    has_adapter: bool = False

    def __post_init__(self) -> None:
        if self.context is not None and self.context < 2:
            raise InputError(f"context is {self.context}, expected at least 2: one token of a prompt and one of a text")
        if self.num_threads is not None and not 1 <= self.num_threads <= MAX_THREADS:
            raise InputError(f"num_threads is {self.num_threads}, expected 1 to {MAX_THREADS}")
        if self.memory_limit_bytes is not None and self.memory_limit_bytes < 1:
            raise InputError(f"memory_limit_bytes is {self.memory_limit_bytes}, expected at least 1")
        if self.num_texts < 1:
            raise InputError(f"num_texts is {self.num_texts}, expected at least 1")

    @property
    def threads(self) -> int:
        """`num_threads`, resolved."""
        return self.num_threads or num_processors()

    def context_of(self, description: OfflineDescription) -> int:
        """`context`, resolved.

        Raises:
            InputError: it is more than the model was made for.
        """
        if self.context is not None and self.context > description.context:
            raise InputError(
                f"context is {self.context}, expected at most {description.context}, which this model was made for"
            )
        return self.context or description.context


def num_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Adapter(Protocol):
    """What a runtime's `load_adapter` gives: a LoRA adapter, ready for its own texts alone."""

    @property
    def name(self) -> str:
        """Where it came from, for people."""
        ...


class OfflineText(Protocol):
    """One text in a model, with the keys and values of all its tokens. Used by one thread at a time."""

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        ...

    def extend(self, token_ids: Sequence[int] | NDArray[np.int64], *, num_logits: int = 1) -> NDArray[np.float32]:
        """Append tokens.

        Args:
            token_ids: int (n,), at least one.
            num_logits: after how many of the last tokens the next one is wanted, 1 to n.

        Returns:
            Logits of the next token after each of these, float32 (num_logits, vocab).

        Raises:
            InputError: the text would be longer than the context, or a token is unknown.
        """
        ...

    def truncate(self, length: int) -> None:
        """Drop all tokens from place `length` on, 0 <= length <= `self.length`. What remains costs nothing."""
        ...

    def close(self) -> None:
        """Give the memory back; it cannot be extended afterwards."""
        ...


class OfflineModel(Protocol):
    """A model in this process. Its texts may be used from several threads, each text from one at a time."""

    @property
    def folder(self) -> OfflineFolder:
        """What it was read from."""
        ...

    @property
    def description(self) -> OfflineDescription:
        """What it is."""
        ...

    @property
    def context(self) -> int:
        """Tokens that fit into one text."""
        ...

    @property
    def num_texts(self) -> int:
        """Texts that memory has room for at once; the caller keeps to it."""
        ...

    def load_adapter(self, path: Path) -> Adapter:
        """Read an adapter for texts of this model; the model itself stays as it is.

        Raises:
            InputError: it is damaged, or fits another model.
        """
        ...

    def open(self, adapter: Adapter | None = None) -> OfflineText:
        """An empty text, written with `adapter` from its first token to its last.

        Raises:
            InputError: the adapter was loaded for another runtime.
        """
        ...

    def close(self) -> None:
        """Give the model's memory back, after all its texts."""
        ...


def check_extension(
    token_ids: Sequence[int] | NDArray[np.int64], *, length: int, context: int, vocab_size: int, num_logits: int
) -> NDArray[np.int64]:
    """The tokens as int64 (n,), if a text of `length` tokens may be extended by them; for the runtimes.

    Raises:
        InputError: there is none, they do not fit, or one is unknown.

    Example:
        >>> check_extension([5, 6], length=0, context=8, vocab_size=10, num_logits=1)
        array([5, 6])
    """
    ids = np.asarray(token_ids, np.int64)
    if ids.ndim != 1 or len(ids) == 0:
        raise InputError(f"token_ids has shape {ids.shape}, expected (n,) with at least one token")
    if not 1 <= num_logits <= len(ids):
        raise InputError(f"num_logits is {num_logits}, expected 1 to {len(ids)}, as many as there are tokens")
    if length + len(ids) > context:
        raise InputError(
            f"the text would have {length + len(ids)} tokens, expected at most {context}, the context of the offline "
            "model; shorten it, or open the model with a longer context"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise InputError(f"token_ids holds {wrong}, expected ids from 0 to {vocab_size - 1}")
    return ids


def check_truncation(to: int, *, length: int) -> None:
    """Refuse a length that a text cannot be cut back to.

    Raises:
        InputError: it is negative or more than the text has.
    """
    if not 0 <= to <= length:
        raise InputError(f"length is {to}, expected 0 to {length}, the tokens of the text")
