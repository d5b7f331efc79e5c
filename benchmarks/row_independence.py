"""What it costs that rows of one pass do not disturb each other, beside transformers' own model call.

One step of a batch of rows, each with its own text so far. A single row is measured four ways: passes padded to the
measured floor of rows or not, weights in oneDNN's order or not. "Not" in both is a pass whose rows may disturb each
other. transformers' call is its model with its own cache, one token for each row, logits only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

# Before PyTorch is loaded, as the `cotune` command does.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import numpy as np
import torch
from measurement import Timed, describe_machine, finish, interleave, make_parser, time_call
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cotune.generation.protocols import RowWork
from cotune.models.backbone import Backbone
from cotune.models.weights import DTYPES, STARTER, find_model_folder, read_tokenizer

CONTEXT = 64


def small_model(dtype: str) -> Backbone:
    """Random weights in the shape of four layers of Qwen2.5-0.5B, with a small vocabulary."""
    config = LlamaConfig(
        hidden_size=896,
        num_hidden_layers=4,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=8192,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(DTYPES[dtype])
    return Backbone.from_model(model, read_tokenizer(find_model_folder(STARTER)))


MODELS: dict[str, Callable[[str], Backbone]] = {
    STARTER: lambda dtype: Backbone.from_pretrained(STARTER, dtype=dtype),
    "hidden 896, 4 layers": small_model,
}


@contextmanager
def unpacked(wanted: bool) -> Iterator[None]:
    """Within it backbones are made whose weights stay in PyTorch's order."""
    with patch("cotune.models.packed_linear.MIN_ELEMENTS", sys.maxsize if wanted else 2**16):
        yield


def our_step(backbone: Backbone, num_rows: int, *, floor: bool = True) -> Timed:
    """One token more for each of `num_rows` texts, and back."""
    rng = np.random.default_rng(0)
    vocab = min(backbone.spec.vocab_size, 2000)
    cursors = [backbone.cursor(CONTEXT) for _ in range(num_rows)]
    for cursor in cursors:
        cursor.extend(rng.integers(3, vocab, CONTEXT))
    work = [RowWork(cursor=cursor, token_ids=rng.integers(3, vocab, 1)) for cursor in cursors]

    def step() -> None:
        if floor:
            backbone.extend(work)
            return
        with patch("cotune.models.backbone.padded_rows", lambda num, **_: num):
            backbone.extend(work)

    timed = time_call(step)

    def step_and_back() -> float:
        seconds = timed()
        for cursor in cursors:
            cursor.truncate(CONTEXT)
        return seconds

    return step_and_back


def their_step(backbone: Backbone, num_rows: int) -> Timed:
    """The same with the model's own forward call and cache."""
    model: Any = backbone.model
    rng = np.random.default_rng(0)
    vocab = min(backbone.spec.vocab_size, 2000)
    cache = DynamicCache(config=model.config)
    prompts, tokens = (torch.from_numpy(rng.integers(3, vocab, (num_rows, n))) for n in (CONTEXT, 1))
    with torch.inference_mode():
        model(input_ids=prompts, past_key_values=cache)

    def step() -> None:
        with torch.inference_mode():
            model(input_ids=tokens, past_key_values=cache).logits.float().numpy()

    timed = time_call(step)

    def step_and_back() -> float:
        seconds = timed()
        cache.crop(-1)
        return seconds

    return step_and_back


def measure(name: str, dtype: str, args: Any) -> dict[str, Any]:
    """All settings of one model, in turns."""
    with unpacked(False):
        packed = MODELS[name](dtype)
        floors = {"packed": packed.row_floor, "packed_rows_are_independent": packed.rows_are_independent}
        calls: dict[str, Timed] = {}
        for num_rows in args.rows:
            calls[f"{num_rows} ours"] = our_step(packed, num_rows)
            calls[f"{num_rows} transformers"] = their_step(packed, num_rows)
        calls["1 packed, no floor"] = our_step(packed, 1, floor=False)
    if dtype == "float32":
        with unpacked(True):
            plain = MODELS[name](dtype)
            floors |= {"plain": plain.row_floor, "plain_rows_are_independent": plain.rows_are_independent}
            calls["1 plain, floor"] = our_step(plain, 1)
            calls["1 plain, no floor"] = our_step(plain, 1, floor=False)
    times = interleave(calls, runs=args.runs, calls_per_run=args.calls, warm_up=2)
    base = {n: times[f"{n} transformers"]["ms"].median for n in args.rows}
    return {
        "model": name,
        "dtype": dtype,
        "row_floors": floors,
        "times": times,
        "over_transformers": {n: times[f"{n} ours"]["ms"].median / base[n] for n in args.rows},
    }


def main() -> None:
    parser = make_parser(
        "row_independence",
        "Time of a step whose rows do not disturb each other, on one CPU thread.",
        "  python benchmarks/row_independence.py\n  python benchmarks/row_independence.py --rows 1 4 --dtypes float32",
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64], help="rows in a batch")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--runs", type=int, default=7, help="turns (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=5, help="calls in a turn (default: %(default)s)")
    args = parser.parse_args()
    machine = describe_machine()
    torch.set_num_threads(1)
    results = [measure(name, dtype, args) for name in MODELS for dtype in args.dtypes]
    console = Console()
    for result in results:
        table = Table(title=f"{result['model']}, {result['dtype']}, floors {result['row_floors']}")
        table.add_column("rows and setting")
        table.add_column("ms, median (quartiles)", justify="right")
        for name, values in result["times"].items():
            table.add_row(name, str(values["ms"]))
        console.print(table)
    finish("row_independence", args, machine, results, [])


if __name__ == "__main__":
    main()
