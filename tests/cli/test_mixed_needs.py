"""What both classes of `mixed` need is looked up where devices' memory alone is given."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import tiny_backbone

from cotune.cli.mixed_needs import with_needs
from cotune.federation.settings import DataSettings, FederationSettings


def asked(options: dict[str, Any]) -> FederationSettings:
    return FederationSettings(algorithm="mixed", data=DataSettings(max_length=48), options=options)


def test_what_is_left_out_comes_from_the_model_and_what_is_given_stays() -> None:
    backbone = tiny_backbone("llama")
    whole: Any = with_needs(asked({"mixed": {"memory_bytes": {"*": 1}}}), backbone, "float32").options["mixed"]
    assert whole["lora_bytes"] > whole["seed_bytes"] > 450_000_000 and whole["memory_bytes"] == {"*": 1}
    half = with_needs(asked({"mixed": {"memory_bytes": {"*": 1}, "seed_bytes": 7}}), backbone, "float32")
    assert half.options["mixed"] == {**whole, "seed_bytes": 7}
    other: Any = with_needs(asked({"mixed": {"memory_bytes": {"*": 1}}}), backbone, "bfloat16").options["mixed"]
    assert other["seed_bytes"] != whole["seed_bytes"], "numbers of another type"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixed": {}},
        {"mixed": {"classes": {"*": "seed"}}},
        {"mixed": 3},
        {"mixed": {"memory_bytes": {"*": 1}, "lora_bytes": 9, "seed_bytes": 7}},
    ],
)
def test_where_nothing_is_missing_nothing_is_looked_up(options: dict[str, Any]) -> None:
    class NoModel:
        """Nobody asks it."""

    settings = asked(options)
    assert with_needs(settings, NoModel(), "float32") is settings  # type: ignore[arg-type]
