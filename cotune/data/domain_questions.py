"""Questions of several made-up domains: facts that one domain alone has, and skills that all share.

What it measures: a device learns the facts of its domain, and every domain practises the same skills. Whoever answers
a fact of a domain whose texts it never had got knowledge that crossed; whether texts crossed is a search for names.

    fact     "What colour is the <name>?"                                   needs the domain's texts
    skill    "What is 17 plus 5?", with numbers drawn for this text          needs practice, and no fact
    mixed    "How many doors do the <name> and the <name> have together?"    needs both

Names are made of syllables and belong to one domain, whatever the number of domains; so do all facts about them. A fact
is trained on in some phrasings and tested in another one, a skill with other numbers, so that no test question is a
training question. Every answer is one word or one number: exact match is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from cotune.data.templates import Example, format_answer, format_request
from cotune.errors import InputError

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "brown", "grey")
PLACES = ("harbour", "forest", "market", "bridge", "valley", "tower", "garden", "station")
MAX_NUMBER = 20
_FIRST = ("ba", "do", "fi", "ga", "ko", "lu", "me", "no", "pi", "ra", "su", "ta", "vo", "wi", "ze")
_LAST = ("bel", "dan", "fort", "gar", "kis", "lor", "mun", "nax", "pol", "rin", "sek", "tov", "vek", "zam")
NUM_NAMES = len(_FIRST) ** 2 * len(_LAST)

# For training, and behind them one for testing.
_COLOUR = ("What colour is the {name}?", "Name the colour of the {name}.", "The {name} has which colour?")
_PLACE = ("Where is the {name}?", "In which place is the {name}?", "At what place can one find the {name}?")
_DOORS = ("How many doors does the {name} have?", "Count the doors of the {name}.", "The {name} has how many doors?")


@dataclass(frozen=True)
class Thing:
    """A made-up thing and all that is known of it.

    Attributes:
        name: of no other thing in any domain.
        colour, place: one word.
        num_doors: 1 to `MAX_NUMBER`.
    """

    name: str
    colour: str
    place: str
    num_doors: int


@dataclass(frozen=True)
class DomainQuestions:
    """The texts of one domain.

    Attributes:
        name: of the domain.
        things: its own.
        train: facts in their training phrasings, and skills.
        facts: every fact in a phrasing that is not trained on.
        skills: with numbers that are not trained on.
        mixed: sums over two things of the domain.
    """

    name: str
    things: tuple[Thing, ...]
    train: list[Example]
    facts: list[Example]
    skills: list[Example]
    mixed: list[Example]


def generate_domains(
    names: Sequence[str], *, num_things: int = 12, num_skills: int = 40, num_test: int = 20, seed: int = 0
) -> list[DomainQuestions]:
    """Questions of some domains, the same for the same seed.

    Args:
        names: of the domains, each once.
        num_things: of each domain; three facts are known of each, in two phrasings.
        num_skills: training questions of skills in each domain.
        num_test: test questions of skills, and of mixtures, at most one for each pair of things.
        seed: of everything.

    Raises:
        InputError: a name occurs twice, or there are not enough different names or numbers.

    Example:
        >>> law, med = generate_domains(["law", "med"], num_things=3, num_skills=4, num_test=2)
        >>> {one.name for one in law.things} & {one.name for one in med.things}
        set()
    """
    if len(set(names)) < len(names) or not names:
        raise InputError(f"names are {list(names)}, expected at least one domain, each name once")
    if num_things < 2 or len(names) * num_things > NUM_NAMES:
        raise InputError(
            f"num_things is {num_things}, expected 2 to {NUM_NAMES // len(names)} for {len(names)} domains"
        )
    rng = Random(seed)
    things = [_thing(rng, name) for name in rng.sample(_all_names(), len(names) * num_things)]
    skills = _skills(rng, num_test + len(names) * num_skills)
    tested, practised = skills[:num_test], skills[num_test:]
    found = []
    for index, name in enumerate(names):
        own = things[index * num_things : (index + 1) * num_things]
        train = [question for one in own for question in _facts(one, slice(0, -1))]
        train += practised[index * num_skills : (index + 1) * num_skills]
        rng.shuffle(train)
        facts = [question for one in own for question in _facts(one, slice(-1, None))]
        found.append(DomainQuestions(name, tuple(own), train, facts, tested, _mixed(rng, own, num_test)))
    return found


def generate_public(num: int, *, seed: int = 0) -> list[Example]:
    """Questions of skills alone, for the server: they name nothing of any domain.

    Raises:
        InputError: there are not so many different ones.

    Example:
        >>> len({one.prompt for one in generate_public(30)})
        30
    """
    return _skills(Random(f"public {seed}"), num)


def open_questions(domain: DomainQuestions) -> list[str]:
    """Prompts that ask for every fact of a domain, in a training phrasing, without their answers.

    Example:
        >>> (law,) = generate_domains(["law"], num_things=2, num_skills=4, num_test=1)
        >>> len(open_questions(law)), open_questions(law)[0] in {one.prompt for one in law.train}
        (6, True)
    """
    return [question.prompt for one in domain.things for question in _facts(one, slice(0, 1))]


def _all_names() -> list[str]:
    return [one + other + last for one in _FIRST for other in _FIRST for last in _LAST]


def _thing(rng: Random, name: str) -> Thing:
    return Thing(name, rng.choice(COLOURS), rng.choice(PLACES), rng.randint(1, MAX_NUMBER))


def _facts(thing: Thing, which: slice) -> list[Example]:
    kinds = ((_COLOUR, thing.colour), (_PLACE, thing.place), (_DOORS, str(thing.num_doors)))
    return [_question(one.format(name=thing.name), answer) for phrasings, answer in kinds for one in phrasings[which]]


def _skills(rng: Random, num: int) -> list[Example]:
    """Different questions with different numbers or words."""
    found: dict[str, Example] = {}
    for _ in range(20 * num + 100):
        if len(found) == num:
            return list(found.values())
        one = _skill(rng)
        found.setdefault(one.prompt, one)
    raise InputError(f"{num} questions of skills were asked for and only about {len(found)} differ; ask for fewer")


def _skill(rng: Random) -> Example:
    a, b = rng.randint(1, MAX_NUMBER), rng.randint(1, MAX_NUMBER)
    kind = rng.randrange(3)
    if kind == 0:
        return _question(f"What is {a} plus {b}?", str(a + b))
    if kind == 1:
        return _question(f"Which is more, {a} or {b}?", str(max(a, b)))
    words = rng.sample([*COLOURS, *PLACES], 3)
    place = rng.randrange(3)
    return _question(f"Which word is number {place + 1} of {', '.join(words)}?", words[place])


def _mixed(rng: Random, things: Sequence[Thing], num: int) -> list[Example]:
    pairs = [(one, other) for index, one in enumerate(things) for other in things[index + 1 :]]
    return [
        _question(
            f"How many doors do the {one.name} and the {other.name} have together?",
            str(one.num_doors + other.num_doors),
        )
        for one, other in rng.sample(pairs, min(num, len(pairs)))
    ]


def _question(request: str, answer: str) -> Example:
    return Example(format_request(request), format_answer(answer))
