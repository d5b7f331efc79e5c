"""Frozen dataclasses from the tables of a TOML file; whatever does not fit is named and refused."""

from __future__ import annotations

import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from cotune.errors import InputError

T = TypeVar("T")
MAX_CONFIG_BYTES = 1_000_000
LARGEST_INT = 2**63 - 1


def read_toml(kind: type[T], path: Path | str) -> T:
    """A dataclass from a TOML file.

    Raises:
        InputError: it cannot be read, or a key or value is wrong; names it.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InputError(f"the config {path} cannot be read ({error.strerror}); give a TOML file") from None
    if len(text) > MAX_CONFIG_BYTES:
        raise InputError(f"the config {path} has more than {MAX_CONFIG_BYTES} bytes; give a TOML file of settings")
    try:
        table = tomllib.loads(text.decode())
    except ValueError as error:
        raise InputError(f"the config {path} is no TOML: {error}") from None
    try:
        return from_table(kind, table)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def from_table(
    kind: type[T],
    table: Mapping[str, object],
    *,
    where: str = "",
    given: Mapping[str, Any] | None = None,
    usual: Mapping[str, Any] | None = None,
) -> T:
    """A dataclass from a table, tables within it included.

    Args:
        kind: the dataclass.
        table: of the file.
        where: its place there, with a dot at the end, for messages.
        given: fields that do not come from the file, and may not stand there.
        usual: values of fields that the table leaves out, instead of the dataclass's own.

    Raises:
        InputError: an unknown key, a missing one, or a value of another type.

    Example:
        >>> from cotune.federation.local_model import LocalSteps
        >>> from_table(LocalSteps, {"num_steps": 3, "learning_rate": 1}).learning_rate
        1.0
    """
    fixed = dict(given or {})
    known = {one.name: one for one in fields(kind) if one.name not in fixed}  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise InputError(f"{where}{key} is not known, expected one of {', '.join(known)}; remove or correct it")
    hints = get_type_hints(kind)
    read = dict(usual or {}) | {key: _value(hints[key], value, f"{where}{key}") for key, value in table.items()}
    missing = [name for name, one in known.items() if name not in read and not _has_default(one)]
    if missing:
        raise InputError(f"{where}{missing[0]} is missing; add it")
    try:
        return kind(**read, **fixed)
    except InputError as error:
        raise InputError(f"{where.rstrip('.') or 'the config'}: {error}" if where else str(error)) from None


def _has_default(one: Field[Any]) -> bool:
    return one.default is not MISSING or one.default_factory is not MISSING


def _value(hint: Any, value: object, name: str) -> object:
    """A value of a field of that type; whole numbers stand for any number."""
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{name} is {value!r}, expected a table")
        return from_table(hint, value, where=f"{name}.")  # type: ignore[arg-type]
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        kinds = [one for one in get_args(hint) if one is not type(None)]
        return _value(kinds[0], value, name)
    if origin is tuple:
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise InputError(f"{name} is {value!r}, expected a list of texts")
        return tuple(value)
    if origin is not None:
        if not isinstance(value, Mapping):
            raise InputError(f"{name} is {value!r}, expected a table")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise InputError(f"{name} is {value!r}, expected {words.get(hint, hint)}")
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise InputError(f"{name} is {value}, expected at most {LARGEST_INT}, which 64 bits hold")
    return value
