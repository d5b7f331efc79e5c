"""What `cotune federate CONFIG.toml` runs: tables of a TOML file as frozen dataclasses. Unknown keys are refused.

    algorithm = "rolora"            # see cotune/federation/algorithms.py
    model = "starter"               # a Hugging Face folder, a Hub name, or starter
    seed = 0

    [data]                          # the texts of all simulated devices, and what judges each round
    path = "my-texts.jsonl"
    num_devices = 10
    split = "iid"                   # iid, dirichlet, domains or sizes

    [adapter]                       # LoRA's shape and where A begins; or a prefix
    [steps]                         # local steps of first-order algorithms
    [rounds]                        # how many, deadline, quorum, ...
    [combine]                       # how replies become one: rule = "median", or left out
    [privacy]                       # noise on what every round releases, and its account
    [audit]                         # made-up devices that measure what the results give away
    [options.seed]                  # of the algorithm itself, by its name

Tables and keys that are left out have their defaults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import date, time
from pathlib import Path

from cotune.errors import InputError
from cotune.federation.coordinator import RoundRules
from cotune.federation.local_model import LocalSteps
from cotune.federation.number_ranges import check_at_least, check_positive, check_share
from cotune.federation.tables import read_toml

SPLITS = ("iid", "dirichlet", "domains", "sizes")
KINDS = ("lora", "prefix")
STARTS = ("orthonormal", "random", "eva", "lora_ga", "update_svd")
SCALES = ("lora", "rslora")
CONSTANT, COSINE = "constant", "cosine"
SCHEDULES = (CONSTANT, COSINE)
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Whose texts are tuned on."""

    path: str = "persona"
    """As for `cotune tune`; or `persona`, texts that cotune makes itself. With `domains`, a folder of data files."""
    template: str | None = None
    """How columns become prompts; found by itself if left out."""
    limit: int | None = None
    """Texts in all, at most."""
    num_devices: int = 10
    """Simulated devices."""
    split: str = "iid"
    """`iid`; `dirichlet` over the targets; `domains`, one file each; `sizes`, lognormal."""
    alpha: float = 0.5
    """Of `dirichlet`: small ones give devices of few labels."""
    min_examples: int = 1
    """Of every device."""
    num_judge: int = 64
    """Texts that no device has, which the server judges each round by; 0 accepts every round."""
    max_length: int = 256
    """Tokens of one text."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise InputError(f"split is {self.split!r}, expected one of {', '.join(SPLITS)}")
        check_at_least(1, num_devices=self.num_devices, min_examples=self.min_examples, max_length=self.max_length)
        check_at_least(0, num_judge=self.num_judge)
        if self.limit is not None and self.limit < self.num_devices + self.num_judge:
            raise InputError(
                f"limit is {self.limit}, expected at least {self.num_devices + self.num_judge}: one text for each "
                "device, and those of the judge"
            )


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What is tuned."""

    kind: str = "lora"
    """`lora`, or `prefix`: keys and values in front of each layer's, which fedpeptao needs."""
    virtual_tokens: int = 8
    """Of a prefix: positions of the context that it takes."""
    rank: int = 8
    """Of LoRA, as are alpha, targets and start."""
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    """Last names of the adapted layers; empty: every linear layer but the output embedding."""
    start: str = "orthonormal"
    """Where A begins: `orthonormal` rows; `random` as peft; `eva`, directions of the devices' own activations;
    `lora_ga`, of their gradients; `update_svd`, orthonormal and later those of what was learned, as FedSVD."""
    start_rounds: int = 1
    """Rounds that `eva` takes before the first of training, 1 or 2."""
    start_batches: int = 4
    """Of texts on each device, for `eva` and `lora_ga`."""
    refresh_rounds: int = 1
    """Accepted rounds after which `update_svd` chooses A anew."""
    scale: str = "lora"
    """`lora`: B A counts alpha / rank; `rslora`: alpha / sqrt(rank)."""

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("start", STARTS), ("scale", SCALES)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        check_positive(alpha=self.alpha)
        check_at_least(
            1,
            rank=self.rank,
            virtual_tokens=self.virtual_tokens,
            start_rounds=self.start_rounds,
            start_batches=self.start_batches,
            refresh_rounds=self.refresh_rounds,
        )


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """How learning rates change from round to round; see `cotune.federation.annealed`."""

    kind: str = CONSTANT
    """`constant`; or `cosine`, which falls until round `num_rounds`. With more rounds than that, a run goes on along
    the longer cosine."""
    least: float = 0.1
    """Share of each learning rate that is left at the end of a cosine."""

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise InputError(f"kind is {self.kind!r}, expected one of {', '.join(SCHEDULES)}")
        check_share(least=self.least)


