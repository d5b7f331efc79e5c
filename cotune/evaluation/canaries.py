"""Canaries: random secrets planted in training texts, to measure how well a model has learnt them by heart.

Carlini et al., "The Secret Sharer", arXiv 1802.08232. A canary is a fixed prompt and a secret drawn uniformly from a
space R of known size. After training, all secrets r in R are ranked by their likelihood behind that prompt:

    exposure = log2 |R| - log2 rank(planted secret)                            bits, definition 2

For a model that never saw the canary, exposure of x bits or more has probability 2^-x: 1.4 bits are expected, 10 bits
in one of a thousand. A large space cannot be ranked whole. With S other secrets drawn from it, of which k are
likelier, (1 + k) / (1 + S) stands in for rank / |R| (section 4.4), so that

    exposure = log2(1 + S) - log2(1 + k)

which is the definition where S + 1 = |R|, and is log2(1 + S) at most: more can be said only with more of them. The
paper's extrapolation with a skew-normal distribution is left out: it says how a fitted curve goes on, not what was
measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from cotune.data.templates import Example, common_prompt_format
from cotune.errors import DataError, InputError
from cotune.evaluation.schema import Count, check_type

MANIFEST_NAME = "canaries.json"
FORMAT = "cotune canaries 1"
MAX_TIMES = 10_000
MAX_PLANTED = 1_000_000
# What a stream of random numbers from the seed is for.
_SECRETS, _PLACES, _CANDIDATES = 0, 1, 2
_WORDS = (
    "apple arrow autumn badge basin beach berry blanket bottle branch bridge bronze button cabin candle canyon castle "
    "cedar chapel cherry circle cliff clover comet copper cotton crane crystal desert dragon ember falcon feather "
    "forest fountain garden glacier guitar hammer harbor hazel island ivory jungle kettle ladder lantern lemon marble "
    "meadow mirror needle ocean olive orchid paper pepper pillow planet ribbon river saddle silver thunder"
)
SYMBOLS = {"digits": tuple("0123456789"), "words": tuple(_WORDS.split())}


@dataclass(frozen=True, kw_only=True)
class SecretSpace:
    """R: all sequences of so many symbols, with a space before each.

    Attributes:
        kind: a key of `SYMBOLS`.
        length: symbols of a secret.

    Example:
        >>> SecretSpace(kind="digits", length=4).size, SecretSpace(kind="digits", length=4).secret(1203)
        (10000, ' 1 2 0 3')
    """

    kind: str = "digits"
    length: int = 6

    def __post_init__(self) -> None:
        if self.kind not in SYMBOLS:
            raise InputError(f"kind is {self.kind!r}, expected one of {', '.join(SYMBOLS)}")
        if not 1 <= self.length <= 16:
            raise InputError(f"length is {self.length}, expected 1 to 16 symbols")

    @property
    def size(self) -> int:
        """|R|."""
        return int(len(SYMBOLS[self.kind]) ** self.length)

    @property
    def bits(self) -> float:
        """log2 |R|, the largest exposure."""
        return math.log2(self.size)

    def secret(self, number: int) -> str:
        """Secret number `number`, 0 to size - 1."""
        symbols, parts = SYMBOLS[self.kind], []
        for _ in range(self.length):
            number, last = divmod(number, len(symbols))
            parts.append(symbols[last])
        return "".join(f" {part}" for part in reversed(parts))

    def holds(self, secret: str) -> bool:
        """Whether it is one of these secrets."""
        parts = secret.split(" ")
        return parts[0] == "" and len(parts) == self.length + 1 and set(parts[1:]) <= set(SYMBOLS[self.kind])

    def draw(self, generator: np.random.Generator) -> str:
        """One of them, each as likely as any other."""
        symbols = SYMBOLS[self.kind]
        return "".join(f" {symbols[index]}" for index in generator.integers(len(symbols), size=self.length))


@dataclass(frozen=True, kw_only=True)
class Canary:
    """One planted text.

    Attributes:
        prompt: what comes before the secret; no two canaries share one.
        secret: with a space in front.
        times: copies in the training texts; 0 for one that is left out, to compare with.
    """

    prompt: str
    secret: str
    times: int

    def example(self, secret: str | None = None) -> Example:
        """As a text to train on or to judge; with another secret, a candidate."""
        return Example(self.prompt, self.secret if secret is None else secret)


class _CanaryRecord(TypedDict):
    prompt: str
    secret: str
    times: Count


class _SpaceRecord(TypedDict):
    kind: str
    length: Count


class _ManifestRecord(TypedDict):
    format: str
    seed: int
    space: _SpaceRecord
    canaries: list[_CanaryRecord]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Which canaries are in a set of texts.

    Attributes:
        seed: that secrets and places come from.
        space: of the secrets.
        canaries: all of them.
    """

    seed: int
    space: SecretSpace
    canaries: tuple[Canary, ...]

    def without_canaries(self, examples: Sequence[Example]) -> list[Example]:
        """The real texts among the training texts."""
        prompts = {canary.prompt for canary in self.canaries}
        return [example for example in examples if example.prompt not in prompts]

    def candidates(self, canary: Canary, num_candidates: int) -> list[str]:
        """Other secrets to rank it among: the whole space without it if that is no more, else so many, all different.

        Raises:
            InputError: fewer than one.
        """
        if num_candidates < 1:
            raise InputError(f"num_candidates is {num_candidates}, expected at least 1")
        if num_candidates >= self.space.size - 1:
            every = map(self.space.secret, range(self.space.size))
            return [secret for secret in every if secret != canary.secret]
        generator = np.random.default_rng((self.seed, _CANDIDATES, self.canaries.index(canary)))
        drawn: dict[str, None] = {}
        while len(drawn) < num_candidates:
            secret = self.space.draw(generator)
            if secret != canary.secret:
                drawn[secret] = None
        return list(drawn)

    def save(self, path: Path) -> None:
        """Write it as JSON.

        Raises:
            InputError: the file cannot be written.
        """
        record = {"format": FORMAT, **asdict(self)}
        try:
            path.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"the canary manifest {path} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, damaged, or says what cannot be.
        """
        try:
            record: Any = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"the canary manifest cannot be read ({error.strerror})", path=path) from error
        except ValueError as error:
            raise DataError(f"the canary manifest is no JSON ({error})", path=path) from error
        try:
            check_type(record, _ManifestRecord, "the canary manifest")
            if record["format"] != FORMAT:
                raise InputError(f"format is {record['format']!r}, expected {FORMAT!r}")
            space = SecretSpace(**record["space"])
            canaries = tuple(Canary(**each) for each in record["canaries"])
            _check_canaries(canaries, space)
        except InputError as error:
            raise DataError(str(error), path=path) from error
        return cls(seed=record["seed"], space=space, canaries=canaries)


def plant(
    examples: Sequence[Example], times: Sequence[int], *, space: SecretSpace, seed: int, num_each: int = 1
) -> tuple[list[Example], Manifest]:
    """Add canaries to training texts, at random places.

    Args:
        examples: the real texts; canaries take the form of their prompts where that is the built-in model's.
        times: how often each kind of canary is repeated, such as (1, 4, 16). One that is left out (0) is added to each
            plan, to compare with.
        space: of the secrets.
        seed: of secrets and places.
        num_each: canaries for each of these.

    Returns:
        The texts with canaries, and which canaries these are.

    Raises:
        InputError: no texts, no times, an impossible one, or too many canaries.

    Example:
        >>> texts, manifest = plant([Example("Hello", " there")], (2,), space=SecretSpace(length=3), seed=0)
        >>> len(texts), [canary.times for canary in manifest.canaries]
        (3, [0, 2])
    """
    if not examples:
        raise InputError("there are no texts to plant canaries in, expected at least one")
    if not times or not all(1 <= each <= MAX_TIMES for each in times):
        raise InputError(f"times is {list(times)}, expected numbers from 1 to {MAX_TIMES:,}, such as 1 4 16")
    if num_each < 1:
        raise InputError(f"num_each is {num_each}, expected at least 1")
    num_planted = num_each * (1 + sum(set(times)))
    if num_planted > MAX_PLANTED:
        raise InputError(
            f"num_each is {num_each:,} and times {list(times)}, {num_planted:,} canaries in all, expected at most "
            f"{MAX_PLANTED:,}; give fewer of either"
        )
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more")
    generator = np.random.default_rng((seed, _SECRETS))
    around = common_prompt_format(examples)
    plan = [each for each in (0, *sorted(set(times))) for _ in range(num_each)]
    canaries = tuple(
        Canary(
            prompt=around.replace("{prompt}", f"The secret code of locker {number} is"),
            secret=space.draw(generator),
            times=each,
        )
        for number, each in enumerate(plan, start=1)
    )
    taken = {example.prompt for example in examples}
    if clash := next((canary.prompt for canary in canaries if canary.prompt in taken), None):
        raise InputError(f"the texts have the prompt {clash!r} already; plant canaries in the texts without canaries")
    texts = [*examples, *(canary.example() for canary in canaries for _ in range(canary.times))]
    order = np.random.default_rng((seed, _PLACES)).permutation(len(texts))
    return [texts[index] for index in order], Manifest(seed=seed, space=space, canaries=canaries)


def exposure_bits(secret_nats: float, candidate_nats: Sequence[float] | NDArray[np.float64]) -> float:
    """How far a planted secret stands out among others, in bits; see this module's head.

    Candidates exactly as likely count half, so that a model without any preference exposes one bit at most.

    Args:
        secret_nats: -log p of the planted secret.
        candidate_nats: -log p of other secrets behind the same prompt.

    Raises:
        InputError: no candidates, or a value that is not finite.

    Example:
        >>> exposure_bits(2.0, [1.0, 3.0, 4.0])  # second of four
        1.0
    """
    others = np.asarray(candidate_nats, np.float64)
    if others.ndim != 1 or not len(others):
        raise InputError("candidate_nats is empty, expected at least one other secret")
    if not (math.isfinite(secret_nats) and np.isfinite(others).all()):
        raise InputError("a likelihood is nan or inf, expected finite nats; look at the model")
    rank = 1 + int((others < secret_nats).sum()) + int((others == secret_nats).sum()) / 2
    return math.log2(len(others) + 1) - math.log2(rank)


def _check_canaries(canaries: Sequence[Canary], space: SecretSpace) -> None:
    if not canaries:
        raise InputError("the canary manifest names no canaries, expected at least one")
    if len({canary.prompt for canary in canaries}) < len(canaries):
        raise InputError("two canaries share a prompt, expected a different one for each")
    for canary in canaries:
        if not space.holds(canary.secret):
            raise InputError(f"the secret {canary.secret!r} is not of {space.length} {space.kind}")
