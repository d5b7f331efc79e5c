"""The folder that `flwr run` takes. It has no code: both of its components are modules of the installed package.

Flower sends the folder to every device and runs what it names, so what it names should be what is installed there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cotune import __version__
from cotune.durable import replacing
from cotune.errors import InputError
from cotune.federation.flower import QUIET

PYPROJECT, ENVIRONMENT = "pyproject.toml", "environment.env"
SERVER_APP = "cotune.federation.flower.server_app:app"
CLIENT_APP = "cotune.federation.flower.client_app:app"
PUBLIC_MODE = 0o644
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?")
_FOLDER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """What the app folder says."""

    folder: str = ""
    """Of the run, on the SuperLink's machine; or given later by `flwr run --run-config`."""
    name: str = "cotune-federation"
    """Of the app: at most 32 lower-case letters, digits and dashes."""
    publisher: str = "local"
    """Whoever runs it; Flower asks for one."""

    def __post_init__(self) -> None:
        for field in ("name", "publisher"):
            if not _NAME.fullmatch(getattr(self, field)):
                raise InputError(
                    f"{field} is {getattr(self, field)!r:.80}, expected 1 to 32 lower-case letters, digits and dashes"
                )
        if not self.folder.isprintable():
            raise InputError(f"folder is {self.folder!r:.80}, expected a path of printable characters")


def write_app(folder: Path | str, config: AppConfig | None = None) -> list[Path]:
    """Write the folder, or what changed in it.

    `environment.env` is for whatever starts Flower's programs: it switches telemetry and the look for updates off.

    Args:
        folder: made where it is missing.
        config: what it says.

    Returns:
        The files.

    Raises:
        InputError: as `check_app_folder`, or the disk refuses.

    Example:
        >>> import tempfile
        >>> [path.name for path in write_app(Path(tempfile.mkdtemp()) / "app")]
        ['pyproject.toml', 'environment.env']
    """
    folder, config = Path(folder), config or AppConfig()
    check_app_folder(folder)
    files = {PYPROJECT: _pyproject(config), ENVIRONMENT: _environment(QUIET)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with replacing(folder / name, mode=PUBLIC_MODE) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from None
    return [folder / name for name in files]


def check_app_folder(folder: Path) -> None:
    """Refuse a folder that cannot be the app's.

    Raises:
        InputError: Flower does not take its name, or there is a `pyproject.toml` that is not ours.
    """
    if not _FOLDER_NAME.fullmatch(folder.name):
        # Flower refuses others, with `flwr build`.
        raise InputError(
            f"the folder is called {folder.name!r:.80}, expected at most 32 letters, digits and dashes, a letter first"
        )
    pyproject = folder / PYPROJECT
    try:
        if pyproject.exists() and SERVER_APP not in pyproject.read_text(errors="replace"):
            raise InputError(f"{pyproject} is of something else; give another folder")
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror or error}") from None


def _pyproject(config: AppConfig) -> str:
    return f"""\
[project]
name = "{config.name}"
version = "{__version__}"
description = "Rounds of cotune over Flower; the code is the installed package."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "{config.publisher}"

[tool.flwr.app.components]
serverapp = "{SERVER_APP}"
clientapp = "{CLIENT_APP}"

[tool.flwr.app.config]
folder = {json.dumps(config.folder)}
"""


def _environment(variables: Mapping[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in variables.items())
