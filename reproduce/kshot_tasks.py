"""The k-shot sets of MeZO's study: texts, labels, the prompt of each task, and one set that cotune makes itself.

A set is k texts of each class to learn from and as many to choose by, drawn anew for each of the seeds 13, 21, 42, 87
and 100 (Gao et al., arXiv 2012.15723), and one test part for all seeds. The model reads the prompt and says which label
word is likelier.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cotune.data.batches import split_tokens
from cotune.data.sampling import draw
from cotune.data.templates import Example
from cotune.errors import InputError
from cotune.tuning.choice_objectives import ChoiceExample

SEEDS = (13, 21, 42, 87, 100)
K = 16
MADE = "made"
_PARTS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """How a text is asked about."""

    template: str
    """`{text}` stands for the text; ends where the label word begins."""
    words: Mapping[str, str]
    """The label word of each label, with the space in front of it."""


_SENTIMENT = Prompt(template="{text} It was", words={"negative": " bad", "positive": " great"})
# As in MeZO's study, but that the label word is the last one, as these models read from left to right, and words are
# such that a small vocabulary has few tokens for them: of a sum over tokens the longer word has less by itself.
PROMPTS: dict[str, Prompt] = {
    "sst2": _SENTIMENT,
    "cr": _SENTIMENT,
    "subj": Prompt(template="{text} This is a", words={"objective": " fact", "subjective": " feeling"}),
    "trec": Prompt(
        template="{text} The answer is a",
        words={
            "abbreviation": " word",
            "description": " reason",
            "entity": " thing",
            "human": " name",
            "location": " place",
            "number": " number",
        },
    ),
    MADE: _SENTIMENT,
}


@dataclass(frozen=True)
class Labelled:
    """A text and the name of its class."""

    text: str
    label: str


@dataclass(frozen=True, kw_only=True)
class KShot:
    """One draw.

    Attributes:
        train, validation: k of each class.
        test: the same for all draws, but for a text that this draw learns from or chooses by.
        is_validation_drawn: its file had training texts, so that other ones were drawn from the test file.
    """

    train: tuple[Labelled, ...]
    validation: tuple[Labelled, ...]
    test: tuple[Labelled, ...]
    is_validation_drawn: bool = False

    @property
    def digest(self) -> str:
        """Of all texts and labels, so that a finished cell is never taken for that of other data."""
        parts = [[(one.text, one.label) for one in getattr(self, part)] for part in _PARTS]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def load_kshot(root: Path | None, task: str, seed: int, num_test: int) -> KShot:
    """One draw of a task.

    Args:
        root: folder of tasks, `TASK/seed13/train.jsonl` and `validation.jsonl`, `TASK/test.jsonl`; lines of `text` and
            `label`. It may also be the folder around it, where that has one named kshot16. Not read for `made`.
        task: a key of `PROMPTS`.
        seed: of the draw.
        num_test: test texts, drawn from the file once for all seeds: files may be sorted by label.

    Where a file of questions to choose by has a training text, it would choose what learns by heart: k of each class
    are drawn instead from what is left of the test file.

    Raises:
        InputError: the files are not there, or hold something else.
    """
    if task == MADE:
        return make_kshot(seed, num_test)
    if root is None:
        raise InputError(f"--data-root is not given and {task} is a folder there; give it, or take --tasks {MADE}")
    # A folder of that name alone may be the whole set, with splits of its own.
    folder = next((one for one in (root / "kshot16" / task, root / task) if (one / f"seed{seed}").is_dir()), None)
    if folder is None:
        raise InputError(
            f"{root} has no folder {task}/seed{seed} or kshot16/{task}/seed{seed}; give the folder of the k-shot sets, "
            f"or take --tasks {MADE}"
        )
    words = PROMPTS[task].words
    train, validation = (_read(folder / f"seed{seed}" / f"{part}.jsonl", words) for part in _PARTS[:2])
    whole = _read(folder / "test.jsonl", words)
    test = draw(whole, limit=num_test, seed=0)
    is_drawn = not _texts(train).isdisjoint(_texts(validation))
    if is_drawn:
        taken = _texts([*train, *test])
        rest = [one for one in whole if one.text not in taken]
        parts = [draw((one for one in rest if one.label == label), limit=K, seed=seed) for label in words]
        validation = tuple(chain.from_iterable(parts))
        if not validation:
            raise InputError(
                f"{folder / f'seed{seed}'} has training texts in validation.jsonl, and {folder / 'test.jsonl'} has no "
                f"text left beside {len(test)} for the test; take fewer test texts, or repair the files"
            )
    seen = _texts([*train, *validation])
    return KShot(
        train=train,
        validation=validation,
        test=tuple(one for one in test if one.text not in seen),
        is_validation_drawn=is_drawn,
    )


def _texts(texts: Iterable[Labelled]) -> set[str]:
    return {one.text for one in texts}


def _read(path: Path, words: Mapping[str, str]) -> tuple[Labelled, ...]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = tuple(Labelled(str(row["text"]), str(row["label"])) for row in rows)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a folder of k-shot sets") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} has a line without text and label ({error}); write one JSON object a line") from error
    strange = next((one.label for one in found if one.label not in words), None)
    if strange is not None or not found:
        what = "no line" if strange is None else f"the label {strange!r}"
        raise InputError(f"{path} has {what}, expected texts with labels {', '.join(words)}")
    return found


_THINGS = ("soup", "hotel", "film", "song", "walk", "book", "garden", "train", "party", "lesson", "coffee", "room")
_OPENINGS = ("The {thing} was", "I found the {thing}", "We all thought the {thing}", "To be honest, the {thing} was")
_NEUTRAL = ("on Monday", "near the station", "with my sister", "after work", "in the old town", "again", "this week")
_MOODS = {
    "positive": (
        *("lovely", "warm and friendly", "a real joy", "better than I had hoped", "full of good ideas"),
        *("beautiful", "fresh and well made", "just what we needed", "kind and patient", "worth every minute"),
    ),
    "negative": (
        *("boring", "cold and rude", "a waste of time", "worse than I had feared", "full of mistakes"),
        *("ugly", "stale and badly made", "not what we needed", "loud and unfair", "not worth the money"),
    ),
}


def make_kshot(seed: int, num_test: int) -> KShot:
    """Short opinions of everyday things, from word lists; no text is in two parts.

    Example:
        >>> made = make_kshot(13, num_test=4)
        >>> len(made.train), [one.label for one in made.test]
        (32, ['positive', 'negative', 'positive', 'negative'])
    """
    test = _opinions(Random(0), num_test, frozenset())
    learnt = _opinions(Random(seed), 2 * len(_MOODS) * K, frozenset(one.text for one in test))
    half = len(_MOODS) * K
    return KShot(train=tuple(learnt[:half]), validation=tuple(learnt[half:]), test=tuple(test))


def _opinions(rng: Random, num: int, others: frozenset[str]) -> list[Labelled]:
    """Of the classes in turn."""
    labels, found = list(_MOODS), dict[str, Labelled]()
    most = len(_OPENINGS) * len(_THINGS) * len(_NEUTRAL) * min(len(moods) for moods in _MOODS.values())
    if num > most:
        raise InputError(f"num_test is {num}, but at most {most} opinions are made; ask for fewer")
    while len(found) < num:
        label = labels[len(found) % len(labels)]
        opening = rng.choice(_OPENINGS).format(thing=rng.choice(_THINGS))
        text = f"{opening} {rng.choice(_MOODS[label])} {rng.choice(_NEUTRAL)}."
        if text not in others:
            found.setdefault(text, Labelled(text, label))
    return list(found.values())


class ChoiceEncoder:
    """Token ids of prompts and label words.

    Args:
        tokenizer: of the model.
        prompt: of the task.
        max_length: tokens of a prompt with its longest label word; a longer text loses its end.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, max_length: int) -> None:
        self._tokenizer, self._prompt, self._max_length = tokenizer, prompt, max_length
        self._labels = list(prompt.words)

    def encode(self, one: Labelled, demonstrations: str = "") -> ChoiceExample:
        """A question.

        Args:
            one: the text to ask about.
            demonstrations: answered questions in front, for in-context learning.

        Raises:
            InputError: there is no room even without the text.
        """
        words = one.text.split()
        while True:
            prompt = demonstrations + self._prompt.template.format(text=" ".join(words))
            found = self._pieces(prompt)
            excess = len(found[0]) + max(map(len, found[1])) - self._max_length
            if excess <= 0:
                break
            if not words:
                raise InputError(f"max_length is {self._max_length}, too short for the prompt; give {excess} more")
            # A word has at least one token.
            words = words[: max(0, len(words) - max(1, excess // 4))]
        return ChoiceExample(prompt_ids=found[0], choices=found[1], label=self._labels.index(one.label))

    def demonstrations(self, train: Sequence[Labelled], longest: int, seed: int) -> str:
        """As many answered questions of the classes in turn as leave room for a question of `longest` tokens.

        Args:
            train: to draw from.
            longest: tokens of the longest question to come.
            seed: of the order.
        """
        rng, by_label = Random(seed), {label: [one for one in train if one.label == label] for label in self._labels}
        for each in by_label.values():
            rng.shuffle(each)
        text = ""
        for turn in range(max(map(len, by_label.values()))):
            # A whole turn or none of it: the last class must not outnumber the others.
            more = "".join(self._answered(each[turn]) for each in by_label.values() if turn < len(each))
            if len(self._tokenizer.encode(text + more).ids) + longest > self._max_length:
                break
            text += more
        return text

    def _answered(self, one: Labelled) -> str:
        return self._prompt.template.format(text=one.text.strip()) + self._prompt.words[one.label] + ".\n"

    def _pieces(self, prompt: str) -> tuple[NDArray[np.int64], tuple[NDArray[np.int64], ...]]:
        parts = [split_tokens(self._tokenizer, Example(prompt, word)) for word in self._prompt.words.values()]
        return np.array(parts[0][0], np.int64), tuple(np.array(choice, np.int64) for _, choice in parts)
