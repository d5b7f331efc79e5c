"""Costs and price tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotune.errors import DataError, InputError
from cotune.sandwich.cost import Cost, Price, most_tokens_in, read_prices


def test_costs_add_up_by_field() -> None:
    total = sum([Cost(calls=1, tokens_in=2, tokens_out=3, usd=0.5), Cost(calls=1, tokens_in=10)], Cost())
    assert total == Cost(calls=2, tokens_in=12, tokens_out=3, usd=0.5) and total.tokens == 15


def test_a_price_is_for_a_million_tokens() -> None:
    # 2,000 tokens at 3 dollars a million and 100 at 15: 0.006 + 0.0015.
    assert Price(usd_per_million_in=3, usd_per_million_out=15).of(2000, 100) == pytest.approx(0.0075)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "3", True])
def test_prices_that_cannot_be_are_refused(value: object) -> None:
    with pytest.raises(InputError, match="usd_per_million_in"):
        Price(usd_per_million_in=value)  # type: ignore[arg-type]


def test_a_table_is_read_by_model(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"m": {"usd_per_million_in": 1, "usd_per_million_out": 2}}))
    assert read_prices(path) == {"m": Price(usd_per_million_in=1, usd_per_million_out=2)}


@pytest.mark.parametrize("text", ["[1]", "{", '{"m": 3}', '{"m": {"usd": 3}}', '{"m": {"usd_per_million_in": -3}}'])
def test_what_is_no_table_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "prices.json").write_text(text)
    with pytest.raises(DataError, match=r"prices\.json"):
        read_prices(tmp_path / "prices.json")


def test_a_token_is_a_byte_at_least() -> None:
    assert most_tokens_in("é€".encode()) >= 5


@pytest.mark.parametrize("fields", [{}, {"calls": 1.5, "tokens_in": 0, "tokens_out": 0, "usd": 0}, {"calls": -1}])
def test_what_is_no_cost_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InputError, match="is no cost"):
        Cost.from_fields(fields)
