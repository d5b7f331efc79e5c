"""Long benchmarks in cells: each finished cell is kept in the result file at once, and skipped when run again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cotune.cli.run_folder import plain, write_json
from cotune.errors import InputError

Row = dict[str, Any]


class FinishedCells:
    """Rows of a result file by their keys.

    Args:
        name: of the benchmark.
        args: what decides the numbers; paths, `resume` and what is named in `free` do not.
        keys: the fields of a row that say which cell it is.
        free: options that may differ between the runs that fill one file: those that choose cells.

    Raises:
        InputError: `args.resume`, and the file was made with other settings or is no result file.
    """

    def __init__(self, name: str, args: argparse.Namespace, keys: tuple[str, ...], free: tuple[str, ...] = ()) -> None:
        self._name, self._path, self._keys = name, Path(args.out), keys
        ignored = {"resume", *free}
        settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path) and k not in ignored}
        self._settings = json.loads(json.dumps(plain(settings)))
        self._rows: dict[tuple[Any, ...], Row] = {}
        if args.resume and self._path.is_file():
            self._load()

    def _load(self) -> None:
        try:
            record = json.loads(self._path.read_text(encoding="utf-8"))
            config, rows = record["config"], record["results"]["rows"]
            found = {tuple(row[key] for key in self._keys): dict(row) for row in rows}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(
                f"{self._path} is no result file of {self._name} ({error!r}); run without --resume"
            ) from error
        other = [key for key, value in self._settings.items() if key not in config or config[key] != value]
        if other:
            raise InputError(
                f"{self._path} was made with another {', '.join(other)}; give the same, or run without --resume"
            )
        self._rows = found

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._rows

    @property
    def rows(self) -> list[Row]:
        """All finished rows, in the order of their keys."""
        return [self._rows[key] for key in sorted(self._rows)]

    def keep(self, rows: list[Row]) -> None:
        """Add finished rows and write the file; `measurement.finish` writes the last one with everything else."""
        for row in rows:
            values = json.loads(json.dumps(plain(row), allow_nan=False))
            self._rows[tuple(values[key] for key in self._keys)] = values
        self._path.parent.mkdir(parents=True, exist_ok=True)
        record = {"benchmark": self._name, "config": self._settings, "results": {"rows": self.rows}}
        write_json(self._path, record)
