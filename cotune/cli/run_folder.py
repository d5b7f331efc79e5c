"""The folder of a run: resolved configuration, seeds, versions, metrics and a report, so that it can be repeated."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cotune import __version__
from cotune.errors import InputError

_PACKAGES = ("numpy", "torch", "transformers", "peft", "tokenizers", "websockets")


def versions() -> dict[str, str]:
    """Versions of cotune, Python and the libraries that decide numbers, as far as they are installed."""
    found = {"cotune": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def plain(config: object) -> Any:
    """A configuration as JSON holds it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    return config if isinstance(config, str | int | float | bool | None) else str(config)


def make_run_folder(folder: Path) -> Path:
    """Make sure that it is there and can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the run folder {folder} cannot be made ({error.strerror}); give another one") from error
    return folder


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False, indent=1, allow_nan=False)
            file.write("\n")
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_config(folder: Path, command: str, config: Mapping[str, Any]) -> None:
    """`config.json`: what was run, with which settings and versions."""
    write_json(folder / "config.json", {"command": command, "config": plain(config), "versions": versions()})
