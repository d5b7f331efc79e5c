"""What asking a cloud costs: calls, tokens, and dollars by a price table that the user gives."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune.errors import DataError, InputError

MAX_TABLE_BYTES = 1 << 20
# A conversation's template around its messages, and a system message that a server may put in front.
_TEMPLATE_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What was paid, or what will be paid at most.

    Attributes:
        calls: requests that were sent, those that failed included.
        tokens_in, tokens_out: that the cloud read and wrote.
        usd: dollars.

    Example:
        >>> Cost(calls=1, tokens_in=10) + Cost(calls=1, usd=0.5)
        Cost(calls=2, tokens_in=10, tokens_out=0, usd=0.5)
    """

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    usd: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            calls=self.calls + other.calls,
            tokens_in=self.tokens_in + other.tokens_in,
            tokens_out=self.tokens_out + other.tokens_out,
            usd=self.usd + other.usd,
        )

    @property
    def tokens(self) -> int:
        """In and out."""
        return self.tokens_in + self.tokens_out

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Cost:
        """A cost as JSON holds it.

        Raises:
            InputError: it is none.
        """
        try:
            counts = [fields[name] for name in ("calls", "tokens_in", "tokens_out")]
            usd = float(fields["usd"])
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{fields!r:.100} is no cost, expected calls, tokens_in, tokens_out and usd") from None
        if not all(type(count) is int and count >= 0 for count in counts) or not (math.isfinite(usd) and usd >= 0):
            raise InputError(f"{fields!r:.100} is no cost, expected whole numbers and dollars of 0 or more")
        return cls(calls=counts[0], tokens_in=counts[1], tokens_out=counts[2], usd=usd)


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a model's tokens cost.

    Attributes:
        usd_per_million_in, usd_per_million_out: dollars for a million tokens that it reads, and that it writes.

    Example:
        >>> Price(usd_per_million_in=1.0, usd_per_million_out=4.0).of(1000, 500)
        0.003
    """

    usd_per_million_in: float = 0.0
    usd_per_million_out: float = 0.0

    def __post_init__(self) -> None:
        for name in ("usd_per_million_in", "usd_per_million_out"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"{name} is {value!r:.40}, expected dollars of 0 or more")

    def of(self, tokens_in: int, tokens_out: int) -> float:
        """Dollars for so many tokens."""
        return (tokens_in * self.usd_per_million_in + tokens_out * self.usd_per_million_out) / 1e6


def shown_usd(usd: float) -> str:
    """Dollars behind other counts; nothing where there are none, since that mostly means that no price is known.

    Example:
        >>> "3 calls" + shown_usd(0.25), "3 calls" + shown_usd(0)
        ('3 calls, $0.2500', '3 calls')
    """
    return f", ${usd:.4f}" if usd else ""


def most_tokens_in(payload: bytes) -> int:
    """No tokenizer makes more tokens of a request: each stands for a byte of it at least.

    Names of fields and quotes travel with each message and are no tokens, which makes up for a template's marks.
    """
    return len(payload) + _TEMPLATE_TOKENS


def read_prices(path: Path) -> dict[str, Price]:
    """A price table, by the name of the model.

        {"some-model": {"usd_per_million_in": 0.15, "usd_per_million_out": 0.60}}

    Raises:
        DataError: the file is no such table.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TABLE_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from None
    if len(data) > MAX_TABLE_BYTES:
        raise DataError(f"has more than {MAX_TABLE_BYTES} bytes, expected a price table", path=path)
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError("is no JSON, expected a price table", path=path) from None
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise DataError("expected an object with an object for each model", path=path)
    prices = {}
    for model, row in rows.items():
        try:
            prices[model] = Price(**row)
        except (TypeError, InputError) as error:
            raise DataError(
                f"the price of {model!r:.80}: {error}; expected usd_per_million_in and usd_per_million_out", path=path
            ) from None
    return prices
