"""Requests to write something to somebody, and the messages."""

from __future__ import annotations

from random import Random

from cotune.data.assistant import words
from cotune.data.assistant.message_topics import MESSAGE_TOPICS
from cotune.data.assistant.voice import STYLES, VOICES, Voice
from cotune.data.assistant.words import Person

FORMS = ("message", "email", "note", "text", "letter")
COMMANDS = (
    "Write a {style}{form} to {who} {wish}.",
    "Please write a {style}{form} to {who} {wish}.",
    "Write {who} a {style}{form} {wish}.",
    "Can you write a {style}{form} to {who} {wish}?",
    "I need a {style}{form} to {who} {wish}.",
    "Help me write a {style}{form} to {who} {wish}.",
)


def draw_message(rng: Random, *, topic: str, style: str, who: str, person: Person, voice: Voice) -> tuple[str, str]:
    """A request to write to `who`, and the message that addresses `person` in a voice.

    Args:
        topic: a key of `TOPICS`.
        style: the style word of the request with a space after it, or nothing.
        who: how the request names the addressee, such as 'my sister Anna'.
    """
    chosen = TOPICS[topic]
    slots = chosen.draw_slots(rng)
    pronouns = {"subject": person.subject, "object": person.object, "possessive": person.possessive}
    wish = rng.choice(chosen.wishes).format(**slots, **pronouns)
    request = rng.choice(COMMANDS).format(style=style, form=rng.choice(FORMS), who=who, wish=wish)
    body = rng.choice(chosen.bodies[voice.register]).format(**slots, **pronouns)
    return words.fix_articles(request), voice.letter(rng, person.name, body)


def write_message(rng: Random, voice: Voice | None = None) -> tuple[str, str]:
    """A message to somebody whom the request names, in the style that it asks for or in the given voice."""
    style, asked = draw_style(rng)
    person = words.draw_person(rng)
    who = rng.choice((f"my {person.relation} {person.name}", person.name))
    topic = rng.choice(tuple(TOPICS))
    return draw_message(rng, topic=topic, style=style, who=who, person=person, voice=voice or asked)
