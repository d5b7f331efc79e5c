"""GEPA and MIPROv2 as arms, on a scripted cloud that also proposes; skipped without DSPy."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from dspy_arms import DSPY_ARMS, has_dspy
from sandwich_arms import CloudAlone
from sandwich_bench import Bench, Course
from sandwich_tasks import Sizes, load_task
from scripted_clouds import MemoryCloud
from zocp_cloud import GOOD, label_of

from cotune.errors import BudgetError, InputError
from cotune.sandwich.account import Account
from cotune.sandwich.budget import Budget
from cotune.sandwich.chat import CloudModel
from cotune.sandwich.openai_cloud import OpenAiCloud
from cotune.sandwich.scripted_cloud import scripted_server

TOKENS = 6_000
SIZES = Sizes(num_train=3, num_unlabelled=1, num_validation=2, num_test=1, seed=0)


class NoEdge:
    """These arms use the cloud alone."""

    def count_in(self, account: Account) -> None:
        """There is nothing to count."""


def propose(body: Mapping[str, Any]) -> str:
    """The good instruction in every field that DSPy asks for; else as the task's cloud."""
    fields = re.findall(r"\[\[ ## (\w+) ## \]\]", str(body["messages"]))
    if not fields:
        return label_of(body)
    names = dict.fromkeys([*fields, "new_instruction", "completed"])
    if "JSON" in str(body["messages"]):
        return json.dumps(dict.fromkeys(names, GOOD))
    return "\n\n".join(f"[[ ## {name} ## ]]\n{GOOD}" for name in names)


def bench_of(cloud: CloudModel, folder: Path, tokens: int) -> Bench:
    return Bench(
        task=load_task("nlu", None, SIZES),
        cloud=cloud,
        model="scripted",
        price=None,
        edge=NoEdge(),  # type: ignore[arg-type]
        budget=Budget(tokens=tokens),
        course=Course(),
        seed=0,
        folder=folder,
    )


def test_without_the_package_they_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not has_dspy()
    for arm in DSPY_ARMS.values():
        with pytest.raises(InputError, match=r"pip install 'cotune\[dspy\]'"):
            arm(bench_of(MemoryCloud(), tmp_path, 100))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", list(DSPY_ARMS))
def test_an_optimiser_keeps_to_its_tokens_and_sends_nothing_private(tmp_path: Path, name: str) -> None:
    pytest.importorskip("dspy", reason="DSPy is not installed")
    with scripted_server(propose) as server, closing(OpenAiCloud(server.base_url)) as cloud:
        learnt = DSPY_ARMS[name](bench_of(cloud, tmp_path, TOKENS))
        sent = b"".join(server.bodies)
        with pytest.raises(BudgetError):
            DSPY_ARMS[name](bench_of(cloud, tmp_path, 10))
    assert isinstance(learnt.server, CloudAlone) and learnt.notes["metric_calls"] > 1
    assert 0 < learnt.taken.cloud.tokens <= TOKENS and learnt.sent
    assert b"example.org" not in sent and b"Ann Lee" not in sent
    if name == "B gepa":
        assert learnt.server.prompt == GOOD
