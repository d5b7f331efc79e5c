from __future__ import annotations

import asyncio
import importlib.util

import pytest

from cotune.wire.event_loop import make_runner, run_coroutine


async def _loop_module() -> str:
    await asyncio.sleep(0)
    return type(asyncio.get_running_loop()).__module__


def test_uvloop_runs_where_it_is_installed() -> None:
    installed = importlib.util.find_spec("uvloop") is not None
    assert run_coroutine(_loop_module()).startswith("uvloop" if installed else "asyncio")


def test_without_uvloop_the_standard_loop_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with make_runner() as runner:
        assert runner.run(_loop_module()).startswith("asyncio")
