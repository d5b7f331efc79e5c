"""The commands of docs/federated.md, in their order: cotune's are run, and Flower's programs know every option."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed; pip install 'cotune[flower]'")

from tiny_models import save_tiny

from cotune.cli.federate_keys import next_steps
from cotune.cli.main import main
from cotune.federation.flower.server_folder import ServerFolder
from cotune.federation.run_secret import RunSecret
from cotune.federation.signing import DeviceKey

PAGE = (Path(__file__).parents[3] / "docs" / "federated.md").read_text(encoding="utf-8")
# `flwr` itself is run by the test of a real deployment.
PROGRAMS = ("flower-superlink", "flower-supernode")
NODES = ("kitchen", "office", "garage")


def commands(program: str) -> list[list[str]]:
    """As the page has them, at the beginning of an indented line; the drawing has wider gaps."""
    whole = re.sub(r" \\\n\s+", " ", PAGE)
    return [shlex.split(line) for line in re.findall(rf"^    ({program} \S[^\n]*)$", whole, re.MULTILINE)]


def cotune(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the installed command, which ends with status 0."""
    monkeypatch.setattr(sys, "argv", ["cotune", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, arguments


def test_keys_run_and_app_are_made_by_the_pages_own_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("tiny"))
    Path("federation.toml").write_text('model = "tiny"\n[data]\nnum_judge = 0\n[adapter]\nrank = 2\n')
    (own,), (identities,), (prepare,) = (
        commands(f"cotune federate {name}") for name in ("device-key", "identities", "prepare")
    )
    capsys.readouterr()
    cotune(own[1:], monkeypatch)
    public_key = capsys.readouterr().out.strip()
    cotune([word.replace("$GARAGE", public_key) for word in identities[1:]], monkeypatch)
    cotune(prepare[1:], monkeypatch)
    told = capsys.readouterr().err
    run = ServerFolder.read("run-1")
    assert run.registry.devices.keys() == set(NODES)
    for name, folder in (("garage", "."), ("kitchen", "identities"), ("office", "identities")):
        assert DeviceKey.load(Path(folder) / f"{name}.key").public_key == run.registry.devices[name]
    assert run.secret == RunSecret.load("identities/run.secret")
    app = tomllib.loads(Path("app/pyproject.toml").read_text())
    assert app["tool"]["flwr"]["app"]["config"]["folder"] == str(tmp_path / "run-1")
    exported = Path("app/environment.env").read_text()
    (line,) = re.findall(r"^    export (.*)$", PAGE, re.MULTILINE)
    assert set(line.split()) == set(exported.split())
    # What it says comes next is what the page says.
    (start,), (result,) = commands("flwr run"), commands("cotune federate result")
    assert shlex.join(start).replace(" here ", " CONNECTION ") in told and shlex.join(result) in told


@pytest.mark.parametrize("program", PROGRAMS)
def test_flower_knows_every_option(program: str, tmp_path: Path) -> None:
    found = commands(program)
    assert found, "the page has it"
    told = subprocess.run(
        [str(Path(sys.executable).parent / program), "--help"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "FLWR_HOME": str(tmp_path), "COLUMNS": "200"},
    ).stdout
    options = {word for command in found for word in command if word.startswith("--")}
    missing = [option for option in options if not re.search(rf"(?<![\w-]){option}(?![\w-])", told)]
    assert not missing, told


def test_what_certificates_prints_is_what_the_page_has() -> None:
    printed = [shlex.split(command) for _, command in next_steps(Path("certificates"), ["127.0.0.1"], NODES)]
    (link,), (node,) = commands("flower-superlink"), commands("flower-supernode")
    assert {word for word in printed[0] if word.startswith("-")} <= set(link)
    assert {word for word in printed[-1] if word.startswith("-")} <= set(node)
    registered = [["flwr", "supernode", "register", f"certificates/{name}.pub", "here"] for name in NODES]
    assert commands("flwr supernode register") == registered
    assert [command[:-1] for command in registered] == [command[:-1] for command in printed[1:4]]
