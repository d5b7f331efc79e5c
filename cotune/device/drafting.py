"""When a device tells its cloud how it expects the text to go on, and how far."""

from __future__ import annotations

from dataclasses import dataclass

from cotune.device.drafter import Drafter
from cotune.generation.controller import best_draft_tokens
from cotune.wire.frames import MAX_DRAFT_TOKENS

MAX_DRAFT = 32
"""The most tokens that one draft adds to what the cloud has."""
# How fast the running share of kept tokens follows, and what is thought of a drafter that nobody has seen yet: as much
# as a few tokens would say.
_SMOOTHING = 0.05
_FIRST_SHARE = 0.6
_FIRST_WEIGHT = 3


@dataclass(frozen=True)
class Expected:
    """Tokens that the device expects from `pos` on; the first of them it may know already."""

    pos: int
    tokens: list[int]

    @property
    def end(self) -> int:
        return self.pos + len(self.tokens)

    def agrees_with(self, tokens: list[int]) -> bool:
        """Whether a text that begins with `tokens` may go on like this."""
        known = tokens[self.pos :]
        return self.pos <= len(tokens) and self.tokens[: len(known)] == known[: len(self.tokens)]


class Drafting:
    """What was drafted, how much of it held, and what to draft next.

    Args:
        drafter: what continues a text.
        vocab_size: of the cloud's model.
    """

    def __init__(self, drafter: Drafter, vocab_size: int) -> None:
        self.kept_share = _FIRST_SHARE
        self._drafter = drafter
        self._vocab_size = vocab_size
        self._num_noted = _FIRST_WEIGHT
        self._expected: Expected | None = None

    def forget(self) -> None:
        """The cloud knows of no draft any more."""
        self._expected = None

    def note(self, text: list[int]) -> None:
        """The last token of `text` has been decided."""
        expected, position = self._expected, len(text) - 1
        if expected is None or not expected.pos <= position < expected.end or not expected.agrees_with(text[:-1]):
            return
        is_kept = expected.tokens[position - expected.pos] == text[-1]
        self._num_noted += 1
        self.kept_share += max(_SMOOTHING, 1.0 / self._num_noted) * (is_kept - self.kept_share)

    def next(self, text: list[int], running: list[int], *, is_replaced: bool) -> Expected | None:
        """The next draft to send, if the cloud has none that goes on behind what it has computed.

        Args:
            text: what is decided; the cloud may not know of the last token yet, where the device decided it.
            running: the tokens after it that the cloud went on with; the last one is its own, not yet corrected.
            is_replaced: the last token of `text` is not what the cloud went on with, so that a pass begins there.
        """
        path, num_drafted = list(text), 0
        for token in running:
            expected = self._ahead_of(path)
            if expected is None:
                path.append(token)
            else:
                path.append(expected.tokens[len(path) - expected.pos])
                num_drafted += 1
        k = best_draft_tokens(draft_kept=self.kept_share, most=MAX_DRAFT)
        ahead = self._ahead_of(path)
        if ahead is not None and (ahead.end - len(path) > k // 2 or not is_replaced):
            return None
        if len(running) - num_drafted > max(1, k):
            # The cloud runs ahead by itself, and is further by now than a draft would bring it.
            return None
        last_is_guess = len(running) > num_drafted
        start = path[:-1] if last_is_guess else path
        tokens = self._draft(start, max(1, k) + last_is_guess)
        if last_is_guess and not tokens:
            start, tokens = path, self._draft(path, max(1, k))
        num_known = len(text) if running else len(text) - 1
        self._expected = Expected(num_known, start[num_known:] + tokens)
        # A draft that is hardly ever right is only kept in mind, to see whether it gets better.
        is_of_use = k > 0 and self._expected.end > len(path) and len(self._expected.tokens) <= MAX_DRAFT_TOKENS
        return self._expected if is_of_use else None

    def _ahead_of(self, path: list[int]) -> Expected | None:
        """What is expected after `path` and was said, if anything."""
        expected = self._expected
        is_ahead = expected is not None and expected.end > len(path) and expected.agrees_with(path)
        return expected if is_ahead else None

    def _draft(self, path: list[int], k: int) -> list[int]:
        tokens = self._drafter.draft(path, k)[:k]
        return tokens[: next((i for i, token in enumerate(tokens) if not 0 <= token < self._vocab_size), k)]
