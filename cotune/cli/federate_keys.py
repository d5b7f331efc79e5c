"""`cotune federate key` and `cotune federate certificates`: what encrypts checkpoints, and what proves who is who."""

from __future__ import annotations

import importlib.util
import ipaddress
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cotune.cli.output import stderr
from cotune.errors import InputError

SUPERLINK_PORT = 8000
"""Flower's default since 1.40, for nodes and `flwr` alike. Said in each command, as older versions have other ports."""


def key(
    file: Annotated[Path, typer.Argument(help="A new file; it gets mode 0600.")],
) -> None:
    """Make a key that encrypts checkpoints: `cotune federate CONFIG.toml --out DIR --checkpoint-key FILE`.

    Example:

        cotune federate key my.key
    """
    check_cryptography("cotune federate key")
    from cotune.federation.sealing import SealingKey

    made = SealingKey.generate()
    made.save(file)
    stderr.print(
        escape(
            f"{file} is the key {made.public_id.hex()}. Keep it away from the checkpoints, and keep a copy: without "
            "it they cannot be read. Then run: cotune federate CONFIG.toml --out DIR --checkpoint-key " + str(file)
        ),
        soft_wrap=True,
    )


def certificates(
    folder: Annotated[Path, typer.Argument(help="Where the files are written; nothing is overwritten.")],
    host: Annotated[
        list[str] | None, typer.Option(help="A name or address by which nodes reach the server; may be repeated.")
    ] = None,
    node: Annotated[list[str] | None, typer.Option(help="A node that gets a key; may be repeated.")] = None,
    days: Annotated[int, typer.Option(help="How long the server's certificate is valid.")] = 365,
) -> None:
    """Make the certificates of a deployment: an authority, the server's certificate, and a key for each node.

    Example:

        cotune federate certificates my-certificates --host coordinator.example.org --node phone-1 --node phone-2
    """
    check_cryptography("cotune federate certificates")
    from cotune.federation.certificates import CertificateConfig, make_certificates

    hosts = host or ["localhost", "127.0.0.1"]
    addresses = tuple(one for one in hosts if is_address(one))
    config = CertificateConfig(
        dns_names=tuple(one for one in hosts if one not in addresses),
        ip_addresses=addresses,
        node_names=tuple(node or ()),
        days=days,
    )
    written = make_certificates(folder, config)
    steps = next_steps(folder, hosts, config.node_names)
    for line in (*(f"wrote {path}" for path in written), *(f"{what}: {command}" for what, command in steps)):
        stderr.print(escape(line), soft_wrap=True)
    stderr.print("ca.key belongs on neither: keep it to renew the server's certificate.", soft_wrap=True)


def next_steps(folder: Path, hosts: Sequence[str], nodes: Sequence[str]) -> list[tuple[str, str]]:
    """What to run where with the files of `certificates`: words, and a command of Flower 1.41.

    Example:
        >>> for what, _ in next_steps(Path("keys"), ["hub.example.org"], ["phone-1"]):
        ...     print(what)
        next, on the server (hub.example.org)
        register phone-1, CONNECTION being what flwr calls that server
        on phone-1, with copies of ca.crt and phone-1, FOLDER being that of its trainer
    """
    server = ["flower-superlink", "--host", listening_address(hosts), "--port", str(SUPERLINK_PORT)]
    server += ["--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.pem")]
    server += ["--ssl-keyfile", str(folder / "server.key"), "--enable-supernode-auth"]
    server += ["--disable-runtime-dependency-installation"]
    reached = f"[{hosts[0]}]" if ":" in hosts[0] else hosts[0]
    steps = [(f"next, on the server ({', '.join(hosts)})", shlex.join(server))]
    for name in nodes:
        registered = shlex.join(["flwr", "supernode", "register", str(folder / f"{name}.pub")])
        steps.append((f"register {name}, CONNECTION being what flwr calls that server", f"{registered} CONNECTION"))
    for name in nodes:
        node = ["flower-supernode", "--superlink", f"{reached}:{SUPERLINK_PORT}", "--root-certificates", "ca.crt"]
        node += ["--auth-supernode-private-key", name]
        command = f"{shlex.join(node)} --node-config 'trainer=\"FOLDER\"'"
        steps.append((f"on {name}, with copies of ca.crt and {name}, FOLDER being that of its trainer", command))
    return steps


def listening_address(hosts: Sequence[str]) -> str:
    """Where the SuperLink has to listen to be reached by these names: Flower's default is this machine alone.

    Example:
        >>> listening_address(["localhost", "127.0.0.1"]), listening_address(["hub.example.org"])
        ('127.0.0.1', '0.0.0.0')
        >>> listening_address(["2001:db8::7"])
        '::'
    """
    if all(one == "localhost" or (is_address(one) and ipaddress.ip_address(one).is_loopback) for one in hosts):
        return "::1" if ":" in hosts[0] else "127.0.0.1"
    return "::" if all(":" in one for one in hosts) else "0.0.0.0"


def is_address(text: str) -> bool:
    """Whether this is an IP address.

    Example:
        >>> is_address("192.0.2.7"), is_address("example.org")
        (True, False)
    """
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def check_cryptography(command: str) -> None:
    """Refuse to begin without the package that signs, encrypts and certifies.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("cryptography") is None:
        raise InputError(
            f"{command} needs the package cryptography, which is not installed; run: pip install 'cotune[federated]'"
        )
