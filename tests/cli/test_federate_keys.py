"""Keys of checkpoints and certificates as their users make them."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from cotune.cli.federate_keys import SUPERLINK_PORT, listening_address, next_steps
from cotune.federation.sealing import SealingKey


def test_a_key_is_made_once_and_can_be_read(tmp_path: Path, run: Any) -> None:
    path = tmp_path / "my.key"
    outcome = run("federate", "key", path)
    assert outcome.status == 0 and path.stat().st_mode & 0o777 == 0o600
    key = SealingKey.load(path)
    assert key.public_id.hex() in outcome.err and "--checkpoint-key" in outcome.err
    assert key.value.hex() not in outcome.err
    run("federate", "key", path).check_refusal("exists")
    assert SealingKey.load(path).value == key.value


def test_certificates_come_with_what_to_do_next(tmp_path: Path, run: Any) -> None:
    from cryptography import x509

    folder = tmp_path / "certificates"
    hosts = ("--host", "hub.example.org", "--host", "192.0.2.7")
    outcome = run("federate", "certificates", folder, *hosts, "--node", "phone-1", "--node", "phone-2", "--days", 9)
    assert outcome.status == 0, outcome.err
    assert {one.name for one in folder.iterdir()} == {
        *("ca.crt", "ca.key", "server.pem", "server.key"),
        *("phone-1", "phone-1.pub", "phone-2", "phone-2.pub"),
    }
    found = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.example.org"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7"]
    for words in (
        "flower-superlink --host 0.0.0.0 --port 8000",
        "flower-supernode --superlink hub.example.org:8000",
        "--auth-supernode-private-key phone-2",
        "phone-1.pub",
        "ca.key belongs on neither",
    ):
        assert words in outcome.err
    run("federate", "certificates", folder).check_refusal("never overwritten")
    run("federate", "certificates", tmp_path / "x", "--host", "no name").check_refusal("dns_names has 'no name'")


@pytest.mark.parametrize(
    ("hosts", "listens", "reached"),
    [
        (["localhost", "127.0.0.1"], "127.0.0.1", "localhost:8000"),
        (["127.0.0.1", "hub.example.org"], "0.0.0.0", "127.0.0.1:8000"),
        (["::1"], "::1", "[::1]:8000"),
        (["2001:db8::7"], "::", "[2001:db8::7]:8000"),
    ],
)
def test_a_server_listens_where_it_is_reached(hosts: list[str], listens: str, reached: str) -> None:
    server, _, node = (shlex.split(command) for _, command in next_steps(Path("my keys"), hosts, ["phone-1"]))
    assert listening_address(hosts) == listens == server[server.index("--host") + 1]
    assert node[node.index("--superlink") + 1] == reached
    assert server[server.index("--ssl-certfile") + 1] == "my keys/server.pem"


def test_flower_takes_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flwr", reason="flwr is not installed; pip install 'cotune[flower]'")
    from flwr.supercore.constant import SUPERLINK_UVICORN_DEFAULT_PORT
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    assert SUPERLINK_PORT == SUPERLINK_UVICORN_DEFAULT_PORT
    steps = next_steps(Path("keys"), ["hub.example.org"], ["phone-1"])
    (_, *server), _, (_, *node) = (shlex.split(command) for _, command in steps)
    monkeypatch.setattr(sys, "argv", ["flower-superlink"])
    link = _parse_args_run_superlink().parse_args(server)
    assert (link.host, link.port, link.enable_supernode_auth) == ("0.0.0.0", 8000, True)
    nodes = _parse_args_run_supernode().parse_args(node)
    assert (nodes.superlink, nodes.auth_supernode_private_key) == ("hub.example.org:8000", "phone-1")
    assert nodes.node_config == 'trainer="FOLDER"'


def test_a_missing_package_is_named(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "cryptography" else there(name, *more)
    )
    words = "needs the package cryptography, which is not installed; run: pip install"
    run("federate", "key", tmp_path / "k").check_refusal(words)
    run("federate", "certificates", tmp_path / "c").check_refusal(words)
    run("federate", "identities", tmp_path / "i", "--device", "a").check_refusal(words)
    run("federate", "device-key", tmp_path / "d").check_refusal(words)
    run("federate", tmp_path / "c.toml", "--out", tmp_path / "out").check_refusal(words)
    assert list(tmp_path.iterdir()) == []
