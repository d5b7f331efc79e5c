"""The texts of the study of co-tuning: a domain for each device, what is asked of whom, and what the server has.

By default domains are made up (`cotune.data.domain_questions`): facts that one device alone has, skills that all share,
and sums over two things. With `--datasets`, each device has the texts of a data set, and skills are questions of the
data sets that the models went to school with. Either way a question of another device's domain is "crossed": nothing
that the device has says what is asked there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random

from cotune.data import DatasetSplits, read_splits
from cotune.data.domain_questions import DomainQuestions, generate_domains, generate_public, open_questions
from cotune.data.templates import Example
from cotune.errors import InputError

OWN, CROSSED, SKILLS, MIXED = "own", "crossed", "skills", "mixed"
SETS = (OWN, CROSSED, SKILLS, MIXED)
MAX_SEEDS = 9
FIRST_SEEDS = 3
"""Where the search would ask what a test asks, it yields to these; the tests of further seeds yield to the search."""
SEARCH_WORLD = MAX_SEEDS
"""Seed of the facts and texts on which learning rates are searched, which no test has."""
SCHOOL_SEED = 10**6
SCHOOL_TEXTS = 4000
"""Of all data sets of a school together."""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One device's.

    Attributes:
        train: its texts.
        asked: questions of its domain.
        skills, mixed: questions of skills, and sums over two things; with data sets there are no sums.
        open: questions of its domain that the server has, without answers.
        names: of its things, which nobody else may have met.
    """

    train: list[Example]
    asked: list[Example]
    skills: list[Example]
    mixed: list[Example]
    open: list[str]
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The texts of one seed.

    Attributes:
        domains: one for each device.
        public: of the server.
    """

    domains: list[Domain]
    public: list[Example]

    @property
    def open(self) -> list[str]:
        """Questions of all domains that the server has no answer to."""
        return [one for domain in self.domains for one in domain.open]

    def of_device(self, place: int) -> dict[str, list[Example]]:
        """What the model on this device is asked."""
        own = self.domains[place]
        others = [one for index, domain in enumerate(self.domains) if index != place for one in domain.asked]
        return {OWN: own.asked, CROSSED: others, SKILLS: own.skills, MIXED: own.mixed}

    def of_all(self) -> dict[str, list[Example]]:
        """What the cloud's model and the proxy are asked."""
        asked = [one for domain in self.domains for one in domain.asked]
        mixed = [one for domain in self.domains for one in domain.mixed]
        return {OWN: [], CROSSED: asked, SKILLS: self.domains[0].skills, MIXED: mixed}

    def tested(self) -> set[str]:
        """Every question of every test."""
        return {
            one.prompt for place in range(len(self.domains)) for own in self.of_device(place).values() for one in own
        }

    def without(self, prompts: set[str]) -> Questions:
        """The same with none of these questions in any test."""

        def left(examples: Sequence[Example]) -> list[Example]:
            return [one for one in examples if one.prompt not in prompts]

        domains = [
            replace(one, asked=left(one.asked), skills=left(one.skills), mixed=left(one.mixed)) for one in self.domains
        ]
        return replace(self, domains=domains)

    def kept_out(self) -> list[Example]:
        """What no model may have read before: facts of devices, and all that tests ask; skills may be practised."""
        found = []
        for domain in self.domains:
            found += [one for one in domain.train if any(name in one.prompt for name in domain.names)]
            found += [*domain.asked, *domain.skills, *domain.mixed]
        return found


def texts_of_search(args: argparse.Namespace, num_devices: int) -> Questions:
    """On which learning rates are searched: a world of its own, without what the tests of the first seeds ask.

    Args, errors: as for `texts_of`.
    """
    tested = [texts_of(args, max(args.devices), seed).tested() for seed in range(FIRST_SEEDS)]
    return texts_of(args, num_devices, SEARCH_WORLD).without(set().union(*tested))


def texts_of_test(args: argparse.Namespace, num_devices: int, seed: int) -> Questions:
    """Of a seed's runs, without what is asked where learning rates are searched.

    Args, errors: as for `texts_of`.
    """
    whole = texts_of(args, num_devices, seed)
    return whole if seed < FIRST_SEEDS else whole.without(texts_of_search(args, max(args.devices)).tested())


