from __future__ import annotations

import hashlib
import random
import subprocess
import sys

from cotune.data.assistant.message_topics import MESSAGE_TOPICS
from cotune.data.assistant.questions import QUESTIONS
from cotune.data.assistant.talk import TALK
from cotune.data.assistant.tasks import TASKS
from cotune.data.assistant.voice import STYLES, VOICES
from cotune.data.assistant_text import generate_exchanges

EXCHANGES = generate_exchanges(8000, seed=0)


def test_the_seed_decides_and_global_randomness_stays_untouched() -> None:
    random.seed(5)
    state = random.getstate()
    assert generate_exchanges(50, seed=0) == EXCHANGES[:50]
    assert random.getstate() == state
    assert generate_exchanges(50, seed=1) != EXCHANGES[:50]


def test_the_text_is_the_one_that_the_built_in_model_was_trained_on() -> None:
    """Whoever changes a word here trains `starter` again and puts the new digest."""
    digest = hashlib.sha256(repr(EXCHANGES[:2000]).encode()).hexdigest()
    assert digest == "9a6642232508ec430ab8ed4ea141c1828d2e03293f70f4908f73f5982a3227df"


def test_thousands_of_different_requests_and_a_real_vocabulary() -> None:
    assert len({each.request for each in EXCHANGES}) > 6500
    words = {word for each in EXCHANGES for word in f"{each.request} {each.answer}".split()}
    assert len(words) > 2000


def test_no_slot_is_left_open() -> None:
    for each in EXCHANGES:
        text = f"{each.request} {each.answer}"
        assert not set("{}<>\n") & set(text), each
        assert "  " not in text, each
        assert text == text.strip(), each


def test_sentences_begin_and_end_as_they_should() -> None:
    for each in EXCHANGES:
        assert each.request[0].isupper() and each.request[-1] in ".?!", each
        assert each.answer[0].isupper() and each.answer[-1] in ".?!", each
        assert " a email" not in each.request, each


def test_answers_are_neither_tiny_nor_long() -> None:
    lengths = sorted(len(each.answer.split()) for each in EXCHANGES)
    assert lengths[0] >= 8
    assert 20 <= lengths[len(lengths) // 2] <= 30
    assert lengths[-1] <= 50


def test_every_topic_has_every_register_and_every_style_a_voice() -> None:
    assert set(STYLES.values()) == set(VOICES)
    for topic in MESSAGE_TOPICS.values():
        assert set(topic.bodies) == set(VOICES)


def test_every_kind_is_drawn_for_many_seeds() -> None:
    for kinds in (TASKS, QUESTIONS, TALK):
        for draw in kinds.values():
            drawn = {draw(random.Random(seed), VOICES["friendly"]) for seed in range(60)}
            assert len({request for request, _ in drawn}) >= 20
            assert len({answer for _, answer in drawn}) >= 6


def test_importing_the_room_does_not_import_torch() -> None:
    code = "import sys, cotune.data; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
