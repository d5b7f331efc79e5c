"""Recommendations, how-tos, lists, plain knowledge and small talk."""

from __future__ import annotations

from random import Random

from cotune.data.assistant import words
from cotune.data.assistant.knowledge import DISHES, GIFTS, HOW_TO, OUTINGS, SMALL_TALK, THINGS, TIPS
from cotune.data.assistant.tasks import Draw, choose
from cotune.data.assistant.voice import Voice


def recommend_gift(rng: Random, voice: Voice) -> tuple[str, str]:
    person, hobby = words.draw_person(rng), rng.choice(tuple(GIFTS))
    first, second = GIFTS[hobby]
    request = choose(
        rng,
        (
            "What can I give my {relation} {name}, who loves {hobby}?",
            "I need a present for my {relation} {name}, {subject} likes {hobby}.",
            "Do you have an idea for a gift for my {relation} {name}? {Subject} enjoys {hobby}.",
        ),
        relation=person.relation,
        name=person.name,
        hobby=hobby,
        subject=person.subject,
        Subject=words.capitalize(person.subject),
    )
    text = (
        f"As {person.name} loves {hobby}, I would give {person.object} {first} "
        f"or {second}. Both are <very> <nice> presents."
    )
    return request, voice.tell(text)


def recommend_outing(rng: Random, voice: Voice) -> tuple[str, str]:
    weather, day, city = rng.choice(tuple(OUTINGS)), rng.choice(words.DAYS), rng.choice(words.CITIES)
    first, second = OUTINGS[weather]
    request = choose(
        rng,
        (
            "What can we do on {weather} {day} in {city}?",
            "Do you have a tip for {weather} {day} in {city}?",
            "We are in {city} on {weather} {day}. Any ideas?",
        ),
        weather=weather,
        day=day,
        city=city,
    )
    return request, voice.tell(f"On {weather} {day} in {city} you could {first}. Or you could {second}.")


def recommend_dish(rng: Random, voice: Voice) -> tuple[str, str]:
    dish = rng.choice(tuple(DISHES))
    items, steps = DISHES[dish]
    listed = words.join_words(rng.sample(items, 3))
    request = choose(
        rng,
        ("What can I cook with {items}?", "I have {items} at home. What can I make?", "Give me an idea for {items}."),
        items=listed,
    )
    return request, voice.tell(f"With {listed} you can make {dish}. {steps}")


def explain_recipe(rng: Random, voice: Voice) -> tuple[str, str]:
    dish = rng.choice(tuple(DISHES))
    items, steps = DISHES[dish]
    number = rng.choice(("two", "three", "four", "five", "six"))
    request = choose(
        rng,
        (
            "How do I make {dish} for {number} people?",
            "Tell me how to make {dish} for {number}.",
            "I want to make {dish} for {number} guests.",
        ),
        dish=dish,
        number=number,
    )
    return request, voice.reply(rng, f"For {dish} you need {words.join_words(list(items))}. {steps}")


def explain_tool(rng: Random, voice: Voice) -> tuple[str, str]:
    action = rng.choice(tuple(HOW_TO))
    person = words.draw_person(rng)
    request = choose(
        rng,
        (
            "How do I {action}?",
            "Tell me how to {action}.",
            "My {relation} {name} wants to know how to {action}.",
            "Can you explain how I {action}?",
            "I do not know how to {action}.",
        ),
        action=action,
        relation=person.relation,
        name=person.name,
    )
    return request, voice.reply(rng, HOW_TO[action])


def explain_thing(rng: Random, voice: Voice) -> tuple[str, str]:
    thing = rng.choice(tuple(THINGS))
    person = words.draw_person(rng)
    request = choose(
        rng,
        (
            "What is {thing}?",
            "Explain to my {relation} what {thing} is.",
            "Can you tell me what {thing} is?",
            "{name} wants to know what {thing} is.",
        ),
        thing=thing,
        relation=person.relation,
        name=person.name,
    )
    return request, voice.tell(THINGS[thing])


def give_tips(rng: Random, voice: Voice) -> tuple[str, str]:
    aim = rng.choice(tuple(TIPS))
    request = choose(
        rng,
        (
            "How can I {aim}?",
            "Give me some tips to {aim}.",
            "I want to {aim}. What should I do?",
            "My {relation} would like to {aim}. Do you have advice?",
        ),
        aim=aim,
        relation=words.draw_person(rng).relation,
    )
    return request, voice.reply(rng, TIPS[aim])


def pack_bag(rng: Random, voice: Voice) -> tuple[str, str]:
    trips = {
        "at the beach": "a towel, sun cream, a hat and a good book",
        "in the mountains": "strong shoes, a warm jacket, a map and a bottle of water",
        "in a big city": "comfortable shoes, an umbrella, a camera and a small bag",
        "on a camping site": "a tent, a sleeping bag, a lamp and some matches",
        "at a wedding": "your best clothes, clean shoes, a card and the present",
        "at the lake": "a towel, a swimsuit, some fruit and a blanket",
    }
    trip, number = rng.choice(tuple(trips)), rng.choice(("two", "three", "four", "five"))
    month = rng.choice(words.MONTHS)
    request = choose(
        rng,
        (
            "What should I pack for {number} days {trip} in {month}?",
            "Make a packing list for {number} days {trip} in {month}.",
            "We will be {trip} for {number} days in {month}. What do we need?",
        ),
        number=number,
        trip=trip,
        month=month,
    )
    return request, voice.reply(rng, f"For {number} days {trip} in {month} you should take {trips[trip]}.")


def make_small_talk(rng: Random, voice: Voice) -> tuple[str, str]:
    requests, answer = rng.choice(SMALL_TALK)
    start = rng.choice(("", "", "", "Hey! "))
    request = rng.choice(requests)
    return f"{start}{request}", voice.tell(answer)


TALK: dict[str, Draw] = {
    "gift": recommend_gift,
    "outing": recommend_outing,
    "dish": recommend_dish,
    "recipe": explain_recipe,
    "tool": explain_tool,
    "thing": explain_thing,
    "tips": give_tips,
    "bag": pack_bag,
    "small talk": make_small_talk,
}
