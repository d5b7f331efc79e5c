from __future__ import annotations

from dataclasses import replace
from random import Random

from cotune.data.assistant.voice import VOICES, Voice

VOICE = Voice(
    greetings=("Ahoy {name},",),
    sign_offs=("Bye.",),
    openers=("Aye.",),
    closers=("Shout!",),
    nice="splendid",
    very="awfully",
)


def test_a_letter_has_greeting_body_and_sign_off() -> None:
    letter = VOICE.letter(Random(0), "Anna", "it was <very> <nice> of you.")
    assert letter == "Ahoy Anna, it was awfully splendid of you. Bye."


def test_a_body_after_a_sentence_begins_with_a_capital() -> None:
    loud = replace(VOICE, greetings=("Hello {name}!",))
    assert loud.letter(Random(0), "Anna", "come!") == "Hello Anna! Come! Bye."


def test_a_reply_has_opener_and_closer_and_a_told_answer_has_none() -> None:
    assert VOICE.reply(Random(0), "Done.") == "Aye. Done. Shout!"
    assert replace(VOICE, closers=("",)).reply(Random(0), "Done.") == "Aye. Done."
    assert VOICE.tell("It is <nice>.") == "It is splendid."


def test_lower_case() -> None:
    assert replace(VOICE, lower_case=True).reply(Random(0), "Done.") == "aye. done. shout!"


def test_the_registers_sound_different() -> None:
    letters = {voice.letter(Random(0), "Anna", "come soon.") for voice in VOICES.values()}
    assert len(letters) == 4
