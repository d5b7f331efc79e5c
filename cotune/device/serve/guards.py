"""Whose requests are heard: our own page and local programs, not other web pages, and holders of a token.

A service on loopback is within reach of every page in the user's browser. Three things keep these out:

- The `Host` must be one of our names. A page whose name was re-bound to 127.0.0.1 still sends its own (DNS rebinding).
- An `Origin` that is not ours, and a `Sec-Fetch-Site` other than `same-origin` or `none`, is refused.
- POST takes `application/json` alone (`openai_api/body.py`), which no plain form can send.
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cotune.openai_api.api_error import ApiError
from cotune.openai_api.bearer import BearerTokens

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def allowed_hosts(port: int, *, secure: bool, extra: Collection[str] = ()) -> frozenset[str]:
    """The values of `Host` that mean us.

    Args:
        port: where we listen.
        secure: over TLS.
        extra: more names, with or without a port of their own.

    Example:
        >>> sorted(allowed_hosts(7071, secure=False))
        ['127.0.0.1:7071', '[::1]:7071', 'localhost:7071']
    """
    is_default = port == (443 if secure else 80)
    names = [f"{name}:{port}" for name in (*LOOPBACK_NAMES, *extra)]
    names += [*extra, *(LOOPBACK_NAMES if is_default else ())]
    return frozenset(name.lower() for name in names)


class Guards:
    """Middleware that refuses what does not come from us, and adds the security headers to every answer.

    Args:
        app: what is guarded.
        hosts: values of `Host` that mean us; see `allowed_hosts`.
        tokens: who may use the interface; None lets every local program in.
        open_paths: what a browser may load without a token: the page's own files, which hold no secret.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str],
        tokens: BearerTokens | None = None,
        open_paths: Collection[str] = (),
    ) -> None:
        self._app = app
        self._hosts = frozenset(hosts)
        self._tokens = tokens
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no WebSocket is offered here, and none is accepted

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = self.refusal(Headers(scope=scope), scope["scheme"], scope["path"])
        if refusal is not None:
            await refusal.response()(scope, receive, send_safely)
            return
        await self._app(scope, receive, send_safely)

    def refusal(self, headers: Headers, scheme: str, path: str) -> ApiError | None:
        """Why this request is not heard; None where it is."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return ApiError(
                f"the Host {', '.join(hosts)!r:.80} is not a name of this service; use http://localhost with its "
                "port, or start it with --allow-host NAME",
                status=403,
                code="host_not_allowed",
            )
        origins = headers.getlist("origin")
        if origins and origins != [f"{scheme}://{hosts[0]}"]:
            return ApiError(
                f"the request comes from another page ({', '.join(origins)!r:.80}); only the page of this service "
                "and programs without a browser are heard",
                status=403,
                code="origin_not_allowed",
            )
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return ApiError(
                "the request comes from another site; type the address of this service into the browser yourself",
                status=403,
                code="cross_site",
            )
        if self._tokens is None or path in self._open_paths:
            return None
        if not self._tokens.admits(headers.getlist("authorization")):
            return ApiError(
                "a valid token is needed; send it as `Authorization: Bearer TOKEN` (the API key of most clients)",
                status=401,
                code="invalid_api_key",
            )
        return None
