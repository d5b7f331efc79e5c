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
PUBLIC = "public"
"""The column that lists pieces of a row's request that the cloud knows anyway, such as descriptions of its tools."""


@dataclass(frozen=True)
class PrivateExample:
    """A request.

    Attributes:
        request: q, raw.
        target: z as it should be, raw.
        private: values that must not leave, where a data set marks them.
        public: whole pieces of the request that are no secret of anybody, such as descriptions of tools.
    """

    request: str
    target: str
    private: tuple[str, ...] = ()
    public: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.request.strip() or not self.target.strip():
            raise InputError("an example has an empty request or target, expected text; leave it out")

    def __repr__(self) -> str:
        return f"PrivateExample({len(self.request)} characters)"


def read_private_examples(
    path: Path | str, *, limit: int | None = None, seed: int | None = None, split: str | None = None
) -> list[PrivateExample]:
    """Read requests, targets and, where there are columns `private` and `public` with lists of texts, what is so.

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
                    template = template or choose_template(
                        None, {k: v for k, v in row.items() if k not in (PRIVATE, PUBLIC)}
                    )
                    marked = _texts(row, PRIVATE), _texts(row, PUBLIC)
                    found += [
                        PrivateExample(each.prompt, each.target.strip(), *marked) for each in template.render(row)
                    ]
                except InputError as error:
                    raise DataError(str(error), path=source, line=number) from error
        return found

    chosen = draw(rows(), limit=limit, share=None, seed=seed)
    if not chosen:
        raise DataError("there is no example in it, expected at least one row", path=path)
    return chosen


def _texts(row: Mapping[str, object], column: str) -> tuple[str, ...]:
    texts = row.get(column) or ()
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"column '{column}' is {texts!r:.40}, expected a list of texts")
    return tuple(texts)
