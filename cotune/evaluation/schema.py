"""Check plain JSON values against Python type hints, so that a schema is written once, as types.

Understood: `str`, `bool`, `int`, `float`, `Literal`, `T | None`, `list[T]`, `tuple[T, ...]`, `tuple[A, B]`,
`dict[str, T]`, `TypedDict` with `Required` and `NotRequired` keys, `Annotated[T, Range(...)]`, and `object`
for anything. A tuple may come as a list, as JSON has no tuples. An `int` is a `float` too, a `bool` is neither,
and a `float` is finite.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from cotune.errors import InputError


@dataclass(frozen=True)
class Range:
    """Both ends belong to it."""

    low: float
    high: float = math.inf

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"from {self.low:g} to {self.high:g}"


Share: TypeAlias = Annotated[float, Range(0.0, 1.0)]
"""A part of a whole, 0 to 1."""
Quantity: TypeAlias = Annotated[float, Range(0.0)]
"""A measured amount, never negative; the unit is in the field's name."""
Count: TypeAlias = Annotated[int, Range(0)]
"""How many."""

_SIMPLE: dict[Any, tuple[type | tuple[type, ...], str]] = {
    str: (str, "a string"),
    bool: (bool, "true or false"),
    int: (int, "an integer"),
    float: ((int, float), "a finite number"),
}


def check_type(value: object, hint: Any, where: str) -> None:
    """Accept `value` or say what is wrong with it.

    Args:
        value: what came, as from `json.load`.
        hint: the type hint it has to fit.
        where: how the message names the value, such as `metrics['quality'][2]`.

    Raises:
        InputError: names the place, the value and what was expected.

    Example:
        >>> check_type({"M": 0.5}, dict[str, Share], "metrics")
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _SIMPLE:
        _check_simple(value, hint, where)
    elif is_typeddict(hint):
        _check_record(value, hint, where)
    elif origin in (Required, NotRequired):
        check_type(value, arguments[0], where)
    elif origin is Annotated:
        check_type(value, arguments[0], where)
        for bounds in arguments[1:]:
            if isinstance(bounds, Range) and not bounds.low <= value <= bounds.high:  # type: ignore[operator]
                raise InputError(f"{where} is {value!r}, expected a number {bounds}")
    elif origin is Literal:
        if value not in arguments:
            raise InputError(f"{where} is {_short(value)}, expected one of {', '.join(map(repr, arguments))}")
    elif origin in (Union, types.UnionType):
        if value is not None:
            check_type(value, next(one for one in arguments if one is not type(None)), where)
    elif origin in (list, tuple):
        _check_sequence(value, arguments, where)
    elif origin is dict:
        for key, item in _as_mapping(value, where).items():
            check_type(item, arguments[1], f"{where}[{key!r}]")
    else:
        assert hint is object, f"schema hint {hint!r} is not understood"


def _check_simple(value: object, hint: Any, where: str) -> None:
    accepted, words = _SIMPLE[hint]
    is_wrong = not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool)
    if is_wrong or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{where} is {_short(value)}, expected {words}")


def _check_sequence(value: object, arguments: tuple[Any, ...], where: str) -> None:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where} is {_short(value)}, expected a list")
    is_pair = len(arguments) == 2 and arguments[1] is not Ellipsis
    if is_pair and len(value) != 2:
        raise InputError(f"{where} has {len(value)} items, expected 2")
    for index, item in enumerate(value):
        check_type(item, arguments[index if is_pair else 0], f"{where}[{index}]")


def _check_record(value: object, hint: Any, where: str) -> None:
    record, fields = _as_mapping(value, where), _fields(hint)
    check_keys(record, set(fields), hint.__required_keys__, where)
    for key, item in record.items():
        check_type(item, fields[key], f"{where}[{key!r}]")


def check_keys(record: Mapping[str, object], known: set[str], required: frozenset[str], where: str) -> None:
    """Every required key is there and no other than the known ones.

    Raises:
        InputError: names the missing or unknown keys.
    """
    if missing := sorted(required - set(record)):
        raise InputError(f"{where} lacks {', '.join(map(repr, missing))}")
    if unknown := sorted(set(record) - known):
        raise InputError(
            f"{where} has unknown keys {', '.join(map(repr, unknown))}, expected some of "
            f"{', '.join(map(repr, sorted(known)))}"
        )


def _as_mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{where} is {_short(value)}, expected an object with string keys")
    return value


@lru_cache(maxsize=64)
def _fields(hint: Any) -> dict[str, Any]:
    return get_type_hints(hint, include_extras=True)


def _short(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
