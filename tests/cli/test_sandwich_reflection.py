"""Who reflects, by the options: keys that stay where they belong, prices, and what does not go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cotune.cli.sandwich_reflection import ReflectionOptions, open_reflection
from cotune.errors import InputError
from cotune.sandwich.cost import Price
from cotune.sandwich.openai_cloud import OpenAiCloud
from cotune.sandwich.prompts.reflection import CloudReflection

URL = "http://127.0.0.1:9/v1"


def options(**given: Any) -> ReflectionOptions:
    nothing = dict.fromkeys(("model", "cloud", "key_variable", "prices", "other_prices"))
    return ReflectionOptions(**{**nothing, "is_here": False, **given})


def secret_of(given: ReflectionOptions) -> str:
    with open_reflection(given) as reflection:
        assert isinstance(reflection, CloudReflection) and isinstance(reflection.cloud, OpenAiCloud)
        return reflection.cloud._secret


def test_the_key_of_the_cloud_that_answers_goes_to_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    other = options(model="m", cloud=URL)
    monkeypatch.setenv("COTUNE_CLOUD_KEY", "sk-first")
    monkeypatch.delenv("COTUNE_REFLECT_KEY", raising=False)
    assert secret_of(other) == ""
    monkeypatch.setenv("COTUNE_REFLECT_KEY", "sk-second")
    assert secret_of(other) == "sk-second"
    monkeypatch.setenv("MY_KEY", "sk-third")
    assert secret_of(options(model="m", cloud=URL, key_variable="MY_KEY")) == "sk-third"
    with pytest.raises(InputError, match="--reflect-key-env is NO_KEY"):
        secret_of(options(model="m", cloud=URL, key_variable="NO_KEY"))
    with pytest.raises(InputError, match="not encrypted"):
        secret_of(options(model="m", cloud="http://example.org/v1"))


def test_prices_of_its_own_come_first(tmp_path: Path) -> None:
    own, other = tmp_path / "own.json", tmp_path / "other.json"
    own.write_text(json.dumps({"m": {"usd_per_million_in": 1}}))
    other.write_text(json.dumps({"m": {"usd_per_million_in": 2}}))
    with open_reflection(options(model="m", prices=own, other_prices=other)) as reflection:
        assert reflection == CloudReflection(model="m", price=Price(usd_per_million_in=1))
    assert options(model="m", other_prices=other).price() == Price(usd_per_million_in=2)
    assert options(model="m").price() is None
    with open_reflection(options(other_prices=other)) as reflection:
        assert reflection is None
    with pytest.raises(InputError, match="no price of 'n'"):
        options(model="n", other_prices=other).check(is_growing=True, has_edge=False)


@pytest.mark.parametrize(
    ("given", "is_growing", "told"),
    [
        ({"model": "m"}, False, "--reflect-model is given without --grow-every"),
        ({"is_here": True}, False, "--reflect-edge is given without --grow-every"),
        ({"is_here": True}, True, "--reflect-edge is given without --edge"),
        ({"is_here": True, "model": "m"}, True, "--reflect-edge and --reflect-model are both given"),
        ({"cloud": URL}, True, "--reflect-cloud is given without --reflect-model"),
        ({"prices": Path("p.json")}, True, "--reflect-prices is given without --reflect-model"),
        ({"model": "m", "key_variable": "K"}, True, "--reflect-key-env is given without --reflect-cloud"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], is_growing: bool, told: str) -> None:
    with pytest.raises(InputError, match=told):
        options(**given).check(is_growing=is_growing, has_edge=False)


def test_what_goes_together_is_taken() -> None:
    options().check(is_growing=False, has_edge=False)
    options(is_here=True).check(is_growing=True, has_edge=True)
    options(model="m", cloud=URL, key_variable="K").check(is_growing=True, has_edge=False)
