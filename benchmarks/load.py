"""Many devices against one cloud, beside the same backbone under transformers' own batched `generate`.

A cloud process, a process with all devices (each behind its own emulated network), and a process with plain
transformers take turns on the same prompts and the same number of tokens, so that noise hits all alike. Texts are as
long as asked for: nothing ends them. Every device must get the same tokens in every setting, or the benchmark fails.

Target: at 16 devices and 50 ms of round trip at least 85 % of the tokens per second of plain batched decoding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measurement import Spread, Target, describe_machine, finish, make_parser
from persona import heldout_prompts, load_plugin
from rich.console import Console
from rich.table import Table
from synthetic_plugin import random_plugin

from cotune.errors import CotuneError
from cotune.generation.text import TextCodec
from cotune.models.backbone import Backbone
from cotune.plugin import Plugin

LEAST_SHARE = 0.85


class Role:
    """One of the processes of `load_roles.py`, asked in JSON lines."""

    def __init__(self, *arguments: str) -> None:
        script = Path(__file__).parent / "load_roles.py"
        self.name = arguments[0]
        self._process = subprocess.Popen(
            [sys.executable, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hear(self) -> dict[str, Any]:
        """Its next line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CotuneError(f"the {self.name} process ended early; it said why above")
        return dict(json.loads(line))

    def ask(self, **order: Any) -> dict[str, Any]:
        """Do something; what came of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self.hear()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def role(*arguments: str) -> Iterator[Role]:
    """A process that ends with the block."""
    one = Role(*arguments)
    try:
        yield one
    finally:
        one.close()


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One row for each number of devices, and the cloud's memory."""
    with role("cloud", args.model, str(args.threads)) as cloud:
        url = str(cloud.hear()["url"])
        plugin, folder = _plugin(args, url)
        prompts = _prompts(plugin, max(args.devices), args.seed)
        text = TextCodec(plugin.tokenizer_json)
        prompt_ids = [text.encode_prompt(prompt).tolist() for prompt in prompts]
        with role("devices", str(folder), url) as devices, role("plain", args.model, str(args.threads)) as plain:
            devices.hear()
            plain.hear()
            rows = []
            known: dict[int, list[int]] = {}
            for num in args.devices:
                rows.append(_measure(num, args, devices, plain, prompts[:num], prompt_ids[:num], known))
                _show(rows[-1:])
            return rows, cloud.ask()


def _plugin(args: argparse.Namespace, url: str) -> tuple[Plugin, Path]:
    if args.random_plugin is None:
        return load_plugin(args.plugin, url, args.work, args.seed), args.plugin or args.work / "persona" / "plugin"
    folder = args.work / "random-plugin"
    plugin = random_plugin(Backbone.from_pretrained(args.model), args.random_plugin, args.seed)
    plugin.save(folder)
    return plugin, folder


def _measure(
    num: int,
    args: argparse.Namespace,
    devices: Role,
    plain: Role,
    prompts: Sequence[str],
    prompt_ids: Sequence[list[int]],
    known: dict[int, list[int]],
) -> dict[str, Any]:
    options = {"schedule": args.schedule, "answer": args.answer, "max_new_tokens": args.max_new_tokens, "window": 128}
    made: list[dict[str, Any]] = []
    static: list[dict[str, Any]] = []
    continuous: list[dict[str, Any]] = []
    for turn in range(-1, args.repeats):
        one = devices.ask(prompts=list(prompts), rtt_ms=args.rtt_ms, options=options)
        order = {"prompt_ids": list(prompt_ids), "max_new_tokens": args.max_new_tokens}
        batch = plain.ask(**order, continuous=False)
        paged = plain.ask(**order, continuous=True) if args.continuous else None
        for i, token_ids in enumerate(one.pop("token_ids")):
            if known.setdefault(i, token_ids) != token_ids:
                raise CotuneError(f"device {i} got other tokens among {num} devices than before")
        if turn >= 0:
            made.append(one)
            static.append(batch)
            if paged is not None:
                continuous.append(paged)
    pairs = zip(made, static, strict=True)
    row = {
        "devices": num,
        "tokens_per_s": Spread.of([one["tokens_per_s"] for one in made]),
        "plain_tokens_per_s": Spread.of([one["tokens_per_s"] for one in static]),
        "share_of_plain": Spread.of([one["tokens_per_s"] / batch["tokens_per_s"] for one, batch in pairs]),
        "first_token_p50_ms": Spread.of([one["first_token_ms"][0] for one in made]),
        "first_token_p99_ms": Spread.of([one["first_token_ms"][1] for one in made]),
        "gap_p50_ms": Spread.of([one["gap_ms"][0] for one in made]),
        "gap_p99_ms": Spread.of([one["gap_ms"][1] for one in made]),
        "fairness": Spread.of([one["fairness"] for one in made]),
        "changed_rate": made[0]["changed_rate"],
        "wasted_per_token": Spread.of([one["wasted_per_token"] for one in made]),
        "device_cpu_share": Spread.of([one["device_cpu_share"] for one in made]),
        "devices_peak_mb": made[-1]["peak_mb"],
        "plain_peak_mb": static[-1]["peak_mb"],
    }
    if continuous:
        row["continuous_tokens_per_s"] = Spread.of([one["tokens_per_s"] for one in continuous])
    return row


def _prompts(plugin: Plugin, num: int, seed: int) -> list[str]:
    """Held-out requests, the longest answers first, repeated with a mark of their own where there are not enough."""
    prompts = heldout_prompts(plugin, min(num, 60), seed)
    return [prompts[i % len(prompts)] + (f" {i}" if i >= len(prompts) else "") for i in range(num)]


def _show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="devices against one cloud")
    names = ["devices", "tokens_per_s", "plain_tokens_per_s", "share_of_plain", "first_token_p50_ms"]
    names += ["first_token_p99_ms", "gap_p50_ms", "gap_p99_ms", "fairness", "wasted_per_token", "device_cpu_share"]
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{row[n].median:.3g}" if isinstance(row[n], Spread) else str(row[n]) for n in names))
    Console(width=200).print(table)


def main() -> None:
    parser = make_parser(
        "load",
        __doc__ or "",
        "  python benchmarks/load.py\n"
        "  python benchmarks/random_model.py runs/benchmarks/qwen2-97m\n"
        "  python benchmarks/load.py --model runs/benchmarks/qwen2-97m --random-plugin 0.1 --devices 16\n",
    )
    parser.add_argument("--model", default="starter", help="model folder, or starter (default: %(default)s)")
    parser.add_argument("--plugin", type=Path, default=None, help="plugin for it; one is tuned on the demo's persona")
    parser.add_argument(
        "--random-plugin", type=float, help="instead of tuning: a random one, its delta so many times the base logits"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="keeps the plugin")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rtt-ms", type=float, default=50.0)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads of the cloud and of plain decoding")
    parser.add_argument("--schedule", default="optimistic")
    parser.add_argument("--answer", default="correction")
    parser.add_argument("--continuous", action="store_true", help="transformers' continuous batching too")
    args = parser.parse_args()
    machine = describe_machine()
    rows, cloud = measure(args)
    _show(rows)
    targets = [
        Target(
            what="share of plain batched decoding at 16 devices",
            measured=row["share_of_plain"].median,
            limit=LEAST_SHARE,
            unit="of plain",
            is_upper=False,
        )
        for row in rows
        if row["devices"] == 16
    ]
    args.model = args.model.rstrip("/").rsplit("/", 1)[-1]
    finish("load", args, machine, {"rows": rows, "cloud_peak_mb": cloud["peak_mb"]}, targets)


if __name__ == "__main__":
    main()
