"""Ranges of the numbers that settings hold: in range, or one sentence that names the number."""

from __future__ import annotations

from cotune.errors import InputError


def check_at_least(least: int, **numbers: float) -> None:
    """Refuse the first number below `least`, or that is nan.

    Raises:
        InputError: there is one; names it.

    Example:
        >>> check_at_least(1, num_steps=3, batch_size=0)
        Traceback (most recent call last):
        ...
        cotune.errors.InputError: batch_size is 0, expected at least 1
    """
    for name, number in numbers.items():
        if not number >= least:
            raise InputError(f"{name} is {number}, expected at least {least}")


def check_at_most(most: int, **numbers: int) -> None:
    """Refuse the first number above `most`, before room for so many is taken.

    Raises:
        InputError: there is one; names it.

    Example:
        >>> check_at_most(8, num_steps=8, num_directions=9)
        Traceback (most recent call last):
        ...
        cotune.errors.InputError: num_directions is 9, expected at most 8
    """
    for name, number in numbers.items():
        if number > most:
            raise InputError(f"{name} is {number}, expected at most {most}")


def check_positive(**numbers: float) -> None:
    """Refuse the first number that is not above 0, or not finite.

    Raises:
        InputError: there is one; names it.

    Example:
        >>> check_positive(learning_rate=0.1, zo_eps=0.0)
        Traceback (most recent call last):
        ...
        cotune.errors.InputError: zo_eps is 0.0, expected a positive number
    """
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise InputError(f"{name} is {number}, expected a positive number")


def check_share(**numbers: float) -> None:
    """Refuse the first number that is not above 0 and at most 1.

    Raises:
        InputError: there is one; names it.

    Example:
        >>> check_share(quorum=1.0, least=1.5)
        Traceback (most recent call last):
        ...
        cotune.errors.InputError: least is 1.5, expected above 0 and at most 1
    """
    for name, number in numbers.items():
        if not 0 < number <= 1:
            raise InputError(f"{name} is {number}, expected above 0 and at most 1")
