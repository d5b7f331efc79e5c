"""What docs/federated.md has for devices: systemd reads the units, and the script supervises a node that dies."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.integration

PAGE = Path(__file__).parents[2] / "docs" / "federated.md"
# Says who it is and whom it started, then either dies with that one left behind or waits for SIGTERM.
NODE = """\
import os, pathlib, signal, subprocess, sys, time
seen = pathlib.Path(os.environ["SEEN"])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
number = len(list(seen.iterdir()))
(seen / f"{number}.new").write_text(f"{os.getpid()} {child.pid} {' '.join(sys.argv[1:])}")
(seen / f"{number}.new").rename(seen / f"{number}.node")
if number == 0:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    units = {}
    for name, unit in zip(("cotune-trainer", "cotune-node"), blocks("ini"), strict=True):
        units[name] = tmp_path / f"{name}.service"
        # Only that the programs exist cannot be had here.
        units[name].write_text(re.sub(r"/srv/cotune/venv/bin/\S+", "/bin/true", unit))
    command = ["systemd-analyze", "verify", "--man=no", *map(str, units.values())]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stderr == ""
    units["cotune-node"].write_text(units["cotune-node"].read_text().replace("RestartSec=65", "RestartSec=65 apples"))
    assert "apples" in subprocess.run(command, capture_output=True, text=True, timeout=60).stderr


@dataclass
class Loop:
    """The script of the page, at work on a node that is none."""

    process: subprocess.Popen[bytes]
    seen: Path

    def nodes(self, num: int) -> list[list[str]]:
        """Of so many starts: the node's process, the one that it started, and its arguments."""
        wait_for(lambda: len(list(self.seen.glob("*.node"))) >= num)
        return [path.read_text().split() for path in sorted(self.seen.glob("*.node"))]

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    (script,) = (one for one in blocks("sh") if one.startswith("#!/bin/sh"))
    program, seen = tmp_path / "flower-supernode", tmp_path / "seen"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(NODE)} "$@"\n')
    program.chmod(0o755)
    seen.mkdir()
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SEEN": str(seen)}
    command = ["sh", "-c", script.replace("sleep 65", "sleep 0.1")]
    made = Loop(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL), seen)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        for path in seen.glob("*.node"):
            with suppress(ProcessLookupError):
                os.killpg(int(path.read_text().split()[0]), signal.SIGKILL)


def wait_for(condition: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends_s, "not in time"
        time.sleep(0.02)


def is_gone(pid: str) -> bool:
    """Ended, whether or not its parent has asked how."""
    try:
        return psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_the_script_clears_up_after_a_node_and_starts_it_again(loop: Loop) -> None:
    (dead, left, *_), (living, child, *arguments) = loop.nodes(2)
    wait_for(lambda: is_gone(dead) and is_gone(left))
    assert not is_gone(living) and not is_gone(child)
    assert arguments[:2] == ["--root-certificates", "certificates/ca.crt"]
    assert 'trainer="/run/cotune/kitchen"' in arguments
    loop.end()
    wait_for(lambda: is_gone(living) and is_gone(child))
