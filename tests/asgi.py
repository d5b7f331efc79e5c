"""Asks an ASGI application without a socket."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The values of a stream, the last one `[DONE]`."""
        lines = self.body.decode().split("\n\n")
        assert lines.pop() == "" and all(line.startswith("data: ") for line in lines)
        return [json.loads(line[6:]) if line != "data: [DONE]" else "[DONE]" for line in lines]


async def ask(
    app: ASGIApp,
    method: str,
    path: str,
    body: object = None,
    *,
    headers: dict[str, str] | None = None,
    raw: bytes | None = None,
    hang_up_after_s: float | None = None,
) -> Reply:
    """One request; the client hangs up after a while if asked to."""
    data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
    sent: dict[str, str] = {"host": "localhost:7071"}
    if body is not None or raw is not None:
        sent["content-type"] = "application/json"
    sent.update(headers or {})
    messages: list[Message] = []
    pieces = [data[i : i + 65_536] for i in range(0, max(1, len(data)), 65_536)]

    async def receive() -> Message:
        if pieces:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}
        await asyncio.sleep(3600 if hang_up_after_s is None else hang_up_after_s)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 7071),
    }
    async with asyncio.timeout(20):
        await app(scope, receive, send)
    if not messages:
        return Reply(0, {}, b"")
    start = messages[0]
    return Reply(
        start["status"],
        {name.decode().lower(): value.decode() for name, value in start["headers"]},
        b"".join(message.get("body", b"") for message in messages[1:]),
    )
