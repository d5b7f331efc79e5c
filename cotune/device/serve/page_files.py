"""The chat page: a handful of files of the package, as they are."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/chat.css": ("chat.css", "text/css; charset=utf-8"),
    "/chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "/conversation.js": ("conversation.js", "text/javascript; charset=utf-8"),
    "/panel.js": ("panel.js", "text/javascript; charset=utf-8"),
    "/events.js": ("events.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
PAGE_PATHS = tuple(_FILES)


def page_routes() -> list[Route]:
    """A route for each file, which is read once."""
    folder = files("cotune.device.serve") / "page"
    return [_route(path, (folder / name).read_bytes(), kind) for path, (name, kind) in _FILES.items()]


def _route(path: str, content: bytes, kind: str) -> Route:
    async def send_file(http: Request) -> Response:
        # Asked for anew each time: after an update of cotune old and new files would not fit together.
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return Route(path, send_file, methods=["GET"])
