"""What one generation cost and who decided it: the numbers of `metrics.json` and of `--json`.

Words: a token's *source* is "device" where the device's answer made it another token than the backbone alone
would have emitted at that place, "local" where an offline model wrote it while the cloud was out of reach, else
"cloud". A token was *consulted* where the side network entered its
decision (sigma = 1). M counts blocking round trips, the only ones that anybody waits for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, TypeAlias, get_type_hints

from cotune.errors import InputError
from cotune.evaluation.schema import Count, Quantity, Share, check_keys, check_type

Source: TypeAlias = Literal["cloud", "device", "local"]

_WEIGHTED_BY_TOKENS = (
    "M",
    "consult_rate",
    "disagree_rate",
    "bytes_down_per_token",
    "bytes_up_per_token",
    "cloud_ms_per_token",
    "device_ms_per_token",
    "stall_ms_per_token",
)


@dataclass(frozen=True, kw_only=True)
class GenerationMetrics:
    """One generation, token by token and on the whole. Everything per token is 0 where there is no token.

    Raises:
        InputError: a value of another type or outside its range, lists that do not have one entry for each
            token, or a token that the device changed without being consulted.
    """

    mode: str
    """What the output is: integration, separation, ladder or spa; base where there is no plugin."""
    schedule: str
    """Who waits for whom: blocking, gated, optimistic, drafted or auto; local where all runs in one process."""
    answer: str
    """The form of the device's answer: token or correction; none where nothing is asked."""
    seed: int
    """Seed of the session's sampling noise."""
    num_tokens: Count
    """How many tokens were generated."""
    token_ids: tuple[int, ...]
    """The generated tokens."""
    text: str
    """What they decode to."""
    tokens: tuple[str, ...]
    """The piece of text of each token, for colouring."""
    sources: tuple[Source, ...]
    """Who decided each token."""
    consulted: tuple[bool, ...]
    """Whether the side network had a say in each token (sigma = 1)."""
    M: Quantity
    """Blocking round trips per token."""
    consult_rate: Share
    """Share of tokens with sigma = 1."""
    disagree_rate: Share
    """q: share of tokens where the personal and the base token differ."""
    bytes_down_per_token: Quantity
    """Bytes from the cloud to the device per token, frame headers included."""
    bytes_up_per_token: Quantity
    """Bytes from the device to the cloud per token, frame headers included."""
    wasted_cloud_steps: Count
    """Cloud steps whose token was rolled back."""
    cloud_ms_per_token: Quantity
    """Time that the cloud computed per token, ms."""
    device_ms_per_token: Quantity
    """Time that the device computed per token, ms."""
    stall_ms_per_token: Quantity
    """Time that the cloud waited for the device per token, ms."""
    tokens_per_s: Quantity
    """Tokens per second of wall time."""
    certificate_misses: Count
    """How often the top-k logits did not prove the token and more were asked for."""
    late: tuple[int, ...] = ()
    """Which tokens, counted from 0, the cloud decided alone because the device was late."""
    drafted: Count = 0
    """Tokens that the device drafted and the cloud read."""
    drafts_kept: Count = 0
    """Those of them that became the text."""

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            check_type(getattr(self, name), hint, name)
        for name in ("token_ids", "tokens", "sources", "consulted"):
            if (length := len(getattr(self, name))) != self.num_tokens:
                raise InputError(f"{name} has {length} entries, expected num_tokens = {self.num_tokens}")
        if any(not 0 <= position < self.num_tokens for position in self.late):
            raise InputError(f"late is {list(self.late)}, expected positions of {self.num_tokens} tokens")
        if self.drafts_kept > self.drafted:
            raise InputError(f"drafts_kept is {self.drafts_kept}, expected at most drafted = {self.drafted}")
        for position, (source, asked) in enumerate(zip(self.sources, self.consulted, strict=True)):
            if source == "device" and not asked:
                raise InputError(
                    f"sources[{position}] is 'device' and consulted[{position}] is false, "
                    "expected that the device changes only tokens it was consulted on"
                )

    @classmethod
    def from_counts(
        cls,
        *,
        mode: str,
        schedule: str,
        answer: str,
        seed: int,
        token_ids: Sequence[int],
        text: str,
        tokens: Sequence[str],
        sources: Sequence[Source],
        consulted: Sequence[bool],
        blocking_trips: int,
        bytes_down: int,
        bytes_up: int,
        wasted_cloud_steps: int,
        cloud_s: float,
        device_s: float,
        stall_s: float,
        wall_s: float,
        certificate_misses: int,
        late: Sequence[int] = (),
        drafted: int = 0,
        drafts_kept: int = 0,
    ) -> GenerationMetrics:
        """From the totals of one generation; the one place that turns them into rates.

        `consult_rate` is the share of `consulted`, `disagree_rate` the share of "device" in `sources`.

        Raises:
            InputError: as the class, or tokens that took no time.
        """
        num_tokens = len(token_ids)
        if num_tokens and not wall_s > 0.0:
            raise InputError(f"wall_s is {wall_s} for {num_tokens} tokens, expected a time above 0")
        per_token = 1.0 / num_tokens if num_tokens else 0.0
        return cls(
            mode=mode,
            schedule=schedule,
            answer=answer,
            seed=seed,
            num_tokens=num_tokens,
            token_ids=tuple(int(token_id) for token_id in token_ids),
            text=text,
            tokens=tuple(tokens),
            sources=tuple(sources),
            consulted=tuple(bool(asked) for asked in consulted),
            M=blocking_trips * per_token,
            consult_rate=min(1.0, sum(map(bool, consulted)) * per_token),
            disagree_rate=min(1.0, sum(source == "device" for source in sources) * per_token),
            bytes_down_per_token=bytes_down * per_token,
            bytes_up_per_token=bytes_up * per_token,
            wasted_cloud_steps=wasted_cloud_steps,
            cloud_ms_per_token=1000.0 * cloud_s * per_token,
            device_ms_per_token=1000.0 * device_s * per_token,
            stall_ms_per_token=1000.0 * stall_s * per_token,
            tokens_per_s=num_tokens / wall_s if num_tokens else 0.0,
            certificate_misses=certificate_misses,
            late=tuple(late),
            drafted=drafted,
            drafts_kept=drafts_kept,
        )

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> GenerationMetrics:
        """What `to_dict` gave, as from a JSON file.

        Raises:
            InputError: a key missing or unknown, or a value that does not fit.
        """
        names = {field.name for field in fields(cls)}
        required = frozenset(field.name for field in fields(cls) if field.default is MISSING)
        check_keys(record, names, required, "generation")
        values: dict[str, Any] = {
            name: tuple(item) if isinstance(item, list) else item for name, item in record.items()
        }
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the keys in the order of the fields."""
        return _to_plain(self)


@dataclass(frozen=True, kw_only=True)
class AggregateMetrics:
    """Several generations of one mode, schedule and answer form; fields mean what they mean for one."""

    mode: str
    schedule: str
    answer: str
    num_generations: Count
    """How many generations."""
    num_tokens: Count
    """Tokens of all of them."""
    M: Quantity
    consult_rate: Share
    disagree_rate: Share
    bytes_down_per_token: Quantity
    bytes_up_per_token: Quantity
    wasted_cloud_steps: Count
    """Sum over the generations."""
    cloud_ms_per_token: Quantity
    device_ms_per_token: Quantity
    stall_ms_per_token: Quantity
    tokens_per_s: Quantity
    """All tokens over the sum of the wall times."""
    certificate_misses: Count
    """Sum over the generations."""
    num_late: Count
    """Sum over the generations."""
    drafted: Count
    """Sum over the generations."""
    drafts_kept: Count
    """Sum over the generations."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the keys in the order of the fields."""
        return _to_plain(self)


def aggregate_generations(generations: Sequence[GenerationMetrics]) -> AggregateMetrics:
    """Mean over tokens, not over generations: a long text weighs more than a short one.

    A rate r becomes sum(n_i r_i) / sum(n_i) with n_i tokens each; tokens_per_s becomes
    sum(n_i) / sum(n_i / tokens_per_s_i); wasted steps and misses add up.

    Raises:
        InputError: no generation, or generations that differ in mode, schedule or answer form.
    """
    if not generations:
        raise InputError("generations is empty, expected at least one generation")
    kinds = sorted({(one.mode, one.schedule, one.answer) for one in generations})
    if len(kinds) > 1:
        raise InputError(
            f"generations mix (mode, schedule, answer) {', '.join(map(str, kinds))}, "
            "expected one of a kind; aggregate each kind by itself"
        )
    num_tokens = sum(one.num_tokens for one in generations)
    weights = [one.num_tokens / num_tokens if num_tokens else 0.0 for one in generations]
    rates = {
        name: sum(weight * float(getattr(one, name)) for weight, one in zip(weights, generations, strict=True))
        for name in _WEIGHTED_BY_TOKENS
    }
    for name in ("consult_rate", "disagree_rate"):
        rates[name] = min(1.0, rates[name])  # the weights may sum to a rounding error above 1
    mode, schedule, answer = kinds[0]
    return AggregateMetrics(
        mode=mode,
        schedule=schedule,
        answer=answer,
        num_generations=len(generations),
        num_tokens=num_tokens,
        tokens_per_s=_joint_rate(generations),
        wasted_cloud_steps=sum(one.wasted_cloud_steps for one in generations),
        certificate_misses=sum(one.certificate_misses for one in generations),
        num_late=sum(len(one.late) for one in generations),
        drafted=sum(one.drafted for one in generations),
        drafts_kept=sum(one.drafts_kept for one in generations),
        **rates,
    )


def _joint_rate(generations: Sequence[GenerationMetrics]) -> float:
    written = [one for one in generations if one.num_tokens]
    if not written or any(one.tokens_per_s == 0.0 for one in written):
        return 0.0
    return sum(one.num_tokens for one in written) / sum(one.num_tokens / one.tokens_per_s for one in written)


def _to_plain(metrics: GenerationMetrics | AggregateMetrics) -> dict[str, Any]:
    return {name: list(item) if isinstance(item, tuple) else item for name, item in asdict(metrics).items()}


@lru_cache(maxsize=1)
def _hints() -> dict[str, Any]:
    return get_type_hints(GenerationMetrics, include_extras=True)
