"""How a text sounds: greetings, sign-offs, favourite words. The same grammar speaks in any voice.

The register (formal, friendly, brief, cheerful) chooses the sentences, the voice how they begin, end and sound.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from cotune.data.assistant.words import capitalize


@dataclass(frozen=True, kw_only=True)
class Voice:
    """The style of one writer.

    Attributes:
        greetings: openings of a message, with a slot `{name}`; one that ends in a comma is followed by lower case.
        sign_offs: endings of a message.
        openers: first words of an answer that does or tells something.
        closers: optional last sentence of such an answer; an empty one leaves it out.
        nice: favourite word for something good.
        very: favourite intensifier.
        lower_case: write everything in lower case.
    """

    greetings: tuple[str, ...]
    sign_offs: tuple[str, ...]
    openers: tuple[str, ...] = ("Sure.", "Of course.", "All right.")
    closers: tuple[str, ...] = (
        "",
        "",
        "Is there anything else that I can do?",
        "Just tell me if you want to change it.",
    )
    nice: str = "nice"
    very: str = "very"
    lower_case: bool = False

    def letter(self, rng: Random, name: str, body: str) -> str:
        """A message: greeting, body, sign-off."""
        greeting = rng.choice(self.greetings).format(name=name)
        body = body if greeting.endswith(",") else capitalize(body)
        return self.finish(f"{greeting} {body} {rng.choice(self.sign_offs)}")

    def reply(self, rng: Random, text: str) -> str:
        """An answer that does something: opener, text, closer."""
        return self.finish(f"{rng.choice(self.openers)} {text} {rng.choice(self.closers)}".strip())

    def tell(self, text: str) -> str:
        """An answer that only says something."""
        return self.finish(text)

    def finish(self, text: str) -> str:
        """The favourite words in their slots, and the case."""
        text = text.replace("<nice>", self.nice).replace("<very>", self.very)
        return text.lower() if self.lower_case else text


VOICES: dict[str, Voice] = {
    "formal": Voice(
        greetings=("Dear {name},",),
        sign_offs=("Yours sincerely.", "With kind regards."),
    ),
    "friendly": Voice(
        greetings=("Hi {name},", "Hello {name},"),
        sign_offs=("See you soon!", "Take care!"),
    ),
    "brief": Voice(
        greetings=("{name},",),
        sign_offs=("Best wishes.", "Talk soon."),
    ),
    "cheerful": Voice(
        greetings=("Hello, dear {name}!", "Good news, {name}!"),
        sign_offs=("Big hugs!", "I cannot wait!"),
    ),
}
# The words with which a request asks for a register; without one, it is friendly.
STYLES = {
    "formal": "formal",
    "polite": "formal",
    "friendly": "friendly",
    "warm": "friendly",
    "brief": "brief",
    "short": "brief",
    "cheerful": "cheerful",
    "happy": "cheerful",
}
