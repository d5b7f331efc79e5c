"""A conversation as plain text, for a model that has no chat template."""

from __future__ import annotations

from collections.abc import Sequence

from cotune.openai_api.requests import Message


def plain_chat_format(messages: Sequence[Message]) -> str:
    """A conversation for a model that was not trained on any: a line for each turn, and whose turn it is.

    Example:
        >>> plain_chat_format([Message(role="user", content="Hello")])
        'User: Hello\\nAssistant:'
    """
    return "".join(f"{message.role.capitalize()}: {message.content}\n" for message in messages) + "Assistant:"
