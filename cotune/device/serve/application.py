"""The whole application: interface, page, what the page asks besides, and the guards around all of it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cotune import __version__
from cotune.device.serve.guards import Guards
from cotune.device.serve.page_files import PAGE_PATHS, page_routes
from cotune.device.serve.personal_source import PersonalSource
from cotune.generation.modes import MODES
from cotune.generation.request import ANSWERS, SCHEDULES
from cotune.openai_api.api_error import ApiError
from cotune.openai_api.bearer import BearerTokens
from cotune.openai_api.routes import ApiLimits, OpenAiApi

Totals = Callable[[], dict[str, dict[str, int]]]


def make_application(
    source: PersonalSource,
    totals: Totals,
    *,
    hosts: Collection[str],
    tokens: BearerTokens | None = None,
    limits: ApiLimits | None = None,
) -> Guards:
    """The application for an ASGI server.

    Args:
        source: makes the texts.
        totals: what has left the device so far, by kind; `EgressLedger.totals`.
        hosts: values of `Host` that mean us.
        tokens: who may use it; None lets every local program in.
        limits: what one client may ask for.
    """

    async def show_ledger(http: Request) -> Response:
        kinds = totals()
        return JSONResponse({"kinds": kinds, "bytes": sum(total["bytes"] for total in kinds.values())})

    async def show_info(http: Request) -> Response:
        return JSONResponse(info(source))

    routes = [
        *OpenAiApi(source, limits).routes,
        Route("/cotune/info", show_info, methods=["GET"]),
        Route("/cotune/ledger", show_ledger, methods=["GET"]),
        *page_routes(),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_such_page})
    return Guards(app, hosts=hosts, tokens=tokens, open_paths=PAGE_PATHS)


def info(source: PersonalSource) -> dict[str, object]:
    """What the page needs to know: names, what can be chosen, and what is chosen where nobody does."""
    plugin, defaults, cloud = source.device.plugin, source.defaults, source.cloud
    has_gate = source.device.personal.gate is not None
    modes = [mode for mode in MODES.values() if mode.family == plugin.family and (has_gate or not mode.is_gated)]
    return {
        "model": source.card.id,
        "version": __version__,
        "cloud": None if cloud is None else {"model": cloud.model, "max_context": cloud.max_context},
        "plugin": {"num_parameters": plugin.num_parameters, "family": plugin.family, "has_gate": has_gate},
        "modes": [mode.name for mode in modes],
        "schedules": [name for name in SCHEDULES if has_gate or name != "gated"],
        "answers": list(ANSWERS),
        "defaults": {
            "mode": defaults.mode,
            "schedule": defaults.schedule,
            "answer": defaults.answer,
            "max_tokens": defaults.max_new_tokens,
            "temperature": defaults.sampling.temperature,
            "seed": defaults.sampling.seed,
        },
    }


async def _no_such_page(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"there is no {http.method} {http.url.path!r:.80} here; see docs/device_serve.md for what there is"
    response = ApiError(message, status=error.status_code, code="not_found").response()
    response.headers.update(error.headers or {})
    return response
