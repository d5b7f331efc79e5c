"""The routes of the OpenAI interface over any `TextSource`."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cotune.errors import CotuneError, InputError
from cotune.openai_api.answers import Answer, model_list, model_object
from cotune.openai_api.api_error import ApiError, api_error
from cotune.openai_api.body import MIB, read_json
from cotune.openai_api.event_stream import DONE, ClientGoneError, EventStream, event, until_disconnect
from cotune.openai_api.requests import CompletionRequest, parse_chat, parse_text
from cotune.openai_api.source import Finish, ModelCard, Piece, TextSource
from cotune.openai_api.stop_text import cut_at_stops

_LOG = logging.getLogger(__name__)

# nginx's number for a client that hung up; nobody reads it.
_CLIENT_CLOSED_REQUEST = 499

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, kw_only=True)
class ApiLimits:
    """What one client may ask for.

    Attributes:
        max_concurrent: texts made at once; one more is answered with 429.
        max_body_bytes: of a request.
        body_timeout_s: for a request's body to come, seconds.
        send_timeout_s: for a client to take the next event, seconds.
        retry_after_s: when to come back, where all places are taken, seconds.
    """

    max_concurrent: int = 8
    max_body_bytes: int = 4 * MIB
    body_timeout_s: float = 30.0
    send_timeout_s: float = 60.0
    retry_after_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_concurrent", "max_body_bytes", "body_timeout_s", "send_timeout_s", "retry_after_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected a number above 0")


class OpenAiApi:
    """The interface: give its `routes` to a Starlette application.

    Args:
        source: makes the texts.
        limits: what one client may ask for.

    Example:
        >>> app = Starlette(routes=OpenAiApi(source).routes)   # doctest: +SKIP
    """

    def __init__(self, source: TextSource, limits: ApiLimits | None = None) -> None:
        self._source = source
        self._limits = limits or ApiLimits()
        self._num_running = 0

    @property
    def num_running(self) -> int:
        """Texts being made."""
        return self._num_running

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", answering(self._list_models), methods=["GET"]),
            Route("/v1/models/{model:path}", answering(self._show_model), methods=["GET"]),
            Route("/v1/chat/completions", answering(self._chat), methods=["POST"]),
            Route("/v1/completions", answering(self._text), methods=["POST"]),
        ]

    async def _list_models(self, http: Request) -> Response:
        return JSONResponse(model_list(self._source.models()))

    async def _show_model(self, http: Request) -> Response:
        return JSONResponse(model_object(self._card(http.path_params["model"])))

    async def _chat(self, http: Request) -> Response:
        return await self._complete(http, parse_chat)

    async def _text(self, http: Request) -> Response:
        return await self._complete(http, parse_text)

    async def _complete(self, http: Request, parse: Callable[[object], CompletionRequest]) -> Response:
        limits = self._limits
        request = parse(await read_json(http, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s))
        self._card(request.model)
        answer, items = Answer(request), self._items(request)
        if not request.stream:
            pieces, finish = await until_disconnect(http.receive, _collect(items))
            return JSONResponse(answer.whole(pieces, finish))
        try:
            # What fails before there is any text still gets a status of its own.
            first = await until_disconnect(http.receive, _first(items))
        except BaseException:
            await items.aclose()
            raise
        return EventStream(_events(answer, first, items), send_timeout_s=limits.send_timeout_s)

    async def _items(self, request: CompletionRequest) -> AsyncGenerator[Piece | Finish, None]:
        with self._place():
            source = self._source.complete(request)
            async with aclosing(source), aclosing(cut_at_stops(source, request.stop)) as items:
                async for item in items:
                    yield item

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._num_running >= self._limits.max_concurrent:
            raise ApiError(
                f"{self._num_running} texts are being made, which is all that run at once; try again soon",
                status=429,
                code="too_many_requests",
                retry_after_s=self._limits.retry_after_s,
            )
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1

    def _card(self, model: str) -> ModelCard:
        cards = self._source.models()
        for card in cards:
            if card.id == model:
                return card
        raise ApiError(
            f"model is {model!r:.80}, expected {' or '.join(repr(card.id) for card in cards)}",
            status=404,
            param="model",
            code="model_not_found",
        )


def answering(endpoint: Callable[[Request], Coroutine[Any, Any, Response]]) -> Endpoint:
    """The same endpoint, whose errors become error objects."""

    async def answer(http: Request) -> Response:
        try:
            return await endpoint(http)
        except ClientGoneError:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        except CotuneError as error:
            return api_error(error).response()
        except Exception:
            return _bug().response()

    return answer


async def _first(items: AsyncGenerator[Piece | Finish, None]) -> Piece | Finish:
    return await anext(items)


async def _collect(items: AsyncGenerator[Piece | Finish, None]) -> tuple[list[Piece], Finish]:
    pieces: list[Piece] = []
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Finish):
                return pieces, item
            pieces.append(item)
    raise AssertionError("a source ended without a Finish")


async def _events(
    answer: Answer, first: Piece | Finish, items: AsyncGenerator[Piece | Finish, None]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(items):
        try:
            opening = answer.opening()
            if opening is not None:
                yield event(opening)
            item = first
            while isinstance(item, Piece):
                yield event(answer.piece(item))
                item = await anext(items)
            for chunk in answer.closing(item):
                yield event(chunk)
        except CotuneError as error:
            yield event(api_error(error).body())
        except Exception:
            yield event(_bug().body())
        yield DONE


def _bug() -> ApiError:
    _LOG.exception("a request failed by a bug")
    return ApiError("something went wrong here; see the log of the server", status=500, code="internal_error")
