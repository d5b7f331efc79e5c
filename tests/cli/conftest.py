"""The command line in this process, with what it printed and left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from cotune.cli.main import main


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    status: int
    out: str
    err: str

    def check_refusal(self, words: str, status: int = 2) -> None:
        """Refused in one clear sentence, and nothing else was said."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ") and words in lines[0], self.err
        assert "Traceback" not in self.err and self.out == ""
        assert self.status == status


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls `main` as the installed command does."""
    monkeypatch.delenv("COTUNE_TOKEN", raising=False)

    def call(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["cotune", *map(str, arguments)])
        capsys.readouterr()
        status: object = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code
        assert isinstance(status, int | None)
        captured = capsys.readouterr()
        return Outcome(status or 0, captured.out, captured.err)

    return call
