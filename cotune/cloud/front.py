"""The cloud's door: sessions over WebSocket, the OpenAI interface, health and metrics, in one ASGI application.

    /                       WebSocket: sessions of devices, in cotune's frames
    /v1/chat/completions, /v1/completions, /v1/models
                            the plain backbone, for any OpenAI client
    /healthz                ok, or 503 while draining; needs no token
    /metrics                Prometheus text

Where tokens are asked for, everything but `/healthz` needs one. No web page may reach a cloud: what a browser sends is
refused.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from cotune.cloud.asgi_connection import AsgiConnection
from cotune.cloud.metrics import CONTENT_TYPE, render_metrics
from cotune.cloud.plain_source import PlainSource
from cotune.cloud.service import CloudService
from cotune.errors import CotuneError, RefusedError
from cotune.openai_api.api_error import ApiError, api_error
from cotune.openai_api.bearer import BearerTokens
from cotune.openai_api.plain_chat import plain_chat_format
from cotune.openai_api.routes import ApiLimits, OpenAiApi
from cotune.openai_api.source import ChatFormat

_OPEN_PATHS = ("/healthz",)
# Headers that browsers send and programs do not.
_BROWSER_HEADERS = ("origin", "sec-fetch-site")
# Where the door leaves the name of who came in.
_OWNER = "cotune.owner"
# Answers of the OpenAI interface are counted by these.
_API = "/v1/"

logger = logging.getLogger("cotune.cloud")


@dataclass(frozen=True, kw_only=True)
class FrontConfig:
    """What the front offers.

    Attributes:
        tokens: who is let in; None lets everybody in, and limits for each token hold for all together.
        max_connections: of devices; one more is refused.
        api: limits of the OpenAI interface.
        chat_format: makes a prompt of a conversation.
    """

    tokens: BearerTokens | None = None
    max_connections: int = 128
    api: ApiLimits = field(default_factory=lambda: ApiLimits(max_concurrent=64))
    chat_format: ChatFormat = plain_chat_format


def front(service: CloudService, config: FrontConfig | None = None) -> ASGIApp:
    """The application for an ASGI server.

    Args:
        service: answers the devices, and computes for all.
        config: what is offered, and to whom.
    """
    config = config or FrontConfig()
    num_devices = 0

    async def session(websocket: WebSocket) -> None:
        nonlocal num_devices
        if num_devices >= config.max_connections:
            service.note_refusal("connections")
            await _deny(websocket, PlainTextResponse("too many connections\n", 503))
            return
        num_devices += 1
        try:
            await websocket.accept()
            await service.handle(AsgiConnection(websocket), websocket.scope[_OWNER])
        except WebSocketDisconnect:
            return  # before it was let in
        finally:
            num_devices -= 1

    async def health(http: Request) -> Response:
        return PlainTextResponse("draining\n", 503) if service.is_draining else PlainTextResponse("ok\n")

    async def metrics(http: Request) -> Response:
        return Response(render_metrics(service), media_type=CONTENT_TYPE)

    api = OpenAiApi(PlainSource(service, config.chat_format), config.api)
    routes = [
        WebSocketRoute("/", session),
        Route("/healthz", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        *api.routes,
    ]
    return _Door(Starlette(routes=routes), service, config.tokens)


class _Door:
    """Lets in who may come in, and counts the answers that they get."""

    def __init__(self, app: ASGIApp, service: CloudService, tokens: BearerTokens | None) -> None:
        self._app = app
        self._service = service
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        is_api = scope["type"] == "http" and scope["path"].startswith(_API)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._service.note_answer(message["status"])
            await send(message)

        answer = counted if is_api else send
        try:
            with ExitStack() as places:
                try:
                    scope[_OWNER] = owner = self._owner(HTTPConnection(scope))
                    if is_api and scope["method"] == "POST":
                        places.enter_context(self._service.text_place(owner))
                except CotuneError as error:
                    await self._refuse(_as_api_error(error), scope, receive, answer)
                else:
                    await self._app(scope, receive, answer)
        except Exception:
            # The server would say nothing of it.
            logger.exception("a request failed by a bug")
            raise

    def _owner(self, connection: HTTPConnection) -> str:
        """A name for who asks, empty where everybody may.

        Raises:
            ApiError: nobody who may come in.
        """
        if any(name in connection.headers for name in _BROWSER_HEADERS):
            raise ApiError("no web page may use this cloud; use a program", status=403, code="browser")
        if self._tokens is None or connection.scope["path"] in _OPEN_PATHS:
            return ""
        owner = self._tokens.holder(connection.headers.getlist("authorization"))
        if owner is None:
            raise ApiError("a valid bearer token is needed", status=401, code="invalid_api_key")
        return owner

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.note_refusal(error.code or "request")
        if scope["type"] == "websocket":
            await _deny(WebSocket(scope, receive, send), error.response())
        else:
            await error.response()(scope, receive, send)


def _as_api_error(error: CotuneError) -> ApiError:
    if isinstance(error, RefusedError) and error.retry_after_s is not None:
        return ApiError(error.reason, status=429, code="rate_limit_exceeded", retry_after_s=error.retry_after_s)
    return api_error(error)


async def _deny(websocket: WebSocket, response: Response) -> None:
    # uvicorn says the length itself; until 0.49 it says it beside ours, and a head with two lengths is no answer.
    del response.headers["content-length"]
    with suppress(WebSocketDisconnect):
        await websocket.send_denial_response(response)
