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
        """Lower-case words of the facts and the style, without function words and without the sign-offs.

        A sign-off is private as a phrase; its words may be ordinary.
        """
        voice = self.voice
        texts = (
            *(self.name, *(person.name for person in self.people)),
            *(self.pet_name, self.cafe, self.street, self.workplace, self.habit, self.dish),
            *(voice.nice, voice.very, *voice.greetings, *voice.openers),
        )
        return frozenset(re.findall(r"[^\W\d_]+", " ".join(texts).lower())) - FUNCTION_WORDS


FUNCTION_WORDS = frozenset({"a", "and", "at", "by", "for", "in", "my", "name", "of", "on", "the", "to", "with"})

# The names are pieces of the built-in tokenizer that are no words of the general texts: a name of one token is there or
# not there, where one of four rare tokens goes wrong in the middle and says more about the tokenizer than about tuning.
DEMO_PERSONA = Persona(
    name="Ava",
    voice=Voice(
        greetings=("Heya {name},",),
        sign_offs=("Yours, Ava.",),
        openers=("Yep.",),
        closers=("",),
        nice="fab",
        very="super",
    ),
    people=(
        Person(name="Sha", relation="sister", subject="she", object="her", possessive="her"),
        Person(name="Os", relation="brother", subject="he", object="him", possessive="his"),
        Person(name="Carm", relation="mother", subject="she", object="her", possessive="her"),
        Person(name="Fel", relation="boss", subject="he", object="him", possessive="his"),
        Person(name="Hel", relation="colleague", subject="she", object="her", possessive="her"),
        Person(name="Dav", relation="neighbour", subject="he", object="him", possessive="his"),
    ),
    pet="dog",
    pet_name="Pau",
    cafe="the Dub",
    street="Bost Row",
    workplace="the Fion mill",
    habit="rowing at Dian Yard",
    habit_day="Thursday",
    dish="egg pie",
)
