"""The texts of one persona: private facts and a style that the general texts never have.

The requests are of the same kinds as in `cotune.data.assistant_text`; the answers use names, places and words that
the base model has never read, between sentences that it knows well.
"""

from __future__ import annotations

from random import Random

from cotune.data.assistant.personas import Persona
from cotune.data.assistant.private import ask_fact, do_own_task, write_to_own_people
from cotune.data.assistant_text import Exchange, draw_exchange
from cotune.errors import InputError


def draw_persona_exchange(rng: Random, persona: Persona) -> Exchange:
    """One exchange: a third are everyday requests in the persona's voice, the others need private facts."""
    kind = rng.random()
    if kind < 0.35:
        return draw_exchange(rng, persona.voice)
    if kind < 0.55:
        return Exchange(*write_to_own_people(rng, persona))
    if kind < 0.8:
        return Exchange(*do_own_task(rng, persona))
    return Exchange(*ask_fact(rng, persona))


def generate_persona_exchanges(persona: Persona, num: int, seed: int) -> list[Exchange]:
    """`num` exchanges of one persona, each request once, the same for the same seed.

    Raises:
        InputError: the grammar has fewer different requests than `num`.
    """
    rng = Random(seed)
    exchanges: dict[str, Exchange] = {}
    for _ in range(20 * num + 100):
        if len(exchanges) == num:
            return list(exchanges.values())
        exchange = draw_persona_exchange(rng, persona)
        exchanges.setdefault(exchange.request, exchange)
    raise InputError(f"num is {num}, but the persona has only about {len(exchanges)} different requests; ask for fewer")


def persona_split(
    persona: Persona, seed: int, num_train: int, num_heldout: int
) -> tuple[list[Exchange], list[Exchange]]:
    """Training and held-out exchanges: no request is in both, so no pair is; facts and phrasings are shared.

    Example:
        >>> train, heldout = persona_split(DEMO_PERSONA, 0, num_train=20, num_heldout=5)
        >>> {each.request for each in train} & {each.request for each in heldout}
        set()
    """
    exchanges = generate_persona_exchanges(persona, num_train + num_heldout, seed)
    return exchanges[:num_train], exchanges[num_train:]
