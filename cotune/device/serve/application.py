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
from cotune.device.serve.source import DeviceSource
from cotune.openai_api.api_error import ApiError
from cotune.openai_api.bearer import BearerTokens
from cotune.openai_api.routes import ApiLimits, OpenAiApi

Totals = Callable[[], dict[str, dict[str, int]]]


def make_application(
    source: DeviceSource,
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
        return JSONResponse({"model": source.card.id, "version": __version__, **source.info()})

    routes = [
        *OpenAiApi(source, limits).routes,
        Route("/cotune/info", show_info, methods=["GET"]),
        Route("/cotune/ledger", show_ledger, methods=["GET"]),
        *page_routes(),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_such_page})
    return Guards(app, hosts=hosts, tokens=tokens, open_paths=PAGE_PATHS)


async def _no_such_page(http: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"there is no {http.method} {http.url.path!r:.80} here; see docs/device_serve.md for what there is"
    response = ApiError(message, status=error.status_code, code="not_found").response()
    response.headers.update(error.headers or {})
    return response
