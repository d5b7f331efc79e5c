"""Requests with the answers that they should get, and what in them is private: for fitting and for measuring leaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cotune.data.records import open_sources
from cotune.data.sampling import draw
from cotune.data.templates import choose_template
from cotune.errors import DataError, InputError

PRIVATE = "private"
"""The column that lists a row's private values, beside those of any template (docs/data.md)."""


@dataclass(frozen=True)
class PrivateExample:
    """A request.

    Attributes:
        request: q, raw.
        target: z as it should be, raw.
        private: values that must not leave, where a data set marks them.
    """

    request: str
    target: str
    private: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.request.strip() or not self.target.strip():
            raise InputError("an example has an empty request or target, expected text; leave it out")

    def __repr__(self) -> str:
        return f"PrivateExample({len(self.request)} characters)"


def read_private_examples(
    path: Path | str, *, limit: int | None = None, seed: int | None = None, split: str | None = None
) -> list[PrivateExample]:
    """Read requests, targets and, where there is a column `private` with a list of texts, what is private.

    Args:
        path, split: as `cotune.data.read_examples` takes them.
        limit: how many at most.
        seed: draws them; None takes the first ones.

    Raises:
        DataError: what cannot be read, with file and line.
    """

    def rows() -> list[PrivateExample]:
        found: list[PrivateExample] = []
        for source, numbered in open_sources(path, split):
            template = None
            for number, row in numbered:
                try:
                    template = template or choose_template(None, {k: v for k, v in row.items() if k != PRIVATE})
                    units = _units(row)
                    found += [PrivateExample(each.prompt, each.target.strip(), units) for each in template.render(row)]
                except InputError as error:
                    raise DataError(str(error), path=source, line=number) from error
        return found

    chosen = draw(rows(), limit=limit, share=None, seed=seed)
    if not chosen:
        raise DataError("there is no example in it, expected at least one row", path=path)
    return chosen


def _units(row: Mapping[str, object]) -> tuple[str, ...]:
    units = row.get(PRIVATE) or ()
    if not isinstance(units, list | tuple) or not all(isinstance(unit, str) and unit.strip() for unit in units):
        raise DataError(f"column '{PRIVATE}' is {units!r:.40}, expected a list of texts")
    return tuple(units)
