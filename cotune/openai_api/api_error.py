"""Errors as clients of the OpenAI interface expect them: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import math
from http import HTTPStatus

from starlette.responses import JSONResponse

from cotune.errors import (
    CotuneError,
    InputError,
    MismatchError,
    RefusedError,
    WireError,
    WireTimeoutError,
)


class ApiError(CotuneError):
    """A request that is answered with an error.

    Args:
        message: one sentence for people.
        status: HTTP status.
        param: the field of the request that is wrong, where it is one.
        code: a word for programs.
        retry_after_s: when trying again may help, seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.status = HTTPStatus(status)
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        super().__init__(message)

    @property
    def type(self) -> str:
        """The kind of error, by its status."""
        if self.status == HTTPStatus.UNAUTHORIZED:
            return "authentication_error"
        if self.status == HTTPStatus.FORBIDDEN:
            return "permission_error"
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"

    def body(self) -> dict[str, dict[str, str | None]]:
        """The error object."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def api_error(error: CotuneError) -> ApiError:
    """What a client is told where making the text failed with `error`.

    Example:
        >>> api_error(WireTimeoutError("nothing came within 30 s")).status.value
        504
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError) and not isinstance(error, MismatchError):
        return ApiError(str(error), code="invalid_value")
    if isinstance(error, RefusedError) and error.retry_after_s is not None:
        return ApiError(str(error), status=503, code="cloud_busy", retry_after_s=error.retry_after_s)
    if isinstance(error, WireTimeoutError):
        return ApiError(str(error), status=504, code="cloud_timeout")
    if isinstance(error, WireError | MismatchError):
        return ApiError(str(error), status=502, code="cloud_error")
    return ApiError(str(error), status=500, code="internal_error")
