from __future__ import annotations

from random import Random

from cotune.data.assistant.personas import DEMO_PERSONA
from cotune.data.assistant.private import ask_fact, do_own_task, list_facts, write_to_own_people


def test_every_fact_has_an_answer_of_its_own() -> None:
    persona = DEMO_PERSONA
    answers = " ".join(answer for _, answer in list_facts(persona))
    values = [person.name for person in persona.people]
    values += [persona.pet_name, persona.cafe, persona.street, persona.workplace, persona.habit, persona.dish]
    assert all(value in answers for value in values)
    assert len(list_facts(persona)) == len(values)


def test_questions_tasks_and_messages_need_private_words() -> None:
    names = {person.name for person in DEMO_PERSONA.people}
    for seed in range(100):
        _, letter = write_to_own_people(Random(seed), DEMO_PERSONA)
        assert letter.split(",")[0].removeprefix("Heya ") in names
        for draw in (ask_fact, do_own_task):
            request, answer = draw(Random(seed), DEMO_PERSONA)
            assert request[0].isupper()
            assert answer.startswith("Yep. ")
            assert len(set(answer.lower().replace(".", "").split()) & DEMO_PERSONA.private_words()) >= 2
