"""The algorithms by name: a new one is a file, a test file and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from cotune.errors import InputError
from cotune.federation.algorithm import Algorithm, DirectionSeeds
from cotune.federation.coplms import CoPlms
from cotune.federation.fedit import FedIT
from cotune.federation.fedkseed import FedKSeed
from cotune.federation.fedkseed_pro import FedKSeedPro
from cotune.federation.fedpeptao import FedPepTAO
from cotune.federation.fedselft import FedSelFT
from cotune.federation.ferret import Ferret
from cotune.federation.ffa_lora import FfaLora
from cotune.federation.flexlora import FlexLora
from cotune.federation.flora import Flora
from cotune.federation.fwdllm import FwdLLM
from cotune.federation.local_model import LocalSteps
from cotune.federation.mixed import Mixed
from cotune.federation.rolora import RoLora
from cotune.federation.seed import SeedMode
from cotune.federation.tables import from_table

ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = {
    "fedit": FedIT,
    "ffa_lora": FfaLora,
    "rolora": RoLora,
    "seed": SeedMode,
    "fedkseed": FedKSeed,
    "fedkseed_pro": FedKSeedPro,
    "fwdllm": FwdLLM,
    "ferret": Ferret,
    "mixed": Mixed,
    "flexlora": FlexLora,
    "flora": Flora,
    "fedselft": FedSelFT,
    "fedpeptao": FedPepTAO,
    "coplms": CoPlms,
}
"""Name to class. Options are the class's fields; a field that is a dataclass itself is a table."""
KINDS: Mapping[str, str] = {
    "ffa_lora": "lora",
    "rolora": "lora",
    "flexlora": "lora",
    "flora": "lora",
    "fedselft": "lora",
    "fedpeptao": "prefix",
    "coplms": "lora",
}
"""The kind of adapter that an algorithm needs; all others take any, as far as their patterns of names fit."""
HALVING = frozenset({"fwdllm"})
"""Algorithms that show a rule one half of a round's replies, and then the other."""
IN_PARTS = HALVING | {"mixed", "coplms"}
"""Algorithms that show a rule parts of a round's replies: halves, classes of devices, or those with an adapter."""
KSEED = frozenset({"fedkseed", "fedkseed_pro"})
POOLED = KSEED | {"coplms"}
"""Algorithms whose devices each say what no other one does: they fill the few places of a reply that they drew, where
most others say 0; or they know a domain of their own. Trimming would cut just that."""
REPLAYED = KSEED | {"seed"}
"""Algorithms whose devices replay the steps of earlier rounds, all with one learning rate."""
# The field that no configuration gives: directions come from the run's secret.
SEEDS = "seeds"
# Likewise: models at work, which `cotune.federation.co_tuning_parts` puts in, and rates, from the settings' schedule.
LATER = ("cloud_half", "rates")


def algorithm_named(
    name: str,
    options: Mapping[str, object] | None = None,
    *,
    seeds: DirectionSeeds,
    steps: LocalSteps | None = None,
) -> Algorithm:
    """Make an algorithm, as a configuration names it.

    Args:
        name: a key of `ALGORITHMS`.
        options: its settings.
        seeds: of directions, for those algorithms that take them from the run's secret.
        steps: local steps, for those that have them and whose options say nothing of them.

    Raises:
        InputError: an unknown name or option, or a bad value.

    Example:
        >>> options = {"steps": {"num_steps": 4, "learning_rate": 1e-3}}
        >>> algorithm_named("fedit", options, seeds=lambda round_number, index: 0).steps.num_steps
        4
    """
    if name not in ALGORITHMS:
        raise InputError(f"algorithm is {name!r}, expected one of {', '.join(ALGORITHMS)}")
    kind: Any = ALGORITHMS[name]
    own, table = {one.name for one in fields(kind)}, options or {}
    given: dict[str, Any] = {SEEDS: seeds} if SEEDS in own else {}
    given |= dict.fromkeys(own.intersection(LATER))
    usual = {"steps": steps} if "steps" in own and steps is not None else {}
    made: Algorithm = from_table(kind, table, where=f"options.{name}.", given=given, usual=usual)
    return made


def check_kind(name: str, kind: str) -> None:
    """Refuse an algorithm that needs another kind of adapter.

    Raises:
        InputError: it does.

    Example:
        >>> check_kind("rolora", "lora")
        >>> check_kind("fedit", "prefix")
    """
    needed = KINDS.get(name, kind)
    if needed != kind:
        raise InputError(
            f"the adapter's kind is {kind!r}, expected {needed!r}, which {name} needs; set kind = {needed!r} under "
            "[adapter], or choose another algorithm"
        )
