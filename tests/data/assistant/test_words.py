from __future__ import annotations

from random import Random

from cotune.data.assistant.words import capitalize, draw_person, draw_when, fix_articles, invent_name, join_words


def test_words_by_hand() -> None:
    assert join_words(["a"]) == "a"
    assert join_words(["a", "b", "c"]) == "a, b and c"
    assert capitalize("hello Anna") == "Hello Anna"
    assert fix_articles("Write a email, a short email.") == "Write an email, a short email."


def test_invented_names_have_no_q_x_or_y() -> None:
    names = {invent_name(Random(seed)) for seed in range(2000)}
    assert len(names) > 1500
    assert not set("qxyQXY") & set("".join(names))
    assert all(name.isalpha() and name == name.capitalize() for name in names)


def test_pronouns_fit_relations() -> None:
    people = [draw_person(Random(seed)) for seed in range(300)]
    assert {person.object for person in people if person.relation in ("sister", "aunt")} == {"her"}
    assert {person.possessive for person in people if person.relation in ("brother", "uncle")} == {"his"}


def test_times_read_well() -> None:
    whens = {draw_when(Random(seed)) for seed in range(500)}
    assert not any("noon o'clock" in when or "past noon" in when for when in whens)
    assert len(whens) > 200
