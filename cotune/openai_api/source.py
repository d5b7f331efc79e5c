"""What the routes ask of whatever makes the text, and what it hands back piece by piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cotune.openai_api.requests import CompletionRequest, Message

ChatFormat = Callable[[Sequence[Message]], str]
"""Makes one prompt of a conversation."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """One entry of `/v1/models`.

    Attributes:
        id: the name that requests give.
        created: seconds since 1970.
        owned_by: for people.
    """

    id: str
    created: int
    owned_by: str


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A token that could have come instead, natural logarithm of its probability included."""

    text: str
    logprob: float


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one token adds to the text.

    Attributes:
        text: its text; empty for tokens in the middle of a character.
        token_id: the token; None for text that belongs to none.
        logprob: natural logarithm of its probability; None where that is not known.
        alternatives: the likeliest tokens at this place, where they were asked for and are known.
        extra: goes into the streamed chunk as its `cotune` object.
    """

    text: str
    token_id: int | None = None
    logprob: float | None = None
    alternatives: tuple[Alternative, ...] = ()
    extra: Mapping[str, object] | None = None


@dataclass(frozen=True, kw_only=True)
class Finish:
    """The end of a text, after its last piece.

    Attributes:
        reason: `stop` for an end token or a stop string, `length` where max_tokens cut it.
        num_prompt_tokens, num_completion_tokens: usage.
        extra: goes into the last chunk, or into the answer, as its `cotune` object.
    """

    reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_completion_tokens: int
    extra: Mapping[str, object] | None = None


class TextSource(Protocol):
    """Makes text."""

    def models(self) -> Sequence[ModelCard]:
        """What can be asked for by name."""
        ...

    def complete(self, request: CompletionRequest) -> AsyncGenerator[Piece | Finish, None]:
        """The pieces of one text as they come, then one `Finish`. Closing the generator ends the work on it.

        A source ends the text itself at a stop string; whether the pieces still hold it does not matter, the
        routes cut it off.

        Raises:
            CotuneError: the request cannot be served; where this comes before the first piece, it becomes the
                HTTP status.
        """
        ...
