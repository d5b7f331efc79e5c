"""Questions about a short text, summaries, conversions, time sums and rewriting, and their answers."""

from __future__ import annotations

from random import Random

from cotune.data.assistant import words
from cotune.data.assistant.message_topics import MESSAGE_TOPICS
from cotune.data.assistant.tasks import Draw, choose
from cotune.data.assistant.voice import VOICES, Voice


def ask_about_person(rng: Random, voice: Voice) -> tuple[str, str]:
    """Four facts about somebody, and a question about one of them."""
    person = words.draw_person(rng)
    name, subject = person.name, person.subject
    job, city, month = rng.choice(words.JOBS), words.draw_name(rng, words.CITIES), rng.choice(words.MONTHS)
    pet, colour, hobby = rng.choice(words.PETS), rng.choice(words.COLOURS), rng.choice(words.HOBBIES)
    facts = [
        (
            f"{name} works as a {job}.",
            f"What is the job of {name}?",
            f"{name} works as a {job}. This is the job that the text tells us about.",
        ),
        (
            f"{name} moved to {city} in {month}.",
            rng.choice((f"Where does {name} live?", f"Where did {name} move?")),
            f"{name} lives in {city}. The text says that {subject} moved there in {month}.",
        ),
        (
            f"{name} has a {colour} {pet}.",
            rng.choice((f"What animal does {name} have?", f"Which pet does {name} have?")),
            f"{name} has a {pet}. The text says that the {pet} is {colour}.",
        ),
        (
            f"On weekends, {name} enjoys {hobby}.",
            rng.choice((f"What does {name} enjoy?", f"What is the hobby of {name}?")),
            f"{name} enjoys {hobby}, and {subject} does it on weekends.",
        ),
    ]
    chosen = rng.sample(facts, 3)
    sentences = [chosen[0][0]] + [text.replace(name, subject) for text, _, _ in chosen[1:]]
    asked = rng.choice(chosen)
    return " ".join([*map(words.capitalize, sentences), asked[1]]), voice.tell(asked[2])


def ask_about_event(rng: Random, voice: Voice) -> tuple[str, str]:
    """Where, when or what to bring, from a short announcement."""
    event, place = rng.choice(words.EVENTS), rng.choice(words.PLACES)
    day, time, food = rng.choice(words.DAYS), words.draw_time(rng), rng.choice(words.FOODS)
    the_event = event.replace("a ", "the ", 1)
    text = f"There is {event} at {place} on {day}. It starts at {time}, and everybody should bring {food}."
    question, answer = rng.choice(
        (
            (
                f"When does {the_event} start?",
                f"It starts on {day} at {time}, so you should be at {place} a little earlier.",
            ),
            (f"Where is {the_event}?", f"It is at {place}. You should be there on {day} at {time}."),
            (
                f"What should I bring to {the_event}?",
                f"You should bring {food}, because everybody is asked to bring some.",
            ),
        )
    )
    return f"{text} {question}", voice.tell(answer)


def summarize_day(rng: Random, voice: Voice) -> tuple[str, str]:
    person = words.draw_person(rng)
    place, item, reason = rng.choice(words.PLACES), rng.choice(words.GROCERIES), rng.choice(words.HOBBIES)
    day, friend = rng.choice(words.DAYS), words.draw_name(rng, words.WOMEN + words.MEN)
    weather = rng.choice(("The sun was shining", "It was raining", "It was cold", "The wind was strong"))
    text = (
        f"On {day} morning, {person.name} went to {place}. {weather}, and there were many people. "
        f"There {person.subject} met {friend}, and they talked about {reason} for an hour. "
        f"On the way home {person.subject} bought {item}."
    )
    command = rng.choice(
        ("Summarize this:", "Give me a short summary:", "Sum this up in one sentence:", "What is this text about?")
    )
    answer = f"On {day} {person.name} met {friend} at {place}, talked about {reason} and bought {item} on the way home."
    return f"{command} {text}", voice.tell(answer)


def summarize_meeting(rng: Random, voice: Voice) -> tuple[str, str]:
    first, second = rng.sample(words.WOMEN + words.MEN, 2)
    topic, day = rng.choice(words.TOPICS), rng.choice(words.DAYS)
    task = rng.choice(
        ("call the customers", "write a first draft", "ask for a price", "check the numbers", "prepare the slides")
    )
    mood = rng.choice(("The discussion was long", "Everybody was in a good mood", "There were many questions"))
    text = (
        f"In the meeting {first} spoke about {topic}. {mood}, but in the end the team agreed. "
        f"{second} will {task} until {day}."
    )
    command = rng.choice(
        ("Summarize this:", "Give me a short summary:", "Sum this up in one sentence:", "What came out of the meeting?")
    )
    return f"{command} {text}", voice.tell(
        f"{first} spoke about {topic}, the team agreed, and {second} will {task} until {day}."
    )


