"""The commands of docs/federated.md, in their order: what is Python runs, and Flower's programs know every option."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="flwr is not installed; pip install 'cotune[flower]'")

from tiny_models import tiny_backbone, tokenizer_json

from cotune.cli.federate_keys import next_steps
from cotune.federation.flower.server_folder import ServerFolder
from cotune.federation.signing import DeviceKey

PAGE = (Path(__file__).parents[3] / "docs" / "federated.md").read_text(encoding="utf-8")
# `flwr` itself is run by the test of a real deployment.
PROGRAMS = ("flower-superlink", "flower-supernode")
NODES = ("kitchen", "office", "garage")


def commands(program: str) -> list[list[str]]:
    """As the page has them, at the beginning of an indented line; the drawing has wider gaps."""
    whole = re.sub(r" \\\n\s+", " ", PAGE)
    return [shlex.split(line) for line in re.findall(rf"^    ({program} \S[^\n]*)$", whole, re.MULTILINE)]


def test_keys_run_and_app_are_made_by_the_pages_own_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_backbone("llama").model.save_pretrained("tiny")
    Path("tiny/tokenizer.json").write_bytes(tokenizer_json())
    Path("federation.toml").write_text('model = "tiny"\n[data]\nnum_judge = 0\n[adapter]\nrank = 2\n')
    first, second = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    for block in (first, second):
        exec(compile(block, "docs/federated.md", "exec"), {})  # noqa: S102  our own page
    run = ServerFolder.read("run-1")
    assert run.registry.devices.keys() == set(NODES)
    assert DeviceKey.load("garage.key").public_key == run.registry.devices["garage"]
    app = tomllib.loads(Path("app/pyproject.toml").read_text())
    assert app["tool"]["flwr"]["app"]["config"]["folder"] == str(tmp_path / "run-1")
    exported = Path("app/environment.env").read_text()
    (line,) = re.findall(r"^    export (.*)$", PAGE, re.MULTILINE)
    assert set(line.split()) == set(exported.split())


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
