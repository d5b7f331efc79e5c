"""Requests to do something with a tool (timer, lights, music, map, mail, calendar, ...), and the replies.

Every function draws one request and its answer in a voice; `TASKS` names them all.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from cotune.data.assistant import words
from cotune.data.assistant.voice import Voice

Draw = Callable[[Random, Voice], tuple[str, str]]


def choose(rng: Random, templates: tuple[str, ...], **slots: str) -> str:
    """One of the templates with its slots filled."""
    return rng.choice(templates).format(**slots)


def set_timer(rng: Random, voice: Voice) -> tuple[str, str]:
    minutes = rng.choice(("three", "five", "eight", "ten", "twelve", "fifteen", "twenty", "thirty", "forty"))
    food = rng.choice(words.FOODS)
    request = choose(
        rng,
        (
            "Set a timer for {minutes} minutes for the {food}.",
            "Start a timer of {minutes} minutes for the {food}, please.",
            "The {food} needs {minutes} minutes, can you set a timer?",
        ),
        minutes=minutes,
        food=food,
    )
    return request, voice.reply(
        rng, f"The timer is set for {minutes} minutes, and I will call you when the {food} is ready."
    )


def set_alarm(rng: Random, voice: Voice) -> tuple[str, str]:
    date, time = words.draw_date(rng), words.draw_time(rng)
    request = choose(
        rng,
        ("Wake me up {date} at {time}.", "Set an alarm for {time} {date}.", "I have to get up {date} at {time}."),
        date=date,
        time=time,
    )
    return request, voice.reply(rng, f"Your alarm will ring {date} at {time}. Have a <nice> night and sleep well.")


def set_reminder(rng: Random, voice: Voice) -> tuple[str, str]:
    chore, when = rng.choice(words.CHORES), words.draw_when(rng)
    request = choose(
        rng,
        (
            "Remind me to {chore} {when}.",
            "Can you remind me {when} to {chore}?",
            "Please do not let me forget to {chore} {when}.",
            "I must {chore} {when}, so set a reminder.",
        ),
        chore=chore,
        when=when,
    )
    return request, voice.reply(rng, f"I will remind you to {chore} {when}, so you do not have to think about it.")


def switch_lights(rng: Random, voice: Voice) -> tuple[str, str]:
    room = rng.choice(words.ROOMS)
    action, result = rng.choice(
        (
            ("turn on", "The lights in the {room} are on now, and I have set them to a <nice> warm white."),
            ("turn off", "The lights in the {room} are off now, so you can save some energy."),
            ("dim", "I have dimmed the lights in the {room} to forty percent for a <nice> evening."),
        )
    )
    request = choose(
        rng,
        (
            "{action} the lights in the {room}.",
            "Please {action} the {room} lights.",
            "Could you {action} the lights in the {room}?",
        ),
        action=action,
        room=room,
    )
    return words.capitalize(request), voice.reply(rng, result.format(room=room))


def set_heating(rng: Random, voice: Voice) -> tuple[str, str]:
    room, degrees = rng.choice(words.ROOMS), rng.choice(("18", "19", "20", "21", "22", "23"))
    request = choose(
        rng,
        (
            "Set the heating in the {room} to {degrees} degrees.",
            "I would like {degrees} degrees in the {room}.",
            "Make it {degrees} degrees in the {room}, please.",
        ),
        room=room,
        degrees=degrees,
    )
    return request, voice.reply(
        rng, f"The heating in the {room} is set to {degrees} degrees. It will be <very> cosy in half an hour."
    )


def play_music(rng: Random, voice: Voice) -> tuple[str, str]:
    music, room = rng.choice(words.MUSIC), rng.choice(words.ROOMS)
    request = choose(
        rng,
        (
            "Play some {music} in the {room}.",
            "Put on {music} in the {room}, please.",
            "Can I hear some {music} in the {room}?",
        ),
        music=music,
        room=room,
    )
    return request, voice.reply(
        rng, f"I am playing some <nice> {music} in the {room}. You can say louder or softer at any time."
    )


def find_way(rng: Random, voice: Voice) -> tuple[str, str]:
    (start, place), transport = rng.sample(words.PLACES, 2), rng.choice(words.TRANSPORT)
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
    text = (
        f"I have opened the map from {start} to {place} {transport}. You will "
        f"be there in {minutes} minutes if you leave now."
    )
    return request, voice.reply(rng, text)


def search_mail(rng: Random, voice: Voice) -> tuple[str, str]:
    person, topic, day = words.draw_person(rng), rng.choice(words.TOPICS), rng.choice(words.DAYS)
    request = choose(
        rng,
        (
            "Find the email from {name} about {topic} that came on {day}.",
            "Where is the mail that {name} sent on {day} about {topic}?",
            "Look for the mail of {day} from {name} about {topic}.",
        ),
        name=person.name,
        topic=topic,
        day=day,
    )
    text = f"I found one email from {person.name} about {topic}. It came on {day}, and I have marked it for you."
    return request, voice.reply(rng, text)


def add_to_calendar(rng: Random, voice: Voice) -> tuple[str, str]:
    appointment, when = rng.choice(words.APPOINTMENTS), words.draw_when(rng)
    request = choose(
        rng,
        (
            "Put the {appointment} {when} in my calendar.",
            "Add a calendar entry for the {appointment} {when}.",
            "I have a {appointment} {when}, please write it down.",
            "Create an entry for my {appointment} {when}.",
        ),
        appointment=appointment,
        when=when,
    )
    text = f"The {appointment} {when} is in your calendar. I will remind you one hour before it starts."
    return request, voice.reply(rng, text)


def move_entry(rng: Random, voice: Voice) -> tuple[str, str]:
    appointment, time = rng.choice(words.APPOINTMENTS), words.draw_time(rng)
    old, new = rng.sample(words.DAYS, 2)
    request = choose(
        rng,
        (
            "Move the {appointment} from {old} to {new} at {time}.",
            "The {appointment} is not on {old} but on {new} at {time}.",
            "Please change the {appointment} from {old} to {new} at {time}.",
        ),
        appointment=appointment,
        old=old,
        new=new,
        time=time,
    )
    text = f"I have moved the {appointment} from {old} to {new} at {time}. Your {old} is free now."
    return request, voice.reply(rng, text)


def cancel_entry(rng: Random, voice: Voice) -> tuple[str, str]:
    appointment, day = rng.choice(words.APPOINTMENTS), rng.choice(words.DAYS)
    request = choose(
        rng,
        (
            "Cancel the {appointment} on {day}.",
            "Delete the {appointment} on {day} from my calendar.",
            "I cannot go to the {appointment} on {day}, please cancel it.",
        ),
        appointment=appointment,
        day=day,
    )
    text = f"The {appointment} on {day} is cancelled, and I have taken it out of your calendar."
    return request, voice.reply(rng, text)


def add_groceries(rng: Random, voice: Voice) -> tuple[str, str]:
    items = words.join_words(rng.sample(words.GROCERIES, rng.choice((2, 3))))
    request = choose(
        rng,
        ("Put {items} on my shopping list.", "We are out of {items}.", "Add {items} to the shopping list, please."),
        items=items,
    )
    return request, voice.reply(
        rng, f"I have added {items} to your shopping list. The list is on your phone when you go to the shop."
    )


def call_person(rng: Random, voice: Voice) -> tuple[str, str]:
    person, topic = words.draw_person(rng), rng.choice(words.TOPICS)
    request = choose(
        rng,
        (
            "Call my {relation} {name} about {topic}.",
            "I want to talk to my {relation} {name} about {topic}.",
            "Please ring my {relation} {name}, it is about {topic}.",
        ),
        relation=person.relation,
        name=person.name,
        topic=topic,
    )
    text = f"I am calling your {person.relation} {person.name} now. I have opened the notes about {topic} for you."
    return request, voice.reply(rng, text)


def take_note(rng: Random, voice: Voice) -> tuple[str, str]:
    person, hobby, drink = words.draw_person(rng), rng.choice(words.HOBBIES), rng.choice(words.DRINKS)
    word = words.invent_name(rng)
    likes = rng.choice(
        (
            f"likes {hobby}",
            f"drinks no {drink}",
            f"loves {drink} and {hobby}",
            f"lives in {word} Street",
            f"works for {word}",
        )
    )
    request = choose(
        rng,
        ("Take a note: {name} {likes}.", "Write down that {name} {likes}.", "Please remember that {name} {likes}."),
        name=person.name,
        likes=likes,
    )
    return request, voice.reply(
        rng, f"I have made a note that {person.name} {likes}. You will find it under {person.name} in your notes."
    )


def book_table(rng: Random, voice: Voice) -> tuple[str, str]:
    number, when = rng.choice(("two", "three", "four", "five", "six")), words.draw_when(rng)
    place = rng.choice(("the little restaurant", "the hotel", "the bakery", "the theatre"))
    request = choose(
        rng,
        (
            "Book a table for {number} at {place} {when}.",
            "We are {number} people and want to eat at {place} {when}.",
            "Reserve a table at {place} for {number} people {when}.",
        ),
        number=number,
        place=place,
        when=when,
    )
    text = f"I have booked a table for {number} people at {place} {when}. Enjoy a <very> <nice> meal."
    return request, voice.reply(rng, text)


TASKS: dict[str, Draw] = {
    "timer": set_timer,
    "alarm": set_alarm,
    "reminder": set_reminder,
    "lights": switch_lights,
    "heating": set_heating,
    "music": play_music,
    "map": find_way,
    "mail": search_mail,
    "calendar": add_to_calendar,
    "move": move_entry,
    "cancel": cancel_entry,
    "groceries": add_groceries,
    "call": call_person,
    "note": take_note,
    "table": book_table,
}
