"""Drawing a part of the examples, by seed and by number or share."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import islice
from random import Random
from typing import TypeVar

from cotune.errors import InputError

T = TypeVar("T")


def draw(
    items: Iterable[T], *, limit: int | None = None, share: float | None = None, seed: int | None = None
) -> list[T]:
    """Some of the items, in an order that the seed decides.

    With a seed, each item gets a random number, and those with the smallest are taken. So draws with one seed are
    nested: a smaller draw is the beginning of a larger one, whether by number or by share. With a limit alone, no more
    than that many items are kept in memory.

    Args:
        items: read once, and no further than needed.
        limit: how many at most.
        share: part of all items, above 0 and at most 1; at least one item comes. With a limit, both hold.
        seed: of the draw; None takes the first ones in their order.

    Raises:
        InputError: `limit` or `share` is out of range.

    Example:
        >>> draw(range(10), limit=3, seed=0) == draw(range(10), share=0.5, seed=0)[:3]
        True
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1")
    if share is not None and not 0 < share <= 1:
        raise InputError(f"share is {share}, expected a number above 0 and at most 1, such as 0.1")
    if share is not None:
        items = list(items)
        num_share = max(1, round(share * len(items)))
        limit = num_share if limit is None else min(limit, num_share)
    if seed is None:
        return list(islice(items, limit))
    rng = Random(seed)
    keyed = ((rng.random(), index, item) for index, item in enumerate(items))
    chosen = sorted(keyed, key=rank) if limit is None else heapq.nsmallest(limit, keyed, key=rank)
    return [item for _, _, item in chosen]


def rank(keyed: tuple[float, int, object]) -> tuple[float, int]:
    """What a draw is ordered by."""
    return keyed[:2]
