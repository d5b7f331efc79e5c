"""A seeded generator of assistant-style requests and answers over people, places, times, tools and styles.

The built-in `starter` model learns from these texts. They are made by a small grammar in `cotune.data.assistant`:
every kind of request has several phrasings, an answer that follows from the request, and slots that are drawn anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from cotune.data.assistant.messages import write_message
from cotune.data.assistant.questions import QUESTIONS
from cotune.data.assistant.talk import TALK
from cotune.data.assistant.tasks import TASKS
from cotune.data.assistant.voice import VOICES, Voice

# How often each family of requests comes.
FAMILIES = {"message": 0.32, "task": 0.32, "question": 0.19, "talk": 0.17}


@dataclass(frozen=True)
class Exchange:
    """One request of a user and the answer to it."""

    request: str
    answer: str


def draw_exchange(rng: Random, voice: Voice | None = None) -> Exchange:
    """One exchange; without a voice, in the style that the request asks for."""
    family = rng.choices(tuple(FAMILIES), tuple(FAMILIES.values()))[0]
    if family == "message":
        return Exchange(*write_message(rng, voice))
    kinds = {"task": TASKS, "question": QUESTIONS, "talk": TALK}[family]
    return Exchange(*kinds[rng.choice(tuple(kinds))](rng, voice or VOICES["friendly"]))


def generate_exchanges(num: int, seed: int) -> list[Exchange]:
    """`num` exchanges, the same for the same seed; short ones such as small talk may repeat.

    Example:
        >>> generate_exchanges(2, seed=0) == generate_exchanges(2, seed=0)
        True
    """
    rng = Random(seed)
    return [draw_exchange(rng) for _ in range(num)]
