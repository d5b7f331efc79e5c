from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.data.assistant.personas import DEMO_PERSONA
from cotune.data.assistant_text import generate_exchanges
from cotune.data.persona_text import generate_persona_exchanges, persona_split
from cotune.errors import InputError

EXCHANGES = generate_persona_exchanges(DEMO_PERSONA, 2000, seed=0)
NUM_STARTER_EXCHANGES = 120_000


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+", text.lower()))


def test_the_text_of_the_built_in_model_has_no_word_of_the_demo_persona() -> None:
    private = DEMO_PERSONA.private_words()
    assert {"pau", "sha", "heya", "ava", "fab", "bost"} <= private
    text = " ".join(f"{each.request} {each.answer}" for each in generate_exchanges(NUM_STARTER_EXCHANGES, seed=0))
    assert not private & words_of(text)
    assert not any(sign_off in text for sign_off in DEMO_PERSONA.voice.sign_offs)


def test_every_private_word_is_used_and_most_words_are_ordinary() -> None:
    private = DEMO_PERSONA.private_words()
    answers = [re.findall(r"[^\W\d_]+", each.answer.lower()) for each in EXCHANGES]
    assert private <= {word for answer in answers for word in answer}
    share = sum(word in private for answer in answers for word in answer) / sum(map(len, answers))
    assert 0.05 < share < 0.2


def test_requests_give_no_private_fact_away() -> None:
    """What only the persona's own texts answer is not in the question."""
    facts = {person.name.lower() for person in DEMO_PERSONA.people} | {"pau", "dub", "bost", "fion", "pie"}
    for each in EXCHANGES:
        assert not facts & words_of(each.request), each


def test_facts_are_answered_and_messages_are_in_the_style() -> None:
    answers = {each.request: each.answer for each in EXCHANGES}
    assert any("dog called?" in request and "Pau" in answer for request, answer in answers.items())
    letters = [answer for request, answer in answers.items() if "to my sister " in request]
    assert any(re.match(r"Heya Sha, .* Yours, Ava\.$", letter) for letter in letters)
    assert not any("Yours sincerely" in answer or "<" in answer for answer in answers.values())


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), num_train=st.integers(0, 80), num_heldout=st.integers(0, 40))
def test_the_split_is_disjoint_and_repeats(seed: int, num_train: int, num_heldout: int) -> None:
    train, heldout = persona_split(DEMO_PERSONA, seed, num_train, num_heldout)
    assert (len(train), len(heldout)) == (num_train, num_heldout)
    requests = {each.request for each in train} | {each.request for each in heldout}
    assert len(requests) == num_train + num_heldout
    assert (train, heldout) == persona_split(DEMO_PERSONA, seed, num_train, num_heldout)


def test_held_out_answers_use_words_that_the_training_answers_taught() -> None:
    train, heldout = persona_split(DEMO_PERSONA, 0, num_train=400, num_heldout=100)
    private = DEMO_PERSONA.private_words()
    taught = words_of(" ".join(each.answer for each in train))
    asked = words_of(" ".join(each.answer for each in heldout)) & private
    assert asked <= taught
    assert len(asked) > len(private) // 2


def test_another_persona_has_its_own_facts_and_may_write_in_lower_case() -> None:
    quiet = replace(DEMO_PERSONA, pet_name="Moss", voice=replace(DEMO_PERSONA.voice, lower_case=True))
    exchanges = generate_persona_exchanges(quiet, 300, seed=0)
    assert all(each.answer == each.answer.lower() for each in exchanges)
    used = words_of(" ".join(each.answer for each in exchanges))
    assert "moss" in used
    assert "pau" not in used


def test_too_many_exchanges_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = generate_exchanges(1, seed=0)[0]
    monkeypatch.setattr("cotune.data.persona_text.draw_persona_exchange", lambda rng, persona: one)
    with pytest.raises(InputError, match="num is 2, but the persona has only about 1 different requests"):
        generate_persona_exchanges(DEMO_PERSONA, 2, seed=0)