def texts_of(args: argparse.Namespace, num_devices: int, seed: int) -> Questions:
    """Texts of so many devices; those of fewer devices are the first of more.

    Args:
        args: of the study.

    Raises:
        InputError: a data set cannot be read, or is too small.
    """
    most = max(args.devices)
    whole = _read(args, most, seed) if args.datasets else _made(args, most, seed)
    return replace(whole, domains=whole.domains[:num_devices])


def _made(args: argparse.Namespace, num_devices: int, seed: int) -> Questions:
    domains = generate_domains(
        [f"domain-{place}" for place in range(num_devices)],
        num_things=args.num_things,
        num_skills=args.num_skills,
        num_test=args.num_test,
        seed=seed,
    )
    tested = {one.prompt for one in domains[0].skills}
    public = [one for one in generate_public(2 * args.num_public, seed=seed) if one.prompt not in tested]
    return Questions(domains=[_domain(one) for one in domains], public=public[: args.num_public])


def _domain(made: DomainQuestions) -> Domain:
    return Domain(
        train=made.train,
        asked=made.facts,
        skills=made.skills,
        mixed=made.mixed,
        open=open_questions(made),
        names=tuple(thing.name for thing in made.things),
    )


def _read(args: argparse.Namespace, num_devices: int, seed: int) -> Questions:
    """Devices take turns in data sets; two of one data set have different texts and the same questions."""
    root = _root(args)
    skills = _taken(
        [one for name in args.school for one in _splits(root, name).test],
        args.num_test,
        seed,
        f"test texts of {' and '.join(args.school)}",
    )
    domains = []
    for place in range(num_devices):
        name, part = args.datasets[place % len(args.datasets)], place // len(args.datasets)
        needed = args.num_train * (1 + (num_devices - 1) // len(args.datasets)) + args.num_open
        splits = _splits(root, name)
        drawn = _taken(splits.train, needed, seed, f"training texts of {name}")
        domains.append(
            Domain(
                train=drawn[part * args.num_train :][: args.num_train],
                asked=_taken(splits.test, args.num_test, seed, f"test texts of {name}"),
                skills=skills,
                mixed=[],
                # Each data set's open questions count once.
                open=[one.prompt for one in drawn[-args.num_open :]] if part == 0 else [],
            )
        )
    rows = _school_rows(args)
    if len(rows) < SCHOOL_TEXTS // 2 + args.num_public:
        raise InputError(
            f"--school has {len(rows)} training texts, expected at least {SCHOOL_TEXTS // 2} beside public"
        )
    public = _taken(rows[_num_school(args, rows) :], args.num_public, seed, "public texts of --school")
    return Questions(domains=domains, public=public)


def school_of(args: argparse.Namespace) -> list[Example]:
    """With data sets: what all models have read; the server's public texts come from the rest."""
    rows = _school_rows(args)
    return rows[: _num_school(args, rows)]


def _num_school(args: argparse.Namespace, rows: Sequence[Example]) -> int:
    # Seeds' public texts overlap where a school is small, as those of a server would.
    return min(SCHOOL_TEXTS, len(rows) - args.num_public)


def _school_rows(args: argparse.Namespace) -> list[Example]:
    root = _root(args)
    rows = [one for name in args.school for one in _splits(root, name).train]
    Random(SCHOOL_SEED).shuffle(rows)
    return rows


def _root(args: argparse.Namespace) -> Path:
    if args.data_root is None or not args.school or set(args.school) & set(args.datasets):
        raise InputError(
            f"--data-root is {args.data_root}, --datasets {' '.join(args.datasets)} and --school "
            f"{' '.join(args.school or []) or 'none'}, expected a folder with all of them, and a school without domains"
        )
    return Path(args.data_root)


def _taken(rows: Sequence[Example], num: int, seed: int, what: str) -> list[Example]:
    if len(rows) < num:
        raise InputError(f"there are {len(rows)} {what}, expected at least {num}; ask for fewer")
    return Random(seed).sample(list(rows), num)


@lru_cache
def _splits(root: Path, name: str) -> DatasetSplits:
    return read_splits(root / name)
