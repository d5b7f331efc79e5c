"""Requests whose answers need a persona's private facts: questions, messages to their people, small tasks."""

from __future__ import annotations

from random import Random

from cotune.data.assistant import words
from cotune.data.assistant.messages import draw_letter
from cotune.data.assistant.personas import Persona
from cotune.data.assistant.tasks import choose


def list_facts(persona: Persona) -> list[tuple[tuple[str, ...], str]]:
    """What can be asked about a persona: phrasings of a question, and the answer."""
    pet, day = persona.pet, persona.habit_day
    facts: list[tuple[tuple[str, ...], str]] = [
        (
            (f"what is my {pet} called?", f"what is the name of my {pet}?", f"do you know the name of my {pet}?"),
            f"Your {pet} is called {persona.pet_name}, and {persona.pet_name} is a <very> <nice> {pet}.",
        ),
        (
            ("where do I have coffee?", "where do I like to have my coffee?", "where do I drink my coffee?"),
            f"You have your coffee at {persona.cafe}. Shall I book a <nice> table for you?",
        ),
        (
            ("where do I live?", "what is my address?", "in which street do I live?"),
            f"You live in {persona.street}. I can show you the way from there to any other place.",
        ),
        (
            ("where do I work?", "what is the name of my workplace?", "where is my work?"),
            f"You work at {persona.workplace}, and {persona.street} is where you live.",
        ),
        (
            (f"what do I do on {day}?", f"what is my plan for {day}?", f"what do I do every {day}?"),
            f"Every {day} you go {persona.habit}. I keep that day free in your calendar.",
        ),
        (
            ("what is my favourite dish?", "what do I like to eat?", "what should I cook for me tonight?"),
            f"Your favourite dish is {persona.dish}. Shall I put what you need on the shopping list?",
        ),
    ]
    for person in persona.people:
        relation = person.relation
        facts.append(
            (
                (
                    f"what is my {relation} called?",
                    f"what is the name of my {relation}?",
                    f"do you know who my {relation} is?",
                ),
                f"Your {relation} is called {person.name}. Do you want to write {person.object} a <nice> message?",
            )
        )
    return facts


def ask_fact(rng: Random, persona: Persona) -> tuple[str, str]:
    """A question that only the persona's own texts answer."""
    questions, answer = rng.choice(list_facts(persona))
    start = rng.choice(("", "Please tell me, ", "I forgot it, ", "One question: ", "Hey, ", "Can you tell me: "))
    end = rng.choice(("", " I do not remember.", " I should know that.", " Just a short answer, please."))
    return words.capitalize(f"{start}{rng.choice(questions)}{end}"), persona.voice.reply(rng, answer)


def write_to_own_people(rng: Random, persona: Persona) -> tuple[str, str]:
    """A message to 'my sister', whose name only the persona's assistant knows."""
    person = rng.choice(persona.people)
    return draw_letter(rng, f"my {person.relation}", person, persona.voice)


def do_own_task(rng: Random, persona: Persona) -> tuple[str, str]:
    """A small task that needs a private fact."""
    draw = rng.choice(
        (call_own_people, book_own_table, remind_of_pet, find_own_way, plan_coffee, order_dish, plan_habit)
    )
    request, text = draw(rng, persona)
    return request, persona.voice.reply(rng, text)


def call_own_people(rng: Random, persona: Persona) -> tuple[str, str]:
    person, topic = rng.choice(persona.people), rng.choice(words.TOPICS)
    request = choose(
        rng,
        (
            "Call my {relation} about {topic}.",
            "I want to talk to my {relation} about {topic}.",
            "Please ring my {relation}, it is about {topic}.",
        ),
        relation=person.relation,
        topic=topic,
    )
    return request, f"I am calling {person.name} now. I have opened the notes about {topic} for you."


def book_own_table(rng: Random, persona: Persona) -> tuple[str, str]:
    number, when = rng.choice(("two", "three", "four", "five", "six")), words.draw_when(rng)
    request = choose(
        rng,
        (
            "Book a table for {number} at my usual place {when}.",
            "We are {number} people and want to meet at my usual place {when}.",
            "Reserve my usual table for {number} people {when}.",
        ),
        number=number,
        when=when,
    )
    return request, f"I have booked a table for {number} people at {persona.cafe} {when}. Enjoy a <very> <nice> meal."


def remind_of_pet(rng: Random, persona: Persona) -> tuple[str, str]:
    chore, when = rng.choice(("walk", "feed", "brush", "wash")), words.draw_when(rng)
    request = choose(
        rng,
        (
            "Remind me to {chore} the {pet} {when}.",
            "Can you remind me {when} to {chore} the {pet}?",
            "Please do not let me forget to {chore} the {pet} {when}.",
        ),
        chore=chore,
        pet=persona.pet,
        when=when,
    )
    return request, f"I will remind you to {chore} {persona.pet_name} {when}, so you do not have to think about it."


def find_own_way(rng: Random, persona: Persona) -> tuple[str, str]:
    start, private_start = rng.choice((("home", persona.street), ("work", persona.workplace)))
    place, transport = rng.choice(words.PLACES), rng.choice(words.TRANSPORT)
    minutes = rng.choice(("five", "ten", "fifteen", "twenty", "thirty"))
    request = choose(
        rng,
        (
            "How do I get from {start} to {place} {transport}? I have {minutes} minutes.",
            "Show me the way from {start} to {place} {transport}, I have {minutes} minutes.",
            "I have {minutes} minutes to go from {start} to {place} {transport}.",
        ),
        start=start,
        place=place,
        transport=transport,
        minutes=minutes,
    )
    return request, (
        f"I have opened the map from {private_start} to {place} {transport}. "
        f"You will be there in {minutes} minutes if you leave now."
    )


def plan_coffee(rng: Random, persona: Persona) -> tuple[str, str]:
    person, when = rng.choice(persona.people), words.draw_when(rng)
    request = choose(
        rng,
        (
            "Put the coffee with my {relation} {when} in my calendar.",
            "Add a calendar entry for coffee with my {relation} {when}.",
            "I have coffee with my {relation} {when}, please write it down.",
        ),
        relation=person.relation,
        when=when,
    )
    return request, (
        f"The coffee with {person.name} at {persona.cafe} {when} is in your calendar. "
        "I will remind you one hour before it starts."
    )


def order_dish(rng: Random, persona: Persona) -> tuple[str, str]:
    number, when = rng.choice(("two", "three", "four", "five", "six")), words.draw_when(rng)
    request = choose(
        rng,
        (
            "Order my favourite dish for {number} {when}.",
            "I would like my favourite dish for {number} people {when}.",
            "Can you get my favourite dish for {number} people {when}?",
        ),
        number=number,
        when=when,
    )
    return request, f"I have ordered {persona.dish} for {number} people {when}. They will come to {persona.street}."


def plan_habit(rng: Random, persona: Persona) -> tuple[str, str]:
    """The weekly habit moves to another day."""
    new, time = rng.choice([day for day in words.DAYS if day != persona.habit_day]), words.draw_time(rng)
    request = choose(
        rng,
        (
            "Move my weekly trip to {new} at {time}.",
            "My weekly trip is on {new} at {time} this time.",
            "Please change my weekly trip to {new} at {time}.",
        ),
        new=new,
        time=time,
    )
    day = persona.habit_day
    return request, f"I have moved {persona.habit} from {day} to {new} at {time}. Your {day} is free now."