@dataclass(frozen=True, kw_only=True)
class CombineSettings:
    """How the replies of a round become one."""

    rule: str = "auto"
    """See `cotune.federation.robust.rules`. `auto`: replies longer than four times their median norm are left out, the
    others clipped to their median norm, then the trimmed mean. Where fewer than five devices are asked, the mean stands
    for the trimmed one; with two, nothing is clipped or left out either. For `mixed` and `fwdllm` the replies of each
    class, or half, are counted instead, as they come."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Of the rule."""


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """Differential privacy of whole devices; see `cotune.federation.run_privacy`."""

    noise_multiplier: float = 0.0
    """z, the noise on the sum of a round in units of `clip_norm`; 0: no noise, no clipping, no promise."""
    clip_norm: float = 1.0
    """C, the largest norm of a device's reply that counts; longer ones are shortened."""
    delta: float = 1e-5
    """The probability with which the promise may fail; far below one divided by the number of devices."""

    def __post_init__(self) -> None:
        if not 0 <= self.noise_multiplier < float("inf"):
            raise InputError(f"noise_multiplier is {self.noise_multiplier}, expected a positive number, or 0 for none")
        check_positive(clip_norm=self.clip_norm)
        if not 0 < self.delta < 1:
            raise InputError(f"delta is {self.delta}, expected above 0 and below 1")

    @property
    def is_on(self) -> bool:
        """Whether there is noise."""
        return self.noise_multiplier > 0


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """A one-shot audit of what results give away of a device; see `cotune.federation.canary_devices`."""

    num_canaries: int = 0
    """Made-up devices beside the real ones, which send random vectors; 0: no audit. Below 200 chance says much."""
    norm: float = 1.0
    """Of what they send; with privacy the clipping norm counts instead."""

    def __post_init__(self) -> None:
        if self.num_canaries != 0 and self.num_canaries < 3:
            raise InputError(f"num_canaries is {self.num_canaries}, expected at least 3, or 0 for none")
        check_positive(norm=self.norm)


@dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """A whole run."""

    algorithm: str = "rolora"
    model: str = "starter"
    seed: int = 0
    data: DataSettings = field(default_factory=DataSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    steps: LocalSteps = field(default_factory=LocalSteps)
    rounds: RoundRules = field(default_factory=RoundRules)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    combine: CombineSettings = field(default_factory=CombineSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    audit: AuditSettings = field(default_factory=AuditSettings)
    options: Mapping[str, object] = field(default_factory=dict)
    """Tables by the name of an algorithm: its own settings, such as `[options.seed]` with `num_directions`."""

    def __post_init__(self) -> None:
        check_at_least(0, seed=self.seed)

    @classmethod
    def read(cls, path: Path | str) -> FederationSettings:
        """A TOML file.

        Raises:
            InputError: it cannot be read, or a key or value is wrong; names it.
        """
        return read_toml(cls, path)


def as_toml(settings: FederationSettings) -> str:
    """All settings as a file that `FederationSettings.read` takes; those without a value stand as comments.

    Example:
        >>> print(as_toml(FederationSettings(options={"mixed": {"classes": {"phone-*": "seed"}}})).partition("[opt")[2])
        ions.mixed]
        classes = { "phone-*" = "seed" }
        <BLANKLINE>
    """
    plain, tables = [], []
    for one in fields(settings):
        value = getattr(settings, one.name)
        if is_dataclass(value):
            rows = [_toml_line(each.name, getattr(value, each.name)) for each in fields(value)]
            tables.append("\n".join([f"[{one.name}]", *rows]))
        elif not isinstance(value, Mapping):
            plain.append(_toml_line(one.name, value))
    tables += _option_tables(settings.options)
    return "\n".join(plain) + "\n\n" + "\n\n".join(tables) + "\n"


def _option_tables(options: Mapping[str, object]) -> list[str]:
    """A table for each algorithm."""
    if not options:
        return ["# Settings of an algorithm stand under its name.\n# [options.seed]\n# num_directions = 32"]
    tables = []
    for name, own in options.items():
        if not isinstance(own, Mapping):
            raise InputError(f"options.{name} is {own!r:.40}, expected a table of settings")
        rows = [_toml_line(key, value) for key, value in own.items()]
        tables.append("\n".join([f"[options.{_key(name)}]", *rows]))
    return tables


def _toml_line(name: str, value: object) -> str:
    return f"# {name} =" if value is None else f"{_key(name)} = {_toml(value)}"


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _text(name)


def _text(value: str) -> str:
    # As JSON has it, but for what TOML forbids: surrogate pairs, and a bare DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml(value: object) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(one)}" for key, one in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    if isinstance(value, date | time):
        return value.isoformat()
    return repr(value)
