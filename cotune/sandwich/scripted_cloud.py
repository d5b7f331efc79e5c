"""A cloud that answers by a script, over real HTTP on loopback: to try a pipeline or a fit without paying anybody.

A script is a list of rules; the first whose pattern is found in the messages answers:

    [{"if": "capital of (\\\\w+)", "say": "Ask an atlas about \\\\1."},
     {"if": "", "say": "I do not know."}]

`if` is a regular expression over the contents of all messages, one a line; `say` may name its groups.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cotune.errors import DataError, InputError

MAX_BODY_BYTES = 16 << 20
MODEL = "scripted"
_SOCKET_TIMEOUT_S = 30.0
_PIECE_CHARS = 3

Answer = Callable[[Mapping[str, Any]], "Reply | str"]
"""From the body of a chat request to what is answered."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer that is more than a text.

    Attributes:
        text: of the message.
        tool_calls: in the form of the API.
        status: of HTTP; another than 200 makes it an error.
        headers: beside the usual ones.
    """

    text: str = ""
    tool_calls: Sequence[Mapping[str, Any]] = ()
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ScriptedServer:
    """A server at work.

    Attributes:
        base_url: with /v1.
        bodies: of the requests that came, as bytes.
    """

    base_url: str
    bodies: list[bytes]


def read_script(path: Path) -> Answer:
    """The rules of a file.

    Raises:
        DataError: it holds none.
    """
    try:
        rules = json.loads(path.read_bytes()[:MAX_BODY_BYTES])
        compiled = [(re.compile(rule["if"], re.IGNORECASE), rule["say"]) for rule in rules]
        if not compiled or not all(isinstance(say, str) for _, say in compiled):
            raise TypeError
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from None
    except (ValueError, TypeError, KeyError, RecursionError, re.error):
        raise DataError(
            'is no script, expected a list of rules such as {"if": "hello", "say": "Hi!"}', path=path
        ) from None

    def answer(body: Mapping[str, Any]) -> str:
        text = "\n".join(str(message.get("content") or "") for message in body["messages"])
        for pattern, say in compiled:
            if found := pattern.search(text):
                return found.expand(say)
        return "I do not know."

    return answer


@contextmanager
def scripted_server(answer: Answer, *, port: int = 0) -> Iterator[ScriptedServer]:
    """Serve on loopback until the block ends.

    Args:
        answer: makes each answer, in a thread of its own.
        port: 0 for any free one.

    Raises:
        InputError: the port is taken.

    Example:
        >>> with scripted_server(lambda body: "Hello!") as server:
        ...     print(server.base_url.startswith("http://127.0.0.1:"))
        True
    """
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        timeout = _SOCKET_TIMEOUT_S
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if not 0 <= length <= MAX_BODY_BYTES:
                return self.send_error(413)
            data = self.rfile.read(length)
            bodies.append(data)
            try:
                body = json.loads(data)
                if not all(isinstance(message, dict) for message in body["messages"]):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                return self.send_error(400)
            said = answer(body)
            return self._reply(body, Reply(text=said) if isinstance(said, str) else said)

        def _reply(self, body: Mapping[str, Any], reply: Reply) -> None:
            if body.get("stream") and reply.status == 200:
                return self._write(200, "text/event-stream", events(body, reply), reply.headers)
            text = json.dumps(completion(body, reply) if reply.status == 200 else {"error": {"message": reply.text}})
            return self._write(reply.status, "application/json", text, reply.headers)

        def _write(self, status: int, kind: str, text: str, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that hung up is no news."""

    try:
        server = Server(("127.0.0.1", port), Handler)
    except OSError as error:
        raise InputError(f"port {port} cannot be opened on loopback: {error.strerror}; choose another") from None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="scripted cloud")
    thread.start()
    try:
        yield ScriptedServer(f"http://127.0.0.1:{server.server_port}/v1", bodies)
    finally:
        server.shutdown()
        thread.join(timeout=30)
        server.server_close()


def events(body: Mapping[str, Any], reply: Reply) -> str:
    """The events of a streamed completion, one for each three letters, so that placeholders are cut."""
    whole = completion(body, reply)
    size = _PIECE_CHARS
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": reply.text[start : start + size]}}]}
        for start in range(0, len(reply.text), size)
    ]
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({"choices": [], "usage": whole["usage"]})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def completion(body: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    """The object of a chat completion; tokens are words."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.tool_calls:
        message["tool_calls"] = list(reply.tool_calls)
    read = sum(len(str(each.get("content") or "").split()) for each in body["messages"])
    written = len(reply.text.split())
    return {
        "id": "chatcmpl-scripted",
        "object": "chat.completion",
        "created": 0,
        "model": str(body.get("model")),
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }
