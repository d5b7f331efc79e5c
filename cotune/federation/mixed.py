"""Devices of different memory in one federation: `lora` where back-propagation fits, `seed` where inference alone does.

FFA-LoRA (Sun et al., arXiv 2403.12313) and DeComFL's shared directions (Li et al., arXiv 2405.15861) in one round; the
mixture is ours. A is frozen and all tune the same B, so what either class says is about the same numbers:

    lora, as ffa_lora.py:  dB_c, what local steps of back-propagation changed; D = combine_c(dB_c)
    seed, as seed.py:      K slopes along shared directions; G_k = combine_c(g_ck), S = -(lr / P) sum_k G_k z_k
    B <- B + (w_l D + w_s S) / (w_l + w_s)

Symbols: w_l and w_s the sums of the classes' weights, a seed device's counted `seed_weight` times. With one class alone
the round is that of `ffa_lora` or of `seed`. A rule is used within each class, on updates that can be compared. The
usual one suits itself to the size of the class; one that is named has to bear the smaller class, or the round is void.

Who is what: `classes` by the device's name; for those that no pattern fits, `memory_bytes` by name against what the
methods need, `lora_bytes` and `seed_bytes`, which the commands look up for the model. A device of neither is `lora`.

Wire: 4 r m bytes down for each layer, to both classes, as no K numbers tell a step of back-propagation; A once. Up
4 r m of a lora device, 4 K of a seed device. Memory: that of LoRA with B's optimiser state, and that of inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.algorithm import Combine, DirectionSeeds, Done, Job, Plan, Update, mean_of
from cotune.federation.arrays import Arrays
from cotune.federation.descend import names_like, shapes_like, steps_as_settings
from cotune.federation.local_model import LocalSteps
from cotune.federation.number_ranges import check_at_least, check_at_most, check_positive
from cotune.federation.replay import MAX_DIRECTIONS, summed
from cotune.federation.seed import SLOPES, slopes_from

TRAINED = "*lora_B*"
LORA, SEED = "lora", "seed"
CLASSES = (LORA, SEED)


@dataclass(frozen=True, kw_only=True)
class SeedSteps:
    """What a seed device does in a round; the words of `cotune.federation.seed`."""

    num_directions: int = 512
    """K, of a round."""
    num_directions_per_step: int = 1
    """P; a device takes K / P local steps."""
    learning_rate: float = 1e-3
    zo_eps: float = 1e-3
    """eps, in units of B."""
    batch_size: int = 8
    """Texts of a step."""

    def __post_init__(self) -> None:
        check_at_least(
            1,
            num_directions=self.num_directions,
            num_directions_per_step=self.num_directions_per_step,
            batch_size=self.batch_size,
        )
        check_at_most(MAX_DIRECTIONS, num_directions=self.num_directions)
        if self.num_directions % self.num_directions_per_step:
            raise InputError(
                f"num_directions is {self.num_directions}, expected a multiple of num_directions_per_step, "
                f"{self.num_directions_per_step}"
            )
        check_positive(learning_rate=self.learning_rate, zo_eps=self.zo_eps)


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """The server half; `cotune.federation.descend` and `measure_slopes_here` are the devices'."""

    seeds: DirectionSeeds
    """Of directions, from the run's secret."""
    steps: LocalSteps = field(default_factory=LocalSteps)
    """Of lora devices."""
    seed_mode: SeedSteps = field(default_factory=SeedSteps)
    """Of seed devices."""
    classes: Mapping[str, object] = field(default_factory=dict)
    """`lora` or `seed` by a pattern of names; the first that fits counts."""
    memory_bytes: Mapping[str, object] = field(default_factory=dict)
    """What devices have, in bytes, by a pattern of names; the first that fits counts."""
    lora_bytes: int | None = None
    """What a lora device needs."""
    seed_bytes: int | None = None
    """What a seed device needs."""
    seed_weight: float = 1.0
    """What a seed device counts, in lora devices."""

    def __post_init__(self) -> None:
        for pattern, kind in self.classes.items():
            if kind not in CLASSES:
                raise InputError(f"classes.{pattern} is {kind!r:.40}, expected one of {', '.join(CLASSES)}")
        for pattern, num in self.memory_bytes.items():
            if isinstance(num, bool) or not isinstance(num, int) or num < 1:
                raise InputError(f"memory_bytes.{pattern} is {num!r:.40}, expected a whole number of bytes")
        check_positive(seed_weight=self.seed_weight)

    def class_of(self, device: str) -> str:
        """`lora` or `seed`.

        Raises:
            InputError: the device's memory is too small for either.

        Example:
            >>> sizes = {"phone-*": 3_000, "*": 9_000}
            >>> mixed = Mixed(seeds=lambda r, k: k, memory_bytes=sizes, lora_bytes=8_000, seed_bytes=2_000)
            >>> mixed.class_of("phone-7"), mixed.class_of("desk")
            ('seed', 'lora')
        """
        for pattern, kind in self.classes.items():
            if fnmatchcase(device, pattern):
                return str(kind)
        for pattern, num in self.memory_bytes.items():
            if not fnmatchcase(device, pattern):
                continue
            assert isinstance(num, int) and self.lora_bytes is not None and self.seed_bytes is not None
            if num >= self.lora_bytes:
                return LORA
            if num >= self.seed_bytes:
                return SEED
            raise InputError(
                f"{device} has {num:,} bytes, expected at least {self.seed_bytes:,} for seed; give it a smaller model, "
                "or leave it out"
            )
        return LORA

    def start(self, adapter: Arrays) -> Arrays:
        # Not earlier: what both need is known only when the model was read.
        if self.memory_bytes and (self.lora_bytes is None or self.seed_bytes is None):
            raise InputError(
                "memory_bytes is given and lora_bytes or seed_bytes is not; add what both need, from cotune plan, or "
                "prepare the run with `cotune federate prepare`, which looks it up"
            )
        names_like(adapter, TRAINED)
        return dict(adapter)

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        lacks = state if since is None else {name: state[name] for name in names_like(state, TRAINED)}
        if self.class_of(device) == LORA:
            return Plan(
                work="descend",
                arrays=lacks,
                settings=steps_as_settings(self.steps) | {"trained": TRAINED},
                reply=shapes_like(state, TRAINED),
            )
        own = self.seed_mode
        return Plan(
            work="mixed_seed",
            arrays=lacks,
            settings={
                "num_directions": own.num_directions,
                "num_directions_per_step": own.num_directions_per_step,
                "learning_rate": own.learning_rate,
                "zo_eps": own.zo_eps,
                "batch_size": own.batch_size,
                "tuned": TRAINED,
            },
            reply={SLOPES: (own.num_directions,)},
        )

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        names = names_like(state, TRAINED)
        # What a reply holds has been checked against its device's plan.
        by_seed = [one for one in updates if SLOPES in one.arrays]
        by_lora = [one for one in updates if SLOPES not in one.arrays]
        seed_weight = self.seed_weight * sum(one.weight for one in by_seed)
        lora_weight = sum(one.weight for one in by_lora)
        changes = {name: np.zeros(state[name].shape) for name in names}  # float64
        if by_lora:
            mean = mean_of(by_lora, combine, names)
            for name in names:
                changes[name] += lora_weight / (lora_weight + seed_weight) * mean[name]
        if by_seed:
            slopes = mean_of(by_seed, combine, [SLOPES])[SLOPES]
            rate = -self.seed_mode.learning_rate / self.seed_mode.num_directions_per_step
            replayed = summed(
                shapes_like(state, TRAINED),
                [self.seeds(round_number, k) for k in range(len(slopes))],
                [rate * float(slope) for slope in slopes],
            )
            for name in names:
                changes[name] += seed_weight / (lora_weight + seed_weight) * replayed[name]
        moved = {name: (state[name] + change).astype(np.float32) for name, change in changes.items()}
        return {**state, **moved}

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return dict(state)


def measure_slopes_here(job: Job) -> Done:
    """A seed device's half: K slopes at the adapter as it came."""
    return slopes_from(job, job.arrays)
