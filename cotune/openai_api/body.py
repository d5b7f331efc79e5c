"""The JSON body of a request, read with a limit on its size and its time."""

from __future__ import annotations

import asyncio
import json
from typing import NoReturn

from starlette.requests import ClientDisconnect, Request

from cotune.openai_api.api_error import ApiError
from cotune.openai_api.event_stream import ClientGoneError

MIB = 1024 * 1024


async def read_json(request: Request, *, max_bytes: int = 4 * MIB, timeout_s: float = 30.0) -> object:
    """The value in the body.

    Only `application/json` is taken: a page of another origin cannot send that without being asked for leave first.

    Raises:
        ApiError: another content type, too large, too slow, or no JSON.
        ClientGoneError: the client hung up in the middle.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            f"the Content-Type is {content_type!r:.60}, expected application/json", status=415, code="content_type"
        )
    announced = request.headers.get("content-length", "0")
    if not announced.isascii() or not announced.isdigit() or int(announced[:20]) > max_bytes:
        raise _too_large(max_bytes)
    data = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                if len(data) + len(chunk) > max_bytes:
                    raise _too_large(max_bytes)
                data += chunk
    except TimeoutError:
        raise ApiError(f"the body did not come within {timeout_s:g} s", status=408, code="timeout") from None
    except ClientDisconnect:
        raise ClientGoneError from None
    try:
        return json.loads(data.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ApiError("the body is no JSON in UTF-8, expected a JSON object", code="invalid_json") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        f"the body is larger than {max_bytes} bytes; shorten the conversation", status=413, code="body_too_large"
    )
