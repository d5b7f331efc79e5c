"""Prompt templates."""

from __future__ import annotations


def format_request(request: str) -> str:
    """The prompt of the built-in model for one request; the answer follows after a space.

    Example:
        >>> format_request("Hello!")
        'User: Hello!\\nAssistant:'
    """
    return f"User: {request}\nAssistant:"


def format_answer(answer: str) -> str:
    """The target that follows `format_request`."""
    return f" {answer}"
