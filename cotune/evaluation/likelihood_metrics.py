"""How well a model predicts a text: nats per token, perplexity, bits per byte.

Perplexity depends on the tokenizer and compares only models that share one; bits per byte compares any two.
"""

from __future__ import annotations

import math

from cotune.errors import InputError


def nats_per_token(total_nats: float, num_tokens: int) -> float:
    """Mean negative log-likelihood.

    Args:
        total_nats: sum over the target tokens of -ln p(token | what came before).
        num_tokens: how many target tokens.

    Raises:
        InputError: `total_nats` negative or not finite, or no token.
    """
    return _check_nats(total_nats) / _check_count(num_tokens, "num_tokens")


def perplexity(total_nats: float, num_tokens: int) -> float:
    """exp(total_nats / num_tokens); inf where that is more than a float holds (about 709 nats per token).

    Raises:
        InputError: as `nats_per_token`.

    Example:
        >>> import math
        >>> round(perplexity(3 * math.log(10), 3), 9)
        10.0
    """
    mean = nats_per_token(total_nats, num_tokens)
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """total_nats / (ln 2 * num_bytes).

    Args:
        total_nats: sum of -ln p over all tokens of the text.
        num_bytes: length of the same text in UTF-8.

    Raises:
        InputError: `total_nats` negative or not finite, or no byte.
    """
    return _check_nats(total_nats) / (math.log(2.0) * _check_count(num_bytes, "num_bytes"))


def _check_nats(total_nats: float) -> float:
    if not math.isfinite(total_nats) or total_nats < 0.0:
        raise InputError(f"total_nats is {total_nats}, expected a finite sum of negative log-likelihoods, at least 0")
    return float(total_nats)


def _check_count(count: int, name: str) -> int:
    if count < 1:
        raise InputError(f"{name} is {count}, expected at least 1; an empty text has no likelihood to report")
    return count
