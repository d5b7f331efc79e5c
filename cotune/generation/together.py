"""Many generations in one batch, for those who judge a model on many texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from cotune.errors import InputError
from cotune.generation.protocols import Cursor, DecodingBackbone, RowWork, SideState, StepFeatures
from cotune.generation.reference import Generation, Personal, begin, decide
from cotune.generation.request import Decision, GenerationRequest
from cotune.generation.stopping import find_ending

NUM_ROWS = 16
"""Texts that are written at once: more make a pass longer and hold more keys and values."""


@dataclass
class _Text:
    """One generation under way."""

    index: int
    request: GenerationRequest
    cursor: Cursor
    side: SideState | None
    features: StepFeatures
    decisions: list[Decision] = field(default_factory=list)


def generate_together(
    backbone: DecodingBackbone,
    personal: Personal | None,
    requests: Sequence[GenerationRequest],
    *,
    num_rows: int = NUM_ROWS,
    tell: Callable[[int], None] | None = None,
) -> list[Generation]:
    """What `generate` gives for each request, with one pass of the backbone for the next tokens of many texts.

    Where the backbone's rows are independent, so are the texts, to the last token.

    Args:
        backbone: the frozen model.
        personal: the device's part; None is the base model alone.
        requests: what to do; stop strings are not supported.
        num_rows: texts at once, at most.
        tell: told how many texts are finished, after each.

    Raises:
        InputError: a request with stop strings, or `num_rows` below 1.

    Example:
        >>> generations = generate_together(backbone, None, requests)  # doctest: +SKIP
    """
    if num_rows < 1:
        raise InputError(f"num_rows is {num_rows}, expected at least 1")
    if any(request.stop_strings for request in requests):
        raise InputError("a request has stop_strings, expected none; write such texts one by one with generate")
    finished: dict[int, Generation] = {}
    waiting = enumerate(requests)
    texts = list(_begin(backbone, personal, islice(waiting, num_rows)))
    while texts:
        going: list[_Text] = []
        for text in texts:
            text.decisions.append(decide(text.features, personal, text.request, text.cursor.length, text.side))
            ending = find_ending([one.token_id for one in text.decisions], text.request, None)
            if ending is None:
                going.append(text)
                continue
            finished[text.index] = Generation(decisions=text.decisions, ending=ending)
            text.cursor.close()
            if tell is not None:
                tell(len(finished))
        work = [RowWork(cursor=one.cursor, token_ids=np.array([one.decisions[-1].token_id], np.int64)) for one in going]
        if work:
            for text, features in zip(going, backbone.extend(work), strict=True):
                text.features = features[-1]
        texts = [*going, *_begin(backbone, personal, islice(waiting, num_rows - len(going)))]
    return [finished[index] for index in range(len(requests))]


def _begin(
    backbone: DecodingBackbone, personal: Personal | None, requests: Iterable[tuple[int, GenerationRequest]]
) -> Iterator[_Text]:
    for index, request in requests:
        cursor, side, features = begin(backbone, personal, request)
        yield _Text(index, request, cursor, side, features)
