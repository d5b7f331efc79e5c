"""The parts of a run that its settings name: the algorithm, and the rule by which replies become one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cotune.errors import InputError
from cotune.federation.algorithm import Algorithm, Combine
from cotune.federation.algorithms import ALGORITHMS, HALVING, IN_PARTS, POOLED, REPLAYED, algorithm_named, check_kind
from cotune.federation.annealed import Annealed, CosineRates
from cotune.federation.coplms import CoPlms
from cotune.federation.eva_start import EvaStart
from cotune.federation.gradient_start import GradientStart
from cotune.federation.robust.rule import RobustRule
from cotune.federation.robust.rules import rule_named
from cotune.federation.robust.usual_rule import UsualRule, usual_rule
from cotune.federation.run_privacy import check_privacy, private_mean
from cotune.federation.run_secret import RunSecret, direction_seed
from cotune.federation.settings import CONSTANT, FederationSettings
from cotune.federation.start_first import StartFirst
from cotune.federation.update_svd import UpdateSvd

PLAIN_STARTS = ("orthonormal", "random")
USUAL = "auto"
NUM_LAYERS = "num_layers"
COPLMS, CLOUD_PATHS = "coplms", ("model", "public", "questions")
BUILT_IN = ("", "starter", "persona")
"""No paths, whatever is in the folder that a command runs in."""


def algorithm_of(settings: FederationSettings, secret: RunSecret) -> Algorithm:
    """The server half that the settings name.

    Args:
        settings: of the run.
        secret: directions come from it.

    Raises:
        InputError: there is no such algorithm, it does not take its options, or it needs another kind of adapter.
    """
    for name, table in settings.options.items():
        if name not in ALGORITHMS or not isinstance(table, Mapping):
            raise InputError(
                f"options.{name} is {table!r:.40}, expected a table by the name of an algorithm, one of "
                f"{', '.join(ALGORITHMS)}"
            )
    own = settings.options.get(settings.algorithm, {})
    assert isinstance(own, Mapping)
    algorithm = algorithm_named(
        settings.algorithm,
        own,
        seeds=lambda round_number, index: direction_seed(secret, round_number, index),
        steps=settings.steps,
    )
    check_kind(settings.algorithm, settings.adapter.kind)
    return with_start(with_schedule(algorithm, settings), settings)


def with_schedule(algorithm: Algorithm, settings: FederationSettings) -> Algorithm:
    """The algorithm with the schedule of learning rates around it that the settings name.

    Raises:
        InputError: it has one learning rate for all rounds.
    """
    own = settings.schedule
    if own.kind == CONSTANT:
        return algorithm
    if settings.algorithm in REPLAYED:
        raise InputError(
            f"schedule.kind is {own.kind!r}, expected {CONSTANT!r} for {settings.algorithm}, which replays earlier "
            "steps with one learning rate; leave [schedule] out"
        )
    if isinstance(algorithm, CoPlms):
        # Its server learns, too, with the rates of a part that is put in later.
        return replace(algorithm, rates=CosineRates(num_rounds=settings.rounds.num_rounds, least=own.least))
    return Annealed(inner=algorithm, num_rounds=settings.rounds.num_rounds, least=own.least)


def with_num_layers(settings: FederationSettings, num_layers: int) -> FederationSettings:
    """The settings with the model's number of layers, where the algorithm asks for it and its options do not say it.

    What is wrong in them stays as it is: `algorithm_of` refuses that.

    Example:
        >>> with_num_layers(FederationSettings(algorithm="fedpeptao"), 3).options
        {'fedpeptao': {'num_layers': 3}}
        >>> with_num_layers(FederationSettings(algorithm="rolora"), 3).options
        {}
    """
    kind: Any = ALGORITHMS.get(settings.algorithm)
    own = settings.options.get(settings.algorithm, {})
    if kind is None or not isinstance(own, Mapping) or NUM_LAYERS not in {one.name for one in fields(kind)}:
        return settings
    return replace(settings, options={**settings.options, settings.algorithm: {NUM_LAYERS: num_layers, **own}})


def with_whole_paths(settings: FederationSettings) -> FederationSettings:
    """The settings with folders and files that are there named from the root, so that they are found from anywhere.

    Names that are no path here, of the Hub or of what cotune has itself, stay as they are.

    Example:
        >>> settings = FederationSettings(model="starter", options={"coplms": {"cloud": {"model": "no-such-folder"}}})
        >>> with_whole_paths(settings) == settings
        True
    """
    found = replace(
        settings, model=_whole(settings.model), data=replace(settings.data, path=_whole(settings.data.path))
    )
    own = found.options.get(COPLMS)
    cloud = own.get("cloud") if isinstance(own, Mapping) else None
    if not isinstance(own, Mapping) or not isinstance(cloud, Mapping):
        return found
    told = {name: _whole(value) if name in CLOUD_PATHS else value for name, value in cloud.items()}
    return replace(found, options={**found.options, COPLMS: {**own, "cloud": told}})


def _whole(name: Any) -> Any:
    is_path = isinstance(name, str) and name not in BUILT_IN and Path(name).exists()
    return str(Path(name).absolute()) if is_path else name


def with_start(algorithm: Algorithm, settings: FederationSettings) -> Algorithm:
    """The algorithm with what the start of A asks for around it.

    Raises:
        InputError: a value of the start is impossible.
    """
    own = settings.adapter
    if isinstance(algorithm, CoPlms) and own.start not in PLAIN_STARTS:
        raise InputError(
            f"adapter.start is {own.start!r}, expected one of {', '.join(PLAIN_STARTS)} for {settings.algorithm}, "
            "whose devices measure nothing before the first round"
        )
    wrappers: dict[str, Callable[[], Algorithm]] = {
        "eva": lambda: StartFirst(
            inner=algorithm,
            method=EvaStart(num_rounds=own.start_rounds, num_batches=own.start_batches, seed=settings.seed),
        ),
        "lora_ga": lambda: StartFirst(
            inner=algorithm, method=GradientStart(num_batches=own.start_batches, seed=settings.seed)
        ),
        "update_svd": lambda: UpdateSvd(inner=algorithm, refresh_rounds=own.refresh_rounds),
    }
    return wrappers[own.start]() if own.start in wrappers else algorithm


def rule_of(settings: FederationSettings, *, num_devices: int, num_merged: int | None = None) -> RobustRule:
    """The rule by which replies become one.

    Args:
        settings: of the run.
        num_devices: that can take part in all.
        num_merged: of these, who send what is merged; all of them if left out.

    Raises:
        InputError: there is no such rule, or it needs more replies than devices are asked.
    """
    asked = min(settings.rounds.num_devices_per_round or num_devices, num_devices)
    name, options = settings.combine.rule, settings.combine.options
    if name == USUAL:
        if options:
            raise InputError(f"combine.options is {options!r:.60} and the rule is auto, which has none; name the rule")
        if settings.algorithm in IN_PARTS:
            return UsualRule(is_pooled=settings.algorithm in POOLED)
        return usual_rule(asked, is_pooled=settings.algorithm in POOLED)
    rule = rule_named(name, options)
    whose, num_shown = "", asked
    if settings.algorithm in HALVING:
        whose, num_shown = f", of whose replies {settings.algorithm} shows it one half at a time", max(1, asked // 2)
    elif num_merged is not None and num_merged < asked:
        whose, num_shown = f", of which {num_merged} send what {settings.algorithm} merges", num_merged
    if rule.min_replies > num_shown:
        raise InputError(
            f"the rule {name} needs at least {rule.min_replies} replies and {asked} devices are asked in a round"
            f"{whose}; ask more devices, or choose another rule"
        )
    return rule


def combine_of(settings: FederationSettings, *, num_devices: int, num_merged: int | None = None) -> Combine:
    """How replies become one: the private mean where the settings ask for privacy, else `rule_of`.

    Args:
        settings: of the run.
        num_devices: all that there are, canaries included.
        num_merged: as for `rule_of`.

    Raises:
        InputError: as `rule_of` and `check_privacy`, or no round could begin with so few devices.
    """
    if settings.rounds.min_devices > num_devices:
        raise InputError(
            f"rounds.min_devices is {settings.rounds.min_devices}, expected at most {num_devices}, the devices that "
            "there are; lower it"
        )
    if not settings.privacy.is_on:
        return rule_of(settings, num_devices=num_devices, num_merged=num_merged)
    check_privacy(settings)
    return private_mean(settings.privacy, min(settings.rounds.num_devices_per_round or num_devices, num_devices))


def check_inputs(began_with: Mapping[str, object], now: Mapping[str, str], *, of: str, instead: str) -> None:
    """Refuse to go on with other texts, models or numbers than a run began with.

    Args:
        began_with: digests by name; what an older version does not name is not checked.
        now: the same, as they are.
        of: which run.
        instead: what else can be done.

    Raises:
        InputError: one differs; says which.
    """
    for name, value in now.items():
        if name in began_with and began_with[name] != value:
            raise InputError(
                f"the {name} of the run in {of} was {began_with[name]!s:.16} and is {value:.16} now; go on with what "
                f"it began with, or {instead}"
            )


def run_id(settings: FederationSettings, secret: RunSecret) -> str:
    """Names a run: the same settings with the same secret."""
    # More rounds are the same run, which goes on.
    same = replace(settings, rounds=replace(settings.rounds, num_rounds=1))
    return hashlib.sha256(f"{same!r}\0{secret.public_id}".encode()).hexdigest()[:20]
