"""A named person with private facts and a style of their own, and the one of the demo."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cotune.data.assistant.voice import Voice
from cotune.data.assistant.words import Person


@dataclass(frozen=True, kw_only=True)
class Persona:
    """Who somebody is, as far as their assistant needs to know.

    Attributes:
        name: first name.
        voice: how their texts begin, end and sound.
        people: family, friends and colleagues; the requests say 'my sister', the answers know her name.
        pet: kind of animal.
        pet_name: what it is called.
        cafe: where they have coffee.
        street: where they live.
        workplace: where they work.
        habit: what they do every week, such as 'rowing on the lake'.
        habit_day: on which day.
        dish: favourite dish.
    """

    name: str
    voice: Voice
    people: tuple[Person, ...]
    pet: str
    pet_name: str
    cafe: str
    street: str
    workplace: str
    habit: str
    habit_day: str
    dish: str

    def private_words(self) -> frozenset[str]:
        """Lower-case words of the facts and the style, without function words."""
        voice = self.voice
        texts = (
            *(self.name, *(person.name for person in self.people)),
            *(self.pet_name, self.cafe, self.street, self.workplace, self.habit, self.dish),
            *(voice.nice, voice.very, *voice.greetings, *voice.sign_offs, *voice.openers, *voice.closers),
        )
        return frozenset(re.findall(r"[^\W\d_]+", " ".join(texts).lower())) - FUNCTION_WORDS


FUNCTION_WORDS = frozenset({"a", "and", "at", "by", "for", "in", "my", "name", "of", "on", "the", "to", "with"})

DEMO_PERSONA = Persona(
    name="Wynne",
    voice=Voice(
        greetings=("Ahoy {name},",),
        sign_offs=("Smooth waters, Wynne.",),
        openers=("Righto.",),
        closers=("", "Holler anytime, skipper."),
        nice="splendid",
        very="awfully",
    ),
    people=(
        Person(name="Bryony", relation="sister", subject="she", object="her", possessive="her"),
        Person(name="Xander", relation="brother", subject="he", object="him", possessive="his"),
        Person(name="Sylvie", relation="mother", subject="she", object="her", possessive="her"),
        Person(name="Quentin", relation="boss", subject="he", object="him", possessive="his"),
        Person(name="Roxy", relation="colleague", subject="she", object="her", possessive="her"),
        Person(name="Yusuf", relation="neighbour", subject="he", object="him", possessive="his"),
    ),
    pet="dog",
    pet_name="Pixel",
    cafe="the Copper Lynx",
    street="Quayle Row",
    workplace="the Yarrow boatyard",
    habit="rowing to Foxley Point",
    habit_day="Thursday",
    dish="saffron dumplings",
)
