"""Reading a JSON object strictly: every field of its type and range, and none that nobody knows."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping

from cotune.openai_api.api_error import ApiError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def shown(value: object) -> str:
    """A value as an error message shows it, never longer than a line."""
    return _SHORT.repr(value)


class Fields:
    """The fields of one JSON object. A field that is null counts as left out.

    Args:
        value: what came.
        name: how messages call the object; the fields of the body itself have no prefix.

    Example:
        >>> Fields({"seed": 3}, "").integer("seed", 0, 9)
        3
    """

    def __init__(self, value: object, name: str = "") -> None:
        if not isinstance(value, dict):
            raise ApiError(f"{name or 'the body'} is {shown(value)}, expected a JSON object", param=name or None)
        self._values: Mapping[str, object] = value
        self._name = name
        self._read: set[str] = set()

    def path(self, name: str) -> str:
        """How messages call a field."""
        return f"{self._name}.{name}" if self._name else name

    def take(self, name: str) -> object:
        """The value as it came, None where it is left out."""
        self._read.add(name)
        return self._values.get(name)

    def wrong(self, name: str, expected: str) -> ApiError:
        """The error for a field that came as something else."""
        return ApiError(
            f"{self.path(name)} is {shown(self._values.get(name))}, expected {expected}",
            param=self.path(name),
            code="invalid_value",
        )

    def missing(self, name: str, expected: str) -> ApiError:
        """The error for a field that must be there."""
        return ApiError(f"{self.path(name)} is missing, expected {expected}", param=self.path(name))

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def choice(self, name: str, choices: Collection[str]) -> str | None:
        value = self.take(name)
        if value is not None and value not in tuple(choices):
            raise self.wrong(name, f"one of {', '.join(choices)}")
        return value if value is None else str(value)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return bool(value)

    def integer(self, name: str, least: int, most: int) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, f"an integer from {least} to {most}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if type(value) not in (int, float):
            raise self.wrong(name, f"a number from {least:g} to {most:g}")
        number = float(str(value))
        if not math.isfinite(number) or not least <= number <= most:
            raise self.wrong(name, f"a number from {least:g} to {most:g}")
        return number

    def only(self, name: str, *harmless: object, because: str) -> None:
        """Accept a field only where it asks for nothing that is not there."""
        value = self.take(name)
        if value is not None and not any(type(value) is type(other) and value == other for other in harmless):
            raise ApiError(
                f"{self.path(name)} is {shown(value)}, and {because}; leave it out",
                param=self.path(name),
                code="unsupported_parameter",
            )

    def finish(self, ignored: Collection[str] = ()) -> None:
        """Refuse every field that was not read and is not among `ignored`."""
        unknown = sorted(self._values.keys() - self._read - set(ignored))
        if unknown:
            raise ApiError(
                f"{self.path(unknown[0])!r:.80} is not known here; leave it out, or correct its spelling",
                param=self.path(unknown[0])[:80],
                code="unknown_parameter",
            )
