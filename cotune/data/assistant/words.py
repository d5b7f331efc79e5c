"""The words of the small world that the generated texts speak about: people, places, times, things.

Everything here is public vocabulary. A persona's private words must not occur in it; a test checks this.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

WOMEN = (
    *("Anna", "Clara", "Emma", "Grace", "Hannah", "Ida", "Julia", "Kate", "Laura", "Maria"),
    *("Nina", "Olivia", "Paula", "Rosa", "Sarah", "Tina", "Vera", "Alice", "Bella", "Carmen"),
    *("Diana", "Eva", "Fiona", "Helen", "Irene", "Lucy", "Mona", "Nora", "Ruth", "Sofia"),
)
MEN = (
    *("Adam", "Ben", "Carl", "David", "Eric", "Frank", "George", "Henry", "Ivan", "Jack"),
    *("Karl", "Leo", "Mark", "Noah", "Oscar", "Paul", "Robert", "Sam", "Tom", "Victor"),
    *("Walter", "Alex", "Bruno", "Daniel", "Felix", "Hugo", "Jacob", "Lucas", "Max", "Peter"),
)
ONSETS = (
    *("b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z"),
    *("br", "ch", "cl", "dr", "fl", "gr", "pl", "sh", "sl", "st", "th", "tr"),
)
VOWELS = ("a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "oo", "ou")
CODAS = ("", "", "n", "r", "s", "t", "l", "m", "nd", "rt", "ck", "ng", "st")
SHARE_OF_INVENTED_NAMES = 0.15
FEMALE_RELATIONS = ("sister", "mother", "aunt", "grandmother", "daughter", "niece")
MALE_RELATIONS = ("brother", "father", "uncle", "grandfather", "son", "nephew")
OTHER_RELATIONS = ("friend", "neighbour", "colleague", "boss", "teacher", "cousin", "doctor", "coach")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = ("January", "March", "April", "May", "June", "July", "August", "October", "November")
HOURS = ("seven", "eight", "nine", "ten", "eleven", "noon", "two", "three", "four", "five", "six")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")

PLACES = (
    *("the library", "the park", "the museum", "the old harbour", "the town hall", "the market square"),
    *("the station", "the swimming pool", "the bakery", "the music school", "the beach", "the theatre"),
    *("the sports club", "the garden", "the city cinema", "the lake", "the bookshop", "the hotel"),
    *("the community centre", "the little restaurant", "the botanical garden", "the school"),
)
CITIES = (
    "Paris",
    "London",
    "Rome",
    "Vienna",
    "Madrid",
    "Berlin",
    "Oslo",
    "Lisbon",
    "Dublin",
    "Prague",
    "Boston",
    "Milan",
)
ROOMS = ("kitchen", "bedroom", "living room", "bathroom", "hall", "office", "garage", "dining room")
EVENTS = (
    *("a dinner", "a picnic", "a birthday party", "a concert", "a film night", "a garden party"),
    *("a game evening", "a long walk", "a brunch", "a barbecue", "a book club", "a farewell party"),
    *("a wine tasting", "a cooking evening", "a school reunion", "a small exhibition"),
)
APPOINTMENTS = (
    *("dentist appointment", "team meeting", "piano lesson", "doctor's visit", "job interview"),
    *("parents' evening", "yoga class", "haircut", "phone call with the bank", "lunch with the team"),
    *("driving lesson", "choir practice", "football training", "project review", "flight to the coast"),
)
FOODS = ("bread", "cheese", "salad", "soup", "pasta", "rice", "pizza", "fish", "cake", "pancakes", "potatoes", "eggs")
DRINKS = ("tea", "coffee", "lemonade", "apple juice", "water", "hot chocolate", "wine", "milk")
GROCERIES = (
    *("milk", "butter", "apples", "bread", "eggs", "cheese", "tomatoes", "onions", "rice", "coffee"),
    *("flour", "sugar", "carrots", "bananas", "lemons", "honey", "olive oil", "yoghurt", "salt", "pasta"),
)
CHORES = (
    *("call the dentist", "water the plants", "pay the rent", "buy stamps", "take out the rubbish"),
    *("return the library books", "feed the cat", "send the invoice", "book the tickets"),
    *("clean the windows", "renew my passport", "charge the camera", "pick up the parcel"),
    *("order new glasses", "wash the car", "print the contract", "check the oven", "iron the shirts"),
)
FAVOURS = (
    *("helping me move", "watering my plants", "fixing my bike", "driving me to the airport"),
    *("looking after the children", "lending me the ladder", "the beautiful flowers", "the delicious cake"),
    *("the birthday present", "proofreading my letter", "the good advice", "painting the fence with me"),
    *("carrying the sofa upstairs", "the concert tickets", "the warm welcome", "teaching me how to swim"),
)
REQUESTED_FAVOURS = (
    *("pick up the children", "feed the cat", "water the plants", "bring the big ladder"),
    *("send the address", "check the last page", "buy the tickets", "open the door for the plumber"),
    *("book a table", "print the tickets", "bring a cake", "call the landlord", "lend me the drill"),
)
REASONS = (
    *("the train was late", "my bike had a flat tyre", "I missed the bus", "the meeting took too long"),
    *("I had a bad cold", "the road was closed", "my phone was broken", "I mixed up the days"),
    *("the children were ill", "I had to work late", "I lost my keys", "there was heavy snow"),
)
MISSED = (
    "your party",
    "our lunch",
    "the meeting",
    "your concert",
    "our call",
    "the dinner",
    "your birthday",
    "the class",
)
OCCASIONS = (
    *("the new job", "the wedding", "the new baby", "the driving licence", "the good exam results"),
    *("the first prize", "the new flat", "the promotion", "the golden anniversary", "the first marathon"),
)
ILLNESSES = ("a cold", "a broken arm", "a bad back", "the flu", "a sore throat", "a twisted ankle")
TOPICS = (
    *("the budget", "the spring report", "the new website", "the training plan", "the office move"),
    *("the customer survey", "the summer party", "the safety rules", "the project plan", "the price list"),
    *("the holiday schedule", "the delivery dates", "the new contract", "the team photo"),
)
MUSIC = ("jazz", "piano music", "rock", "classical music", "folk songs", "dance music", "film music", "quiet music")
TRANSPORT = ("by bike", "on foot", "by bus", "by car", "by train")
JOBS = (
    *("nurse", "baker", "teacher", "gardener", "pilot", "painter", "lawyer", "cook", "farmer"),
    *("journalist", "builder", "librarian", "carpenter", "musician", "dentist", "photographer"),
)
PETS = ("dog", "cat", "rabbit", "parrot", "horse", "hamster")
HOBBIES = (
    *("reading", "gardening", "cooking", "running", "painting", "photography", "chess", "fishing"),
    *("cycling", "singing", "knitting", "hiking", "travelling", "baking"),
)
GIFTS = (
    *("a book", "a box of chocolates", "a bunch of flowers", "a warm scarf", "a new lamp", "a bottle of wine"),
    *("a concert ticket", "a handmade cup", "a photo album", "a puzzle", "a silver ring", "a basket of fruit"),
)
WEATHER = ("warm and sunny", "cold but dry", "wet and windy", "mild", "very hot", "changing every hour")
FAULTS = (
    *("the heating did not work", "the parcel arrived open", "the music next door was too loud"),
    *("the lift was broken", "the room was not clean", "the bill was wrong", "nobody answered the phone"),
    *("the bus did not come", "the soup was cold", "the order was not complete", "the washing machine was leaking"),
)
ITEMS = ("umbrella", "jacket", "scarf", "bag", "hat", "notebook", "camera", "wallet", "key ring", "sweater")
COLOURS = ("white", "black", "grey", "brown", "golden", "spotted")


@dataclass(frozen=True, kw_only=True)
class Person:
    """Somebody in the world, with the words that refer to them."""

    name: str
    relation: str
    subject: str
    object: str
    possessive: str


def invent_name(rng: Random) -> str:
    """A name that nobody has, such as 'Tromalo', so that a model learns to copy any word letter by letter.

    Invented names never contain q, x or y.
    """
    syllables = [rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(rng.choice((1, 2, 2, 3)))]
    return capitalize("".join(syllables) + rng.choice(CODAS))


def draw_name(rng: Random, names: tuple[str, ...]) -> str:
    """One of the names, or sometimes an invented one."""
    return invent_name(rng) if rng.random() < SHARE_OF_INVENTED_NAMES else rng.choice(names)


def draw_person(rng: Random) -> Person:
    """A person with a fitting relation and pronouns."""
    if rng.random() < 0.5:
        relation = rng.choice(FEMALE_RELATIONS + OTHER_RELATIONS)
        return Person(name=draw_name(rng, WOMEN), relation=relation, subject="she", object="her", possessive="her")
    relation = rng.choice(MALE_RELATIONS + OTHER_RELATIONS)
    return Person(name=draw_name(rng, MEN), relation=relation, subject="he", object="him", possessive="his")


def draw_time(rng: Random) -> str:
    """A clock time as people say it, without the word 'at'."""
    hour = rng.choice(HOURS)
    if hour == "noon":
        return hour
    return rng.choice(("{0}", "{0}", "half past {0}", "a quarter past {0}", "a quarter to {0}", "{0} o'clock")).format(
        hour
    )


def draw_date(rng: Random) -> str:
    """A day phrase: 'on Friday', 'next Monday', 'tomorrow'."""
    day = rng.choice(DAYS)
    return rng.choice((f"on {day}", f"on {day}", f"next {day}", f"this {day}", "tomorrow"))


def draw_when(rng: Random) -> str:
    """A day and a time: 'on Friday at noon'."""
    return f"{draw_date(rng)} at {draw_time(rng)}"


def join_words(words: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def capitalize(text: str) -> str:
    """The text with its first letter upper-case and the rest untouched."""
    return text[:1].upper() + text[1:]


def fix_articles(text: str) -> str:
    """'a email' as 'an email', for the few words that need it."""
    return text.replace(" a email", " an email")
