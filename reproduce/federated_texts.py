"""Texts of the studies of federations: what devices hold, what the server judges rounds by, and what judges runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from study_options import PERSONA
from study_texts import with_training_texts

from cotune.data import DEMO_PERSONA, format_answer, format_request, read_splits
from cotune.data.assistant.private import ask_fact, do_own_task, write_to_own_people
from cotune.data.assistant_text import draw_exchange
from cotune.data.client_shards import shard_dirichlet, shard_iid
from cotune.data.templates import Example
from cotune.errors import InputError
from cotune.federation.simulation import MAX_LABELS

IID, DIRICHLET, DOMAINS = "iid", "dirichlet", "domains"
SPLITS = (IID, DIRICHLET, DOMAINS)
ALPHA = 0.5
"""Of the Dirichlet split."""


def _everyday(rng: Random) -> tuple[str, str]:
    exchange = draw_exchange(rng, DEMO_PERSONA.voice)
    return exchange.request, exchange.answer


_PERSONA_KINDS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "everyday": _everyday,
    "messages": lambda rng: write_to_own_people(rng, DEMO_PERSONA),
    "tasks": lambda rng: do_own_task(rng, DEMO_PERSONA),
    "facts": lambda rng: ask_fact(rng, DEMO_PERSONA),
}
_DRAWS_EACH = 50


@dataclass(frozen=True, kw_only=True)
class StudyTexts:
    """Attributes:
    devices: what all devices hold together.
    labels: of these texts, what a split goes by: the data set where there are several, else the target.
    server: what the server judges rounds and learning rates by.
    test: what judges finished runs, and chooses nothing.
    """

    devices: list[Example]
    labels: list[str]
    server: list[Example]
    test: list[Example]


def read_texts(
    datasets: Sequence[str], data_root: Path | None, *, num_train: int, num_server: int, num_test: int
) -> StudyTexts:
    """The texts, as many of every data set, always the same; of the persona, as many of every kind of request.

    Raises:
        InputError: a data set is not there, or has too few texts.
    """
    if list(datasets) == [PERSONA]:
        names: Sequence[str] = list(_PERSONA_KINDS)
    elif PERSONA in datasets:
        raise InputError(f"datasets are {' '.join(datasets)}, expected {PERSONA} alone or folders of --data-root")
    else:
        names = datasets
    counts = [max(1, num // len(names)) for num in (num_train, num_server, num_test)]
    parts: list[tuple[list[Example], list[Example]]] = []
    for name in names:
        parts.append(_persona_kind(name, counts) if name in _PERSONA_KINDS else _folder(data_root, name, counts))
    devices, labels, server, test = [], [], [], []
    for name, (train, held) in zip(names, parts, strict=True):
        own = train[counts[1] :]
        devices += own
        labels += [name if len(names) > 1 else one.target.strip() for one in own]
        server += train[: counts[1]]
        test += held
    return StudyTexts(devices=devices, labels=labels, server=server, test=test)


def device_names(num: int) -> list[str]:
    """Of `num` devices.

    Example:
        >>> device_names(2)
        ['device-0', 'device-1']
    """
    return [f"device-{index:0{len(str(num - 1))}d}" for index in range(num)]


def split_texts(texts: StudyTexts, split: str, *, num_devices: int, seed: int) -> dict[str, list[Example]]:
    """The texts of each device by its name.

    `domains` gives each label to as many devices, as far as that goes: device i has label i modulo their number.

    Raises:
        InputError: too few texts, or too many labels for the split.

    Example:
        >>> texts = [Example("a?", " a"), Example("b?", " b")]
        >>> own = StudyTexts(devices=texts, labels=["x", "y"], server=[], test=[])
        >>> {name: [one.prompt for one in held] for name, held in split_texts(
        ...     own, "domains", num_devices=2, seed=0).items()}
        {'device-0': ['a?'], 'device-1': ['b?']}
    """
    names = device_names(num_devices)
    kinds = sorted(set(texts.labels))
    if split != IID and len(kinds) > (num_devices if split == DOMAINS else MAX_LABELS):
        most = f"{num_devices}, one device for each" if split == DOMAINS else str(MAX_LABELS)
        raise InputError(
            f"split is {split!r} and the texts have {len(kinds)} labels, expected at most {most}; give several "
            "data sets or a classification task, or leave this split out"
        )
    if split == DOMAINS:
        return _by_domain(texts, names, kinds, seed)
    sizes = {"num_clients": num_devices, "seed": seed}
    shards = (
        shard_dirichlet(texts.labels, alpha=ALPHA, **sizes)
        if split == DIRICHLET
        else shard_iid(len(texts.devices), **sizes)
    )
    return dict(zip(names, shards.take(texts.devices), strict=True))


def _by_domain(texts: StudyTexts, names: Sequence[str], kinds: Sequence[str], seed: int) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    for place, kind in enumerate(kinds):
        own = [text for text, label in zip(texts.devices, texts.labels, strict=True) if label == kind]
        holders = list(names[place :: len(kinds)])
        shards = shard_iid(len(own), num_clients=len(holders), seed=seed)
        found |= dict(zip(holders, shards.take(own), strict=True))
    return {name: found[name] for name in names}


def _persona_kind(name: str, counts: Sequence[int]) -> tuple[list[Example], list[Example]]:
    """Each request once, so that none is both trained on and tested."""
    rng, wanted = Random(f"{name} 1"), sum(counts)
    found: dict[str, Example] = {}
    for _ in range(_DRAWS_EACH * wanted):
        request, answer = _PERSONA_KINDS[name](rng)
        found.setdefault(request, Example(format_request(request), format_answer(answer)))
        if len(found) == wanted:
            cut = counts[0] + counts[1]
            return list(found.values())[:cut], list(found.values())[cut:]
    raise InputError(
        f"the persona has {len(found)} different requests of the kind {name}, expected {wanted}; ask for fewer texts"
    )


def _folder(data_root: Path | None, name: str, counts: Sequence[int]) -> tuple[list[Example], list[Example]]:
    if data_root is None:
        raise InputError(f"--data-root is not given and {name} is a folder there; give it, or {PERSONA}")
    folder = data_root / name
    if not folder.is_dir():
        raise InputError(f"{data_root} has no folder {name}; add it")
    splits = read_splits(folder, seed=1)
    train, test = with_training_texts(splits.train, splits.test)
    if len(train) <= counts[1] or not test:
        raise InputError(
            f"{name} has {len(train)} training texts and {len(test)} test texts, expected more than {counts[1]}, which "
            "the server judges by, and at least one; give more texts, or lower --num-server"
        )
    return train[: counts[0] + counts[1]], test[: counts[2]]
