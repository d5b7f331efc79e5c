"""What a request wants of the device: the fields of OpenAI, those of the `cotune` object, and the defaults."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from typing import TypeVar

from cotune.device.runtime import GenerationOptions
from cotune.errors import InputError
from cotune.generation.modes import MODES
from cotune.generation.request import ANSWERS, SCHEDULES
from cotune.generation.sampling import Sampling
from cotune.openai_api.fields import Fields
from cotune.openai_api.requests import EXTENSION, MAX_TEMPERATURE, CompletionRequest

T = TypeVar("T")

MAX_TOP_K = 4096
MAX_WINDOW = 1024
MAX_DEADLINE_MS = 60_000


def options_for(request: CompletionRequest, defaults: GenerationOptions) -> GenerationOptions:
    """How to make the text of `request`.

    A field in the `cotune` object goes before the one of OpenAI, and this before the default. A sampled text
    without a seed gets one that nobody chose, as with OpenAI.

    Raises:
        ApiError: a field of the `cotune` object is unknown, of another type, or out of range.
        InputError: a combination that is not possible.
    """
    fields = Fields(dict(request.extension), EXTENSION)
    own = {
        "mode": fields.choice("mode", MODES),
        "schedule": fields.choice("schedule", SCHEDULES),
        "answer": fields.choice("answer", ANSWERS),
        "top_k": fields.integer("top_k", 1, MAX_TOP_K),
        "window": fields.integer("window", 1, MAX_WINDOW),
        "deadline_ms": fields.integer("deadline_ms", 0, MAX_DEADLINE_MS),
        "max_new_tokens": _max_new_tokens(fields, request),
    }
    sampling = _sampling(fields, request, defaults.sampling)
    fields.finish()
    if own["answer"] == "token" and own["deadline_ms"] is None:
        # A deadline that is only the default does not forbid the form in which nobody can go on alone.
        own["deadline_ms"] = 0
    chosen = {name: value for name, value in own.items() if value is not None}
    return replace(defaults, sampling=sampling, stop_strings=request.stop, **chosen)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class OfflineOptions:
    """How an offline model writes.

    Attributes:
        max_new_tokens: stop after this many.
        sampling: greedy or sampled.
        stop_strings: the text ends before the first of these.
    """

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.max_new_tokens <= 2**31 - 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}, expected 1 to {2**31 - 1}")


def offline_options_for(request: CompletionRequest, defaults: OfflineOptions) -> OfflineOptions:
    """As `options_for`, of what an offline model alone can be asked for.

    Raises:
        ApiError: as there; modes, schedules and answers need a cloud.
    """
    fields = Fields(dict(request.extension), EXTENSION)
    wanted = _max_new_tokens(fields, request)
    sampling = _sampling(fields, request, defaults.sampling)
    fields.finish()
    return OfflineOptions(
        max_new_tokens=defaults.max_new_tokens if wanted is None else wanted,
        sampling=sampling,
        stop_strings=request.stop,
    )


def _max_new_tokens(fields: Fields, request: CompletionRequest) -> int | None:
    return _first(fields.integer("max_tokens", 1, 2**31 - 1), request.max_tokens)


def _sampling(fields: Fields, request: CompletionRequest, known: Sampling) -> Sampling:
    temperature = _first(fields.number("temperature", 0, MAX_TEMPERATURE), request.temperature)
    top_p = _first(fields.number("top_p", 0.001, 1), request.top_p)
    seed = _first(fields.integer("seed", 0, 2**64 - 1), request.seed)
    sampling = replace(
        known,
        temperature=known.temperature if temperature is None else temperature,
        top_p=known.top_p if top_p is None else top_p,
        seed=known.seed if seed is None else seed,
    )
    if seed is None and not sampling.is_greedy:
        # Below 2^53, so that JavaScript can send it again.
        sampling = replace(sampling, seed=secrets.randbelow(2**53))
    return sampling


def _first(wanted: T | None, otherwise: T | None) -> T | None:
    return otherwise if wanted is None else wanted
