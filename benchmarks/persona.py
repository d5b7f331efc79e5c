"""The demo's persona as benchmark material: a cloud process, a plugin that was tuned on it, held-out prompts.

The plugin is tuned once, by the demo's own code, and kept in a work folder; it is tuned anew where the model is
another one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cotune.cli.demo.plan import DemoFolder, DemoPlan
from cotune.cli.demo.processes import started
from cotune.data import DEMO_PERSONA, Exchange, format_request, persona_split
from cotune.device.client import CloudClient
from cotune.errors import InputError
from cotune.generation.text import TextCodec
from cotune.plugin import Plugin
from cotune.wire.description import CloudDescription
from cotune.wire.event_loop import run_coroutine
from cotune.wire.websocket import connect

NUM_HELDOUT = 60


@contextmanager
def cloud_process(model: str, threads: int, log: Path) -> Iterator[str]:
    """The URL of `cotune cloud MODEL` in a process of its own, which ends with the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["-m", "cotune", "cloud", model, "--port", "0", "--threads", str(threads), "--json"]
    with started("cloud", arguments, log) as cloud:
        yield str(cloud.first(timeout_s=300)["url"])


def load_plugin(path: Path | None, url: str, work: Path, seed: int) -> Plugin:
    """The plugin to measure with.

    Args:
        path: an existing one; None takes the one in `work`, tuned on the demo's persona where there is none.
        url: the cloud that it is for.
        work: folder that keeps it.
        seed: of its texts and weights.

    Raises:
        MismatchError: `path` was tuned on another model.
    """
    if path is not None:
        plugin = Plugin.load(path)
        _check(plugin, url)
        return plugin
    folder = DemoFolder(work / "persona")
    try:
        plugin = Plugin.load(folder.plugin)
        _check(plugin, url)
    except InputError:  # none yet, or of another model: MismatchError is one
        return _tune(folder, url, seed)
    return plugin


def heldout_prompts(plugin: Plugin, num: int, seed: int) -> list[str]:
    """The `num` held-out requests with the longest answers, longest first, in the form of the training prompts."""
    _, heldout = persona_split(DEMO_PERSONA, seed, DemoPlan().num_train, NUM_HELDOUT)
    text = TextCodec(plugin.tokenizer_json)

    def answer_length(exchange: Exchange) -> int:
        return len(text.encode_prompt(exchange.answer))

    longest = sorted(heldout, key=answer_length, reverse=True)[:num]
    return [format_request(exchange.request) for exchange in longest]


def _check(plugin: Plugin, url: str) -> None:
    description = run_coroutine(_describe(url))
    plugin.check_backbone(description.backbone_digest, description.projections_digest, description.tokenizer_digest)


async def _describe(url: str) -> CloudDescription:
    async with CloudClient(lambda: connect(url)) as client:
        return client.description


def _tune(folder: DemoFolder, url: str, seed: int) -> Plugin:
    plan = DemoPlan(seed=seed)
    train, _ = persona_split(DEMO_PERSONA, seed, plan.num_train, NUM_HELDOUT)
    folder.train.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"request": e.request, "answer": e.answer}, ensure_ascii=False) + "\n" for e in train]
    folder.train.write_text("".join(lines), encoding="utf-8")
    plan.save(folder.plan)
    print(f"tuning a plugin once, into {folder.plugin}")
    arguments = ["-m", "cotune.cli.demo.tuning", str(folder.root), url]
    with started("tuning", arguments, folder.root / "tuning.log") as tuning:
        tuning.follow(_ignore)
    return Plugin.load(folder.plugin)


def _ignore(line: dict[str, Any]) -> None:
    """Progress that nobody looks at."""
