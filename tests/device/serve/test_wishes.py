"""What a request comes to: its own fields, those of the `cotune` object, the defaults."""

from __future__ import annotations

from typing import Any

import pytest

from cotune.device.runtime import GenerationOptions
from cotune.device.serve.wishes import OfflineOptions, offline_options_for, options_for
from cotune.errors import CotuneError, InputError
from cotune.generation.sampling import Sampling
from cotune.openai_api.requests import CompletionRequest

DEFAULTS = GenerationOptions(mode="spa", schedule="gated", max_new_tokens=9, sampling=Sampling(top_p=0.5, seed=4))


def options(extension: dict[str, Any] | None = None, **fields: Any) -> GenerationOptions:
    return options_for(CompletionRequest(form="chat", model="m", extension=extension or {}, **fields), DEFAULTS)


def test_who_says_nothing_gets_the_defaults() -> None:
    assert options() == DEFAULTS


def test_the_fields_of_openai_go_before_the_defaults_and_ours_before_both() -> None:
    made = options(max_tokens=5, temperature=0.5, top_p=0.8, seed=7, stop=("x",))
    assert made.max_new_tokens == 5 and made.stop_strings == ("x",)
    assert made.sampling == Sampling(temperature=0.5, top_p=0.8, seed=7)
    ours = {
        "mode": "integration",
        "schedule": "blocking",
        "answer": "token",
        "top_k": 8,
        "window": 3,
        "max_tokens": 6,
        "temperature": 1,
        "top_p": 1,
        "seed": 0,
    }
    made = options(ours, max_tokens=5, temperature=0.5, top_p=0.8, seed=7)
    assert made == GenerationOptions(
        mode="integration",
        schedule="blocking",
        answer="token",
        top_k=8,
        window=3,
        max_new_tokens=6,
        sampling=Sampling(temperature=1.0, top_p=1.0, seed=0),
    )


def test_a_default_deadline_does_not_forbid_the_token_form() -> None:
    request = CompletionRequest(form="chat", model="m", extension={"answer": "token"})
    defaults = GenerationOptions(deadline_ms=50)
    assert options_for(request, defaults).deadline_ms == 0
    assert options_for(CompletionRequest(form="chat", model="m"), defaults).deadline_ms == 50


def test_a_sampled_text_without_a_seed_gets_a_fresh_one_that_is_told() -> None:
    seeds = {options(temperature=1.0).sampling.seed for _ in range(5)}
    assert len(seeds) == 5 and max(seeds) < 2**53


@pytest.mark.parametrize(
    ("extension", "words"),
    [
        ({"mode": "mine"}, "cotune.mode is 'mine', expected one of integration"),
        ({"mode": ["spa"]}, "cotune.mode is"),
        ({"schedule": "soon"}, "cotune.schedule is 'soon', expected one of blocking"),
        ({"answer": 3}, "cotune.answer is 3, expected one of token, correction"),
        ({"top_k": 0}, "cotune.top_k is 0, expected an integer from 1 to 4096"),
        ({"window": 1025}, "cotune.window"),
        ({"max_tokens": "9"}, "cotune.max_tokens"),
        ({"temperature": 3}, "cotune.temperature is 3, expected a number from 0 to 2"),
        ({"deadline_ms": 50, "answer": "token"}, "deadline_ms is 50 with answer token"),
        ({"seed": 2**64}, "cotune.seed"),
        ({"sede": 1}, "'cotune.sede' is not known here"),
    ],
)
def test_what_is_wrong_is_named(extension: dict[str, Any], words: str) -> None:
    with pytest.raises(CotuneError, match=words.replace(".", r"\.")):
        options(extension)


def offline(extension: dict[str, Any] | None = None, **fields: Any) -> OfflineOptions:
    defaults = OfflineOptions(max_new_tokens=9, sampling=Sampling(top_p=0.5, seed=4))
    return offline_options_for(CompletionRequest(form="chat", model="m", extension=extension or {}, **fields), defaults)


def test_an_offline_model_takes_the_wishes_that_need_no_cloud() -> None:
    assert offline() == OfflineOptions(max_new_tokens=9, sampling=Sampling(top_p=0.5, seed=4))
    made = offline({"max_tokens": 6, "temperature": 1}, max_tokens=5, temperature=0.5, seed=7, stop=("x",))
    sampling = Sampling(temperature=1.0, top_p=0.5, seed=7)
    assert made == OfflineOptions(max_new_tokens=6, sampling=sampling, stop_strings=("x",))
    assert offline(temperature=1.0).sampling.seed != offline(temperature=1.0).sampling.seed
    with pytest.raises(CotuneError, match=r"'cotune\.schedule' is not known here"):
        offline({"schedule": "blocking"})
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        OfflineOptions(max_new_tokens=0)