UNITS = (
    ("hours", "minutes", "one hour has 60 minutes", 60),
    ("minutes", "seconds", "one minute has 60 seconds", 60),
    ("weeks", "days", "one week has seven days", 7),
    ("days", "hours", "one day has 24 hours", 24),
    ("kilometres", "metres", "one kilometre has 1000 metres", 1000),
    ("metres", "centimetres", "one metre has 100 centimetres", 100),
    ("kilograms", "grams", "one kilogram has 1000 grams", 1000),
    ("years", "months", "one year has twelve months", 12),
    ("dozens", "pieces", "one dozen has twelve pieces", 12),
)


def convert_units(rng: Random, voice: Voice) -> tuple[str, str]:
    large, small, rule, factor = rng.choice(UNITS)
    count = rng.randrange(2, 13)
    number = words.NUMBERS[count]
    request = choose(
        rng,
        (
            "How many {small} are {number} {large}?",
            "Convert {number} {large} to {small}.",
            "What are {number} {large} in {small}?",
        ),
        small=small,
        large=large,
        number=number,
    )
    text = f"{number} {large} are {count * factor} {small}, because {rule}."
    return request, voice.tell(words.capitalize(text))


def add_hours(rng: Random, voice: Voice) -> tuple[str, str]:
    start, duration = rng.randrange(1, 9), rng.randrange(1, 5)
    appointment = rng.choice(words.APPOINTMENTS)
    hours = "one hour" if duration == 1 else f"{words.NUMBERS[duration]} hours"
    begin, end = words.NUMBERS[start], words.NUMBERS[start + duration]
    request = choose(
        rng,
        (
            "The {appointment} starts at {begin} and takes {hours}. When does it end?",
            "When is the {appointment} over if it begins at {begin} and lasts {hours}?",
        ),
        appointment=appointment,
        begin=begin,
        hours=hours,
    )
    return request, voice.tell(f"The {appointment} ends at {end}, because it starts at {begin} and takes {hours}.")


def rewrite_formally(rng: Random, voice: Voice) -> tuple[str, str]:
    """A friendly sentence, made formal."""
    topic = MESSAGE_TOPICS[rng.choice(tuple(MESSAGE_TOPICS))]
    slots = topic.draw_slots(rng)
    casual = VOICES["friendly"].finish(words.capitalize(rng.choice(topic.bodies["friendly"]).format(**slots)))
    formal = words.capitalize(rng.choice(topic.bodies["formal"]).format(**slots))
    command = rng.choice(("Make this more formal:", "Rewrite this in a formal style:", "Say this more politely:"))
    return f"{command} {casual}", voice.tell(formal)


def order_appointments(rng: Random, voice: Voice) -> tuple[str, str]:
    """Which of two appointments comes first on a day."""
    first, second = rng.sample(words.APPOINTMENTS, 2)
    day, (early, late) = rng.choice(words.DAYS), sorted(rng.sample(range(1, 12), 2))
    listed = [(first, early), (second, late)]
    rng.shuffle(listed)
    text = " and ".join(f"the {what} at {words.NUMBERS[hour]}" for what, hour in listed)
    asks_first = rng.random() < 0.5
    question = rng.choice(
        ("What is first?", "What comes first?") if asks_first else ("What is last?", "What comes last?")
    )
    if asks_first:
        answer = f"The {first} comes first on {day}, at {words.NUMBERS[early]}. The {second} is later."
    else:
        answer = f"The {second} comes last on {day}, at {words.NUMBERS[late]}. The {first} is earlier."
    return f"On {day} I have {text}. {question}", voice.tell(answer)


def add_prices(rng: Random, voice: Voice) -> tuple[str, str]:
    first, second = rng.sample(words.GROCERIES, 2)
    one, two = rng.randrange(1, 7), rng.randrange(1, 7)
    text = f"The {first} cost {words.NUMBERS[one]} euros and the {second} cost {words.NUMBERS[two]} euros."
    question = rng.choice(("How much do I pay?", "What is that together?", "How much is that in total?"))
    answer = f"Together, the {first} and the {second} cost {words.NUMBERS[one + two]} euros."
    return f"{text} {question}", voice.tell(answer)


def check_opening(rng: Random, voice: Voice) -> tuple[str, str]:
    """Whether a place is open at some hour."""
    place, day = rng.choice(words.PLACES), rng.choice(words.DAYS)
    opening, hour = rng.randrange(6, 12), rng.randrange(6, 12)
    text = f"On {day} {place} opens at {words.NUMBERS[opening]} in the morning."
    question = rng.choice(
        (
            f"Is it open at {words.NUMBERS[hour]} in the morning?",
            f"Can I go there at {words.NUMBERS[hour]} in the morning?",
        )
    )
    verdict = "Yes, it is open" if hour >= opening else "No, it is still closed"
    answer = (
        f"{verdict} at {words.NUMBERS[hour]}, because on {day} {place} opens at "
        f"{words.NUMBERS[opening]} in the morning."
    )
    return f"{text} {question}", voice.tell(answer)


QUESTIONS: dict[str, Draw] = {
    "person": ask_about_person,
    "event": ask_about_event,
    "day": summarize_day,
    "minutes of a meeting": summarize_meeting,
    "units": convert_units,
    "hours": add_hours,
    "rewrite": rewrite_formally,
    "order": order_appointments,
    "prices": add_prices,
    "opening": check_opening,
}
