"""What messages are about: the wishes in a request, and the message itself by register."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from cotune.data.assistant import words

Bodies = dict[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class MessageTopic:
    """One reason to write.

    Attributes:
        wishes: what the user wants, after 'write a message to Anna', with slots.
        bodies: the message by register, with the same slots.
        draw_slots: values for the slots beside those of the person.
    """

    wishes: tuple[str, ...]
    bodies: Bodies
    draw_slots: Callable[[Random], dict[str, str]]


def draw_invitation(rng: Random) -> dict[str, str]:
    return {"event": rng.choice(words.EVENTS), "place": rng.choice(words.PLACES), "when": words.draw_when(rng)}


def draw_favour(rng: Random) -> dict[str, str]:
    return {"favour": rng.choice(words.FAVOURS)}


def draw_apology(rng: Random) -> dict[str, str]:
    return {"missed": rng.choice(words.MISSED), "reason": rng.choice(words.REASONS)}


def draw_congratulation(rng: Random) -> dict[str, str]:
    return {"occasion": rng.choice(words.OCCASIONS)}


def draw_delay(rng: Random) -> dict[str, str]:
    delay = rng.choice(("ten", "fifteen", "twenty", "thirty", "forty"))
    return {"delay": delay, "reason": rng.choice(words.REASONS), "place": rng.choice(words.PLACES)}


def draw_plea(rng: Random) -> dict[str, str]:
    return {"plea": rng.choice(words.REQUESTED_FAVOURS), "date": words.draw_date(rng)}


def draw_illness(rng: Random) -> dict[str, str]:
    return {"illness": rng.choice(words.ILLNESSES), "food": rng.choice(words.FOODS)}


def draw_meeting(rng: Random) -> dict[str, str]:
    return {"topic": rng.choice(words.TOPICS), "when": words.draw_when(rng), "room": rng.choice(words.ROOMS)}


def draw_move(rng: Random) -> dict[str, str]:
    thing = rng.choice(("lunch", "call", "meeting", "walk", "dinner", "coffee"))
    old, new = rng.sample(words.DAYS, 2)
    return {"thing": thing, "old": old, "new": new, "time": words.draw_time(rng)}


def draw_news(rng: Random) -> dict[str, str]:
    return {"city": rng.choice(words.CITIES), "month": rng.choice(words.MONTHS)}


def draw_birthday(rng: Random) -> dict[str, str]:
    gift = rng.choice(words.GIFTS)
    return {"gift": gift, "the_gift": gift.replace("a ", "the ", 1)}


def draw_holiday(rng: Random) -> dict[str, str]:
    return {
        "city": rng.choice(words.CITIES),
        "weather": rng.choice(words.WEATHER),
        "place": rng.choice(words.PLACES),
    }


def draw_complaint(rng: Random) -> dict[str, str]:
    return {
        "fault": rng.choice(words.FAULTS),
        "date": rng.choice((f"on {rng.choice(words.DAYS)}", "yesterday", "last week")),
    }


def draw_lost_item(rng: Random) -> dict[str, str]:
    return {"item": rng.choice(words.ITEMS), "colour": rng.choice(words.COLOURS), "place": rng.choice(words.PLACES)}


def draw_shared_hobby(rng: Random) -> dict[str, str]:
    return {"hobby": rng.choice(words.HOBBIES), "when": words.draw_when(rng)}


MESSAGE_TOPICS: dict[str, MessageTopic] = {
    "invitation": MessageTopic(
        wishes=(
            "inviting {object} to {event} at {place} {when}",
            "to invite {object} to {event} {when} at {place}",
            "asking if {subject} would come to {event} at {place} {when}",
        ),
        bodies={
            "formal": (
                "I would be pleased if you could join us for {event} at {place} {when}. "
                "Please let me know whether you are able to attend.",
                "It is my pleasure to invite you to {event} at {place} {when}. I hope that you are able to attend.",
            ),
            "friendly": (
                "would you like to come to {event} at {place} {when}? It would be <very> <nice> to see you there.",
                "we are having {event} at {place} {when}, and I would love to see you there. Please bring a friend "
                "if you like.",
            ),
            "brief": (
                "there is {event} at {place} {when}. Can you come?",
                "{event} at {place} {when}. Will you join us?",
            ),
            "cheerful": (
                "there will be {event} at {place} {when}. It will be so much fun, and you simply have to come!",
                "guess what, we are having {event} at {place} {when}! Put on your dancing shoes and join us!",
            ),
        },
        draw_slots=draw_invitation,
    ),
    "thanks": MessageTopic(
        wishes=("to thank {object} for {favour}", "saying thank you for {favour}", "thanking {object} for {favour}"),
        bodies={
            "formal": (
                "I would like to thank you for {favour}. It was most generous of you, and I appreciate it greatly.",
                "please accept my sincere thanks for {favour}. Your kindness means a great deal to me.",
            ),
            "friendly": (
                "thank you so much for {favour}. That was <very> kind of you, and it made my day.",
                "many thanks for {favour}. It was <very> <nice> of you, and I owe you a coffee.",
            ),
            "brief": (
                "thank you for {favour}. It was a great help.",
                "many thanks for {favour}. I will return it soon.",
            ),
            "cheerful": ("thank you, thank you, thank you for {favour}! You are the best, and I am still smiling.",),
        },
        draw_slots=draw_favour,
    ),
    "apology": MessageTopic(
        wishes=(
            "saying sorry that I missed {missed} because {reason}",
            "to apologise for missing {missed}, as {reason}",
            "explaining that I missed {missed} because {reason}",
        ),
        bodies={
            "formal": (
                "please accept my apologies for missing {missed}. Unfortunately, {reason}. "
                "I will make sure that it does not happen again.",
            ),
            "friendly": (
                "I am <very> sorry that I missed {missed}. Sadly, {reason}. Can I make it up to you with a <nice> "
                "dinner?",
                "I really wanted to come, but I missed {missed} because {reason}. I am <very> sorry. How was it?",
            ),
            "brief": ("sorry that I missed {missed}, but {reason}. Can we find another day?",),
            "cheerful": ("what a day! I missed {missed} because {reason}. Next time I will be there, I promise!",),
        },
        draw_slots=draw_apology,
    ),
    "congratulation": MessageTopic(
        wishes=("to congratulate {object} on {occasion}", "congratulating {object} on {occasion}"),
        bodies={
            "formal": (
                "please accept my warmest congratulations on {occasion}. I wish you every success in the future.",
                "I was delighted to hear about {occasion}. Congratulations, and all the best for the years to come.",
            ),
            "friendly": (
                "congratulations on {occasion}! I am <very> happy for you, and we should have a <nice> evening to "
                "celebrate.",
                "I just heard about {occasion}. Congratulations, you really deserve it! Let us meet and drink to it "
                "soon.",
            ),
            "brief": ("congratulations on {occasion}! Well done, you have earned it.",),
            "cheerful": ("hooray, congratulations on {occasion}! Let us dance, eat cake and celebrate all night!",),
        },
        draw_slots=draw_congratulation,
    ),
    "delay": MessageTopic(
        wishes=(
            "saying that I will be {delay} minutes late at {place} because {reason}",
            "that I will arrive at {place} {delay} minutes late because {reason}",
        ),
        bodies={
            "formal": (
                "I regret to inform you that I will arrive at {place} {delay} minutes late, because {reason}. "
                "I apologise for the delay.",
            ),
            "friendly": (
                "I am <very> sorry, but I will be at {place} {delay} minutes late, because {reason}. "
                "Please start without me.",
            ),
            "brief": ("I will be {delay} minutes late at {place}, because {reason}. Sorry!",),
            "cheerful": (
                "I am on my way to {place}! I will only be {delay} minutes late, because {reason}. Keep a chair for "
                "me!",
            ),
        },
        draw_slots=draw_delay,
    ),
    "plea": MessageTopic(
        wishes=(
            "asking {object} to {plea} {date}",
            "to ask if {subject} could {plea} {date}",
            "asking whether {subject} can {plea} {date}",
        ),
        bodies={
            "formal": ("I would be grateful if you could {plea} {date}. Thank you in advance for your help.",),
            "friendly": (
                "could you please {plea} {date}? That would be <very> <nice> of you, and it would help me a lot.",
                "I have a small favour to ask. Could you {plea} {date}? I would be <very> grateful, and I will pay "
                "you back.",
            ),
            "brief": ("can you {plea} {date}? It would help me a lot.",),
            "cheerful": ("you are my hero! Could you {plea} {date}? I will bake you a cake in return!",),
        },
        draw_slots=draw_plea,
    ),
    "illness": MessageTopic(
        wishes=(
            "wishing {object} well, {subject} has {illness}",
            "to cheer {object} up because {subject} has {illness}",
        ),
        bodies={
            "formal": ("I was sorry to hear that you have {illness}. I wish you a quick and full recovery.",),
            "friendly": (
                "I heard that you have {illness}. Get well soon! I can come by with some {food} and a <nice> book.",
            ),
            "brief": ("I heard that you have {illness}. Get well soon, and have a good rest.",),
            "cheerful": (
                "do not let {illness} get you down! Soon you will be well again, and then we will have {food} "
                "together!",
            ),
        },
        draw_slots=draw_illness,
    ),
    "meeting": MessageTopic(
        wishes=(
            "about a meeting on {topic} {when}",
            "to set up a meeting about {topic} {when}",
            "asking for a meeting {when} about {topic}",
        ),
        bodies={
            "formal": (
                "I would like to arrange a meeting about {topic} {when}. Please confirm whether this time suits you.",
            ),
            "friendly": (
                "could we meet {when} to talk about {topic}? It should not take <very> long, and I will bring the "
                "notes.",
                "do you have time {when}? I would like to talk with you about {topic}, and I think it needs only "
                "half an hour.",
            ),
            "brief": ("can we meet {when} about {topic}? It will take half an hour.",),
            "cheerful": ("it is time for {topic}! Shall we meet {when}? I will bring coffee and cake for all of us!",),
        },
        draw_slots=draw_meeting,
    ),
    "move": MessageTopic(
        wishes=(
            "asking to move our {thing} from {old} to {new} at {time}",
            "that I want to move our {thing} from {old} to {new} at {time}",
        ),
        bodies={
            "formal": (
                "unfortunately, I am unable to keep our {thing} on {old}. Would {new} at {time} be convenient for you?",
            ),
            "friendly": (
                "something came up, so can we move our {thing} from {old} to {new} at {time}? That would be <very> "
                "<nice>.",
            ),
            "brief": ("can we move our {thing} from {old} to {new} at {time}?",),
            "cheerful": (
                "small change of plan! Let us move our {thing} from {old} to {new} at {time}. It will be even better!",
            ),
        },
        draw_slots=draw_move,
    ),
    "news": MessageTopic(
        wishes=(
            "telling {object} that I am moving to {city} in {month}",
            "with the news that I will move to {city} in {month}",
        ),
        bodies={
            "formal": (
                "I am writing to let you know that I will be moving to {city} in {month}. "
                "I will send you my new address in good time.",
            ),
            "friendly": (
                "I have news: I am moving to {city} in {month}! It is a <very> <nice> place, and you must visit me "
                "there.",
            ),
            "brief": ("I am moving to {city} in {month}. I will send you the new address.",),
            "cheerful": ("pack your bags, I am moving to {city} in {month}! You must come and see it with me!",),
        },
        draw_slots=draw_news,
    ),
    "birthday": MessageTopic(
        wishes=(
            "wishing {object} a happy birthday and a present of {gift}",
            "for {possessive} birthday, with {gift} as a present",
        ),
        bodies={
            "formal": ("I wish you a very happy birthday and good health. I hope that you will enjoy {the_gift}.",),
            "friendly": (
                "happy birthday! I hope that you have a <very> <nice> day and that you like {the_gift}.",
                "all the best for your birthday! I have sent you {gift}, and I hope that it makes you smile.",
            ),
            "brief": ("happy birthday, and enjoy {the_gift}! We will call you tonight.",),
            "cheerful": (
                "hip hip hooray, it is your birthday! Open {the_gift}, eat a lot of cake, and dance all night!",
            ),
        },
        draw_slots=draw_birthday,
    ),
    "holiday": MessageTopic(
        wishes=(
            "with greetings from {city}, where the weather is {weather}",
            "from our holiday in {city}, the weather is {weather} and we visit {place}",
        ),
        bodies={
            "formal": (
                "I am sending you my best wishes from {city}. The weather is {weather}, and our stay is most pleasant.",
            ),
            "friendly": (
                "many greetings from {city}! The weather is {weather}, and we are having a <very> <nice> time here.",
                "we are in {city}, and the weather is {weather}. Every day we eat well and walk a lot. I wish you "
                "were here!",
            ),
            "brief": ("greetings from {city}. The weather is {weather}, and we are all well.",),
            "cheerful": (
                "hello from wonderful {city}! The weather is {weather}, the food is great, and we laugh all day!",
            ),
        },
        draw_slots=draw_holiday,
    ),
    "complaint": MessageTopic(
        wishes=("complaining that {fault} {date}", "to complain because {fault} {date}"),
        bodies={
            "formal": (
                "I am writing to let you know that {fault} {date}. I would be grateful if you could look into this "
                "matter.",
                "I regret to say that {fault} {date}. Please let me know how you intend to solve this problem.",
            ),
            "friendly": ("I am sorry to bother you, but {fault} {date}. Could you have a look at it, please?",),
            "brief": ("{fault} {date}. Please look into it soon.",),
            "cheerful": ("I have to smile about it, but {fault} {date}! Can we fix it together, please?",),
        },
        draw_slots=draw_complaint,
    ),
    "lost": MessageTopic(
        wishes=(
            "asking if {subject} has seen my {colour} {item}, I think I left it at {place}",
            "to ask about my {colour} {item} that I forgot at {place}",
        ),
        bodies={
            "formal": (
                "I believe that I left my {colour} {item} at {place}. Please let me know if you have found it.",
            ),
            "friendly": (
                "have you seen my {colour} {item}? I think that I left it at {place}. It would be <nice> to have it "
                "back.",
                "I cannot find my {colour} {item}. Maybe I left it at {place}. Could you please have a look for me?",
            ),
            "brief": ("I lost my {colour} {item}, maybe at {place}. Have you seen it?",),
            "cheerful": (
                "the great hunt is on! My {colour} {item} is hiding at {place}. Can you help me to catch it?",
            ),
        },
        draw_slots=draw_lost_item,
    ),
    "hobby": MessageTopic(
        wishes=(
            "asking if {subject} wants to try {hobby} with me {when}",
            "to ask whether {subject} would like to try {hobby} with me {when}",
        ),
        bodies={
            "formal": (
                "I would like to ask whether you are interested in {hobby} with me {when}. I look forward to your "
                "answer.",
            ),
            "friendly": (
                "I know that you like to be busy, so would you like to try {hobby} with me {when}? I think it will "
                "be <very> <nice>.",
                "how about {hobby} with me {when}? We can talk, have some fresh air, and eat something <nice> "
                "afterwards.",
            ),
            "brief": ("do you want to try {hobby} with me {when}? Let me know.",),
            "cheerful": (
                "adventure is calling! Let us try {hobby} together {when}. We will be the champions of the world!",
            ),
        },
        draw_slots=draw_shared_hobby,
    ),
}
