"""`cotune federate identities` and `device-key`: who takes part, and with which key a device signs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cotune.cli.federate_keys import check_cryptography
from cotune.cli.output import print_json, stderr
from cotune.errors import InputError

_PUBLIC_KEY = re.compile(r"[0-9a-fA-F]{64}")


def identities(
    folder: Annotated[Path, typer.Argument(help="Where the files are; nothing in it is overwritten.")],
    device: Annotated[list[str] | None, typer.Option(help="A device that gets a key here; may be repeated.")] = None,
    known: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=HEX", help="A device that made its own key, and its public key; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make the keys of the devices, their registry and the run's secret, or add devices to those that are there.

    FOLDER gets NAME.key for each --device, registry.json and run.secret. A device can make its key itself, with
    `cotune federate device-key`; then only its public key travels, as --known. FOLDER may be that of a run.

    Examples:

        cotune federate identities my-identities --device kitchen --device office

        cotune federate device-key garage.key

        cotune federate identities my-identities --known garage=HEX
    """
    check_cryptography("cotune federate identities")
    from cotune.federation.identities import make_identities

    made = make_identities(folder, device or [], _public_keys(known or []))
    if as_json:
        print_json(
            {
                "folder": str(made.folder),
                "registry": str(made.registry_file),
                "secret": str(made.secret_file),
                "is_new_secret": made.is_new_secret,
                "keys": {name: str(path) for name, path in made.keys.items()},
                "devices": {name: key.hex() for name, key in sorted(made.registry.devices.items())},
            }
        )
        return
    for path in (*made.keys.values(), *([made.secret_file] if made.is_new_secret else []), made.registry_file):
        _say(f"wrote {path}")
    _say(f"registered: {', '.join(sorted(made.registry.devices))}")
    _say(f"To each device, by hand: its own key and {made.secret_file}, which is never sent. Move keys, leave no copy.")
    command = ["cotune", "federate", "prepare", "CONFIG.toml", "RUN", "--registry", str(made.registry_file)]
    _say(f"next, for a new run: {shlex.join([*command, '--secret', str(made.secret_file)])}")


def device_key(
    file: Annotated[Path, typer.Argument(help="The private key: a new file, which gets mode 0600.")],
    show: Annotated[bool, typer.Option("--show", help="Make nothing: FILE is a key that there is.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a device's own key and print its public key, which the server registers with `identities --known`.

    Run it on the device: the private key stays there.

    Examples:

        cotune federate device-key garage.key

        cotune federate device-key garage.key --show
    """
    check_cryptography("cotune federate device-key")
    from cotune.federation.signing import DeviceKey

    key = DeviceKey.load(file) if show else DeviceKey.generate()
    if not show:
        key.save(file)
    public_key = key.public_key.hex()
    if as_json:
        print_json({"key": str(file), "public_key": public_key})
        return
    # For scripts, too: it stands on standard output alone.
    typer.echo(public_key)
    _say(
        f"{file} stays on this device. On the server, NAME being the device's name: cotune federate identities FOLDER "
        f"--known NAME={public_key}"
    )


def _public_keys(known: Sequence[str]) -> dict[str, bytes]:
    """What --known says, by name.

    Raises:
        InputError: it is not of the form, or a name is given twice. What stands behind the name is not repeated: it
            may be something else that was pasted by mistake.

    Example:
        >>> _public_keys([f"garage={'0a' * 32}"])["garage"][:2]
        b'\\n\\n'
    """
    found: dict[str, bytes] = {}
    for one in known:
        name, equals, text = one.partition("=")
        if not equals:
            raise InputError(f"--known has no =, expected NAME=HEX; {len(one)} characters came")
        if not _PUBLIC_KEY.fullmatch(text):
            raise InputError(
                f"--known {name:.64} has {len(text)} characters behind =, expected the 64 hexadecimal digits of a "
                "public key; `cotune federate device-key FILE --show` prints them"
            )
        if name in found:
            raise InputError(f"--known {name:.64} is given twice; give every device a name of its own")
        found[name] = bytes.fromhex(text)
    return found


def _say(line: str) -> None:
    stderr.print(escape(line), soft_wrap=True)
