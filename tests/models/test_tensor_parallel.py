"""A model in parts: two real processes give the tokens of one, and none outlives the others."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from batched_texts import batched_texts
from processes import TORCHRUN, descendants, kill, python, read_json, wait_until

from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.models.ranks import Ranks
from cotune.wire.websocket import connect

WORKER = str(Path(__file__).parent.parent / "batched_texts.py")
DTYPES = ("float32", "bfloat16")
CLOUD = ["-m", "cotune", "cloud", "starter", "--tensor-parallel", "--json", "--port", "0"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def by_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    log = tmp_path_factory.mktemp("ranks") / "log"
    with python(*TORCHRUN, "2", WORKER, "cpu", *DTYPES, log=log) as ranks:
        shared = read_json(ranks, log)
        assert ranks.wait(30) == 0, log.read_text()
    return shared


@pytest.mark.integration
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_ranks_give_the_tokens_of_one(by_two_ranks: dict[str, Any], dtype: str) -> None:
    shared = by_two_ranks[dtype]
    whole = batched_texts(Backbone.from_pretrained("starter", dtype=dtype))
    assert shared["is_same_alone"] and shared["rows_are_independent"]
    assert shared["basis_digest"] == whole["basis_digest"]
    if dtype == "float32":
        assert shared["token_ids"] == whole["token_ids"]
        assert shared["repeated"] == whole["repeated"]
    # Sums over ranks are in another order than those of one: the last bits differ.
    atol = 2e-4 if dtype == "float32" else 0.5
    np.testing.assert_allclose(shared["target_logits"], whole["target_logits"], atol=atol)


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.integration
def test_no_rank_outlives_rank_0(tmp_path: Path) -> None:
    """The others see it themselves, without torchrun, which would end them; and it ends when it can."""
    log = tmp_path / "log"
    with python(*TORCHRUN, "2", *CLOUD, log=log) as torchrun:
        read_json(torchrun, log)
        ranks = [one for one in descendants(torchrun) if "cotune" in one.cmdline()]
        assert len(ranks) == 2
        try:
            torchrun.send_signal(signal.SIGSTOP)
            first = next(one for one in ranks if one.environ()["RANK"] == "0")
            first.kill()
            assert wait_until(lambda: all(map(is_gone, ranks)))
            torchrun.send_signal(signal.SIGCONT)
            assert torchrun.wait(30) != 0
        finally:
            for one in ranks:
                kill(one)


@pytest.mark.integration
def test_all_ranks_end_when_rank_0_is_asked_to(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def visit(url: str) -> None:
        connection = await connect(url)
        await connection.close()

    with python(*TORCHRUN, "2", *CLOUD, log=log) as torchrun:
        asyncio.run(visit(read_json(torchrun, log)["url"]))
        ranks = [one for one in descendants(torchrun) if "cotune" in one.cmdline()]
        for one in ranks:
            one.send_signal(signal.SIGTERM)
        # torchrun's status is that of its processes.
        assert torchrun.wait(30) == 0, log.read_text()[-3000:]


def test_one_process_alone_is_told_what_to_do() -> None:
    with pytest.raises(InputError, match="torchrun --nproc-per-node 2"):
        Ranks("cpu")


@pytest.mark.gpu
@pytest.mark.integration
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_tokens_of_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with python(*TORCHRUN, "2", WORKER, "cuda", "float32", log=log) as ranks:
        shared = read_json(ranks, log)["float32"]
        assert ranks.wait(60) == 0, log.read_text()
    whole = batched_texts(Backbone.from_pretrained("starter", device="cuda"))
    assert shared["token_ids"] == whole["token_ids"]
