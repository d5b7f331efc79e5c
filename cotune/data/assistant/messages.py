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


def draw_style(rng: Random) -> tuple[str, str]:
    """A style word for a request with a space after it, or no word at all; and its register."""
    if rng.random() < 0.25:
        return "", "friendly"
    word = rng.choice(tuple(STYLES))
    return f"{word} ", STYLES[word]


def draw_letter(rng: Random, who: str, person: Person, voice: Voice | None) -> tuple[str, str]:
    """A request to write to `who`, and the message to `person`.

    Args:
        who: how the request names the addressee, such as 'my sister Anna'.
        voice: how the message begins, ends and sounds; by default as its register does.
    """
    style, register = draw_style(rng)
    topic = MESSAGE_TOPICS[rng.choice(tuple(MESSAGE_TOPICS))]
    slots = topic.draw_slots(rng)
    pronouns = {"subject": person.subject, "object": person.object, "possessive": person.possessive}
    wish = rng.choice(topic.wishes).format(**slots, **pronouns)
    request = rng.choice(COMMANDS).format(style=style, form=rng.choice(FORMS), who=who, wish=wish)
    body = rng.choice(topic.bodies[register]).format(**slots)
    return words.fix_articles(request), (voice or VOICES[register]).letter(rng, person.name, body)


def write_message(rng: Random, voice: Voice | None = None) -> tuple[str, str]:
    """A message to somebody whom the request names."""
    person = words.draw_person(rng)
    return draw_letter(rng, rng.choice((f"my {person.relation} {person.name}", person.name)), person, voice)
