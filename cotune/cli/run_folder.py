"""The folder of a run: resolved configuration, seeds, versions, metrics and a report, so that it can be repeated."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cotune import __version__
from cotune.durable import replacing
from cotune.errors import InputError

CONFIG_FILE = "config.json"
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


def command_line() -> str:
    """The command that is running, as a shell takes it, to do it again from the start."""
    return shlex.join(["cotune", *(word for word in sys.argv[1:] if word != "--resume")])


def plain(config: object) -> Any:
    """A configuration as JSON holds it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain(value) for value in config]
    if isinstance(config, float) and not math.isfinite(config):
        return str(config)
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
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    with replacing(path, mode=0o644) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def run_folder(folder: Path, command: str, config: Mapping[str, Any]) -> Iterator[Path]:
    """Inside, the folder is there with its `config.json`; a run that ends before it made anything leaves no trace.

    On an error the folder becomes what it was before, the config of an earlier run included, unless a file with
    something in it came or changed meanwhile: a checkpoint or features, with which `--resume` goes on. What was there
    before is never taken away.

    Raises:
        InputError: the folder cannot be made.
    """
    new_folders = [each for each in (folder, *folder.parents) if not each.exists()]
    there = set(folder.rglob("*"))
    path = folder / CONFIG_FILE
    earlier, before = path.read_bytes() if path.is_file() else None, _made(folder)
    try:
        make_run_folder(folder)
        write_config(folder, command, config)
        yield folder
    except BaseException:
        if _made(folder) == before:
            if earlier is not None:
                path.write_bytes(earlier)
            for each in sorted(set(folder.rglob("*")) - there, reverse=True):
                each.rmdir() if each.is_dir() else each.unlink()
            for each in new_folders:
                # Somebody else may have put something beside it.
                if each.is_dir() and not any(each.iterdir()):
                    each.rmdir()
        raise


def _made(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of each file that holds something, but for the config."""
    files = [path for path in folder.rglob("*") if path.is_file() and path != folder / CONFIG_FILE]
    found = {path: path.stat() for path in files}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found.items() if stat.st_size}


def write_config(folder: Path, command: str, config: Mapping[str, Any]) -> None:
    """`config.json`: what was run, with which settings and versions."""
    write_json(folder / CONFIG_FILE, {"command": command, "config": plain(config), "versions": versions()})
