"""A cloud for tests: a scripted answer from memory, and the scripted server of `cotune.sandwich.scripted_cloud`."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cotune.errors import WireError
from cotune.sandwich.chat import ChatAnswer, ChatRequest


class MemoryCloud:
    """Answers by a function of the last message; fails as often as it is told to.

    Attributes:
        requests: what came.
        failures: raised in turn before anything is answered.
        under: what is answered under a prompt, whatever is asked.
    """

    def __init__(self, answer: Callable[[str], str | ChatAnswer] = lambda text: f"echo {text}") -> None:
        self.answer = answer
        self.requests: list[ChatRequest] = []
        self.timeouts: list[float] = []
        self.failures: list[WireError] = []
        self.under: dict[str, str] = {}
        self._lock = threading.Lock()

    def send(self, request: ChatRequest, *, timeout_s: float) -> ChatAnswer:
        with self._lock:
            self.requests.append(request)
            self.timeouts.append(timeout_s)
            if self.failures:
                raise self.failures.pop(0)
        system = request.messages.value[0]
        if system["role"] == "system" and system["content"] in self.under:
            return ChatAnswer(text=self.under[system["content"]], tokens_in=10, tokens_out=1)
        given = self.answer(request.messages.value[-1]["content"])
        if isinstance(given, ChatAnswer):
            return given
        return ChatAnswer(text=given, tokens_in=10, tokens_out=len(given.split()))
