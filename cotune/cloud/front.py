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

from dataclasses import dataclass, field
from hashlib import sha256

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from cotune.cloud.metrics import CONTENT_TYPE, render_metrics
from cotune.cloud.plain_source import PlainSource, plain_chat_format
from cotune.cloud.service import CloudService
from cotune.cloud.session_app import AsgiConnection
from cotune.errors import RefusedError
from cotune.openai_api.api_error import ApiError
from cotune.openai_api.bearer import BearerTokens
from cotune.openai_api.routes import ApiLimits, OpenAiApi
from cotune.openai_api.source import ChatFormat

_OPEN_PATHS = ("/healthz",)
# Headers that browsers send and programs do not.
_BROWSER_HEADERS = ("origin", "sec-fetch-site")


@dataclass(frozen=True, kw_only=True)
class FrontConfig:
    """What the front offers.

    Attributes:
        tokens: who is let in; None lets everybody in.
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

    async def session(websocket: WebSocket) -> None:
        if service.num_connections >= config.max_connections:
            service.note_refusal("connections")
            await websocket.send_denial_response(PlainTextResponse("too many connections\n", 503))
            return
        await websocket.accept()
        await service.handle(AsgiConnection(websocket), _owner(websocket))

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
    """Lets in who may come in."""

    def __init__(self, app: ASGIApp, service: CloudService, tokens: BearerTokens | None) -> None:
        self._app = app
        self._service = service
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        error = self._refusal(HTTPConnection(scope))
        if error is None:
            await self._app(scope, receive, send)
            return
        self._service.note_refusal(error.code or "request")
        if scope["type"] == "websocket":
            websocket = WebSocket(scope, receive, send)
            await websocket.send_denial_response(error.response())
        else:
            await error.response()(scope, receive, send)

    def _refusal(self, connection: HTTPConnection) -> ApiError | None:
        path = connection.url.path
        if any(name in connection.headers for name in _BROWSER_HEADERS):
            return ApiError("no web page may use this cloud; use a program", status=403, code="browser")
        if path in _OPEN_PATHS:
            return None
        if self._tokens is not None and not self._tokens.admits(connection.headers.getlist("authorization")):
            return ApiError("a valid bearer token is needed", status=401, code="invalid_api_key")
        if path.startswith("/v1/") and connection.scope.get("method") == "POST":
            try:
                self._service.check_rate(_owner(connection))
            except RefusedError as error:
                return ApiError(error.reason, status=429, code="rate_limit_exceeded", retry_after_s=error.retry_after_s)
        return None


def _owner(connection: HTTPConnection) -> str:
    """Whose connection it is, for limits: a digest of the token, which itself is kept nowhere."""
    header = connection.headers.get("authorization", "")
    return sha256(header.encode(errors="surrogateescape")).hexdigest()[:16] if header else ""
