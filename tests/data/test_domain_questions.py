"""Domains share skills and no fact, and no test question was trained on."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from cotune.data.domain_questions import NUM_NAMES, DomainQuestions, generate_domains, generate_public
from cotune.data.templates import Example
from cotune.errors import InputError

DOMAINS = generate_domains(["law", "med", "sea"], num_things=10, num_skills=30, num_test=15, seed=3)


def words_of(texts: list[Example]) -> set[str]:
    return {word for one in texts for word in re.findall(r"[a-z]+", (one.prompt + one.target).lower())}


def names_of(domain: DomainQuestions) -> set[str]:
    return {one.name for one in domain.things}


def test_facts_belong_to_one_domain_alone() -> None:
    for one, other in combinations(DOMAINS, 2):
        assert len(names_of(one)) == 10 and not names_of(one) & names_of(other)
        for texts in (other.train, other.facts, other.skills, other.mixed):
            assert not names_of(one) & words_of(texts)
    assert not words_of(generate_public(60, seed=3)) & set().union(*map(names_of, DOMAINS))


def test_no_test_question_is_trained_on_and_every_fact_is_tested() -> None:
    trained = {one.prompt for domain in DOMAINS for one in domain.train}
    for domain in DOMAINS:
        assert len(domain.train) == 10 * 3 * 2 + 30 and len({one.prompt for one in domain.train}) == len(domain.train)
        assert len(domain.facts) == 30 and len(domain.skills) == len(domain.mixed) == 15
        for texts in (domain.facts, domain.skills, domain.mixed):
            assert not trained & {one.prompt for one in texts}
        assert names_of(domain) <= words_of(domain.train) & words_of(domain.facts)
    assert DOMAINS[0].skills == DOMAINS[1].skills


def test_answers_are_right() -> None:
    doors = {one.name: one.num_doors for domain in DOMAINS for one in domain.things}
    colours = {one.name: one.colour for domain in DOMAINS for one in domain.things}
    seen = set()
    everything = [one for domain in DOMAINS for part in (domain.train, domain.facts, domain.mixed) for one in part]
    for one in everything + generate_public(50):
        request, answer = one.prompt.removeprefix("User: ").removesuffix("\nAssistant:"), one.target.strip()
        if found := re.fullmatch(r"What is (\d+) plus (\d+)\?", request):
            assert int(answer) == int(found[1]) + int(found[2])
        elif found := re.fullmatch(r"Which is more, (\d+) or (\d+)\?", request):
            assert int(answer) == max(int(found[1]), int(found[2]))
        elif found := re.fullmatch(r"Which word is number (\d) of (.*)\?", request):
            assert answer == found[2].split(", ")[int(found[1]) - 1]
        elif found := re.fullmatch(r"How many doors do the (\w+) and the (\w+) have together\?", request):
            assert int(answer) == doors[found[1]] + doors[found[2]]
        elif "doors" in request:
            (name,) = doors.keys() & set(re.findall(r"[a-z]+", request))
            assert int(answer) == doors[name]
        elif "colour" in request:
            (name,) = colours.keys() & set(re.findall(r"[a-z]+", request))
            assert answer == colours[name]
        else:
            continue
        seen.add(request.split()[0])
    assert {"What", "Which", "How", "Count", "The", "Name"} <= seen


def test_the_seed_decides() -> None:
    again = generate_domains(["law", "med", "sea"], num_things=10, num_skills=30, num_test=15, seed=3)
    assert again == DOMAINS
    assert generate_domains(["law"], seed=4) != generate_domains(["law"], seed=5)
    assert generate_public(5, seed=1) != generate_public(5, seed=2)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(InputError, match="each name once"):
        generate_domains(["law", "law"])
    with pytest.raises(InputError, match="num_things is 1"):
        generate_domains(["law"], num_things=1)
    with pytest.raises(InputError, match="expected 2 to"):
        generate_domains(["law", "med"], num_things=NUM_NAMES)
    with pytest.raises(InputError, match="ask for fewer"):
        generate_public(100_000)
