"""Any OpenAI-compatible cloud, through the official client: OpenAI's own, a vendor's, or `cotune cloud` on loopback.

The client is told not to try again (`cotune.sandwich.cloud_gate` does, with a budget) and not to follow redirects,
which would carry the text to another host.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cotune.errors import ConnectionLostError, InputError, RefusedError, WireError, WireTimeoutError, first_line
from cotune.sandwich.chat import ChatAnswer, ChatRequest
from cotune.sandwich.streamed_answer import StreamedAnswer
from cotune.wire.websocket import is_loopback

if TYPE_CHECKING:
    import openai

MAX_ANSWER_BYTES = 16 << 20
_OUT_OF_MONEY = "insufficient_quota"
_PAYMENT_REQUIRED = 402


@dataclass(frozen=True)
class ApiKey:
    """A secret, which no `repr` shows. Read it from the environment."""

    value: str = field(repr=False)

    def __post_init__(self) -> None:
        if not self.value or not self.value.isascii() or any(letter.isspace() for letter in self.value):
            raise InputError("the API key is empty or holds spaces or letters beyond ASCII; look at the variable")


class OpenAiCloud:
    """A cloud at a base URL.

    Args:
        base_url: such as `http://127.0.0.1:7070/v1`.
        key: None for a cloud that asks for none.
        max_answer_bytes: of one answer; more is an error.

    Raises:
        InputError: the URL cannot be used, or `openai` is not installed.

    Example:
        >>> cloud = OpenAiCloud("http://127.0.0.1:7070/v1")  # doctest: +SKIP
        >>> cloud.send(request, timeout_s=60).text  # doctest: +SKIP
    """

    def __init__(self, base_url: str, key: ApiKey | None = None, *, max_answer_bytes: int = MAX_ANSWER_BYTES) -> None:
        check_base_url(base_url)
        try:
            import openai
        except ImportError:
            raise InputError(
                "asking a cloud needs the package openai; install it with: pip install 'cotune[sandwich]'"
            ) from None
        self._max_answer_bytes = max_answer_bytes
        self._secret = key.value if key else ""
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=self._secret or "none",
            max_retries=0,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )

    def send(self, request: ChatRequest, *, timeout_s: float) -> ChatAnswer:
        """Ask once; see `CloudModel`. An answer that drips in is cut off after `timeout_s` and one more wait."""
        with self._translated(timeout_s):
            with closing(self._pieces(request, timeout_s)) as pieces:
                data = b"".join(pieces)
            try:
                completion = json.loads(data)
            except (ValueError, RecursionError):
                raise WireError("the cloud's answer is no JSON; see what the server at that URL speaks") from None
            return ChatAnswer.from_completion(completion)

    def stream(self, request: ChatRequest, *, timeout_s: float, on_text: Callable[[str], None]) -> ChatAnswer:
        """Ask once and tell the text piece by piece; see `StreamingCloud`."""
        streamed = StreamedAnswer()
        with self._translated(timeout_s), closing(self._pieces(request, timeout_s)) as pieces:
            for piece in pieces:
                for text in streamed.feed(piece):
                    on_text(text)
            return streamed.finish()

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    @contextmanager
    def _translated(self, timeout_s: float) -> Iterator[None]:
        """Inside, errors of the client become ours."""
        import openai

        try:
            yield
        except openai.APITimeoutError:
            raise WireTimeoutError(_late(timeout_s)) from None
        except openai.APIStatusError as error:
            raise self._refusal(error) from None
        except openai.APIConnectionError as error:
            raise ConnectionLostError(
                f"the cloud cannot be reached ({self._told(error)}); see the URL and the network"
            ) from None
        except openai.OpenAIError as error:
            raise WireError(f"the cloud's answer cannot be read ({self._told(error)})") from None

    def _pieces(self, request: ChatRequest, timeout_s: float) -> Generator[bytes]:
        """The bytes of the answer as they come; neither their number nor their time is without bound."""
        ends, num_bytes = time.monotonic() + timeout_s, 0
        create = self._client.chat.completions.with_streaming_response.create
        with create(**request.body(), timeout=timeout_s) as response:
            pieces = response.iter_bytes()
            while piece := self._next_piece(pieces, timeout_s):
                num_bytes += len(piece)
                if num_bytes > self._max_answer_bytes:
                    raise WireError(f"the cloud's answer has more than {self._max_answer_bytes} bytes")
                if time.monotonic() > ends:
                    raise WireTimeoutError(_late(timeout_s))
                yield piece

    def _next_piece(self, pieces: Iterator[bytes], timeout_s: float) -> bytes:
        """The next bytes, none at the end; errors of the body are those of whichever HTTP library the client has."""
        try:
            return next(pieces, b"")
        except Exception as error:
            if "timeout" in type(error).__name__.casefold():
                raise WireTimeoutError(_late(timeout_s)) from None
            raise ConnectionLostError(f"the connection to the cloud broke ({self._told(error)})") from None

    def _refusal(self, error: openai.APIStatusError) -> RefusedError:
        status = _PAYMENT_REQUIRED if error.code == _OUT_OF_MONEY else error.status_code
        return RefusedError(
            status,
            f"the cloud refused with status {error.status_code} ({self._told(error)})",
            retry_after_s=retry_after_s(error.response.headers.get("retry-after")),
        )

    def _told(self, error: BaseException) -> str:
        """What a server says may repeat the key that it was sent."""
        told = first_line(error)
        return told.replace(self._secret, "[key]") if self._secret else told


def check_base_url(url: str) -> None:
    """Refuse a URL that would send texts and keys in the clear over a network.

    Raises:
        InputError: as said, or it is no URL of this kind.

    Example:
        >>> check_base_url("http://127.0.0.1:7070/v1")
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError:
        parts, host = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"the cloud's URL is {url!r:.200}, expected one such as https://host/v1")
    if parts.username is not None:
        raise InputError("the cloud's URL holds a user name or password; give the key in an environment variable")
    if parts.scheme == "http" and not is_loopback(host):
        raise InputError(f"the cloud's URL is {url!r:.200}, which is not encrypted; expected https outside of loopback")


def retry_after_s(header: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks to wait; None where it says no number.

    Example:
        >>> retry_after_s("2"), retry_after_s("soon")
        (2.0, None)
    """
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < 1e6 else None


def _late(timeout_s: float) -> str:
    return f"the cloud gave no answer within {timeout_s:g} s; raise the time-out, or ask for fewer tokens"
