"""What a forward-only step costs beside the two forward passes that it cannot do without: time and memory.

A random model in Llama's form, all parameters tuned. The published step (MeZO, Algorithm 1) is written out beside ours:
in place, +eps, -2 eps, +eps and the update, with Gaussian directions drawn again from the seed each time. Memory is the
peak of resident memory of a process of its own, counted from when the weights are there. Times are processor time of
one thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurement import Target, Timed, describe_machine, finish, interleave, make_parser
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cotune.data.batches import EncodedExample, TokenBatch
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.weights import DTYPES
from cotune.tuning.answer_loss import TokenBatches
from cotune.tuning.objectives import AnswerNats
from cotune.tuning.sparse_mask import mask_by_magnitude
from cotune.tuning.zeroth_order import ZerothOrderConfig, ZerothOrderTuner

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 13, "vocab_size": 8192}
MEMORY_OF = ("inference", "published", "all", "mask", "lora")


def random_model(dtype: str, seed: int) -> PreTrainedModel:
    """50 M parameters."""
    config = LlamaConfig(
        **SIZES,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(DTYPES[dtype]).eval().requires_grad_(False)


def random_batch(num_sequences: int, length: int) -> TokenBatch:
    """Half of each sequence is answer."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, SIZES["vocab_size"], (num_sequences, length + 1))
    examples = [EncodedExample(row, (length + 1) // 2) for row in ids]
    (batch,) = TokenBatches(examples, num_sequences, pad_token_id=0, seed=0).epoch(0)
    return batch


@torch.no_grad()
def published_step(tuner: Any, params: dict[str, Tensor], batch: TokenBatch, seed: int) -> None:
    """Algorithm 1 of MeZO as printed: four sweeps over the parameters with the same Gaussian numbers."""
    zo_eps, learning_rate = 1e-3, 1e-9

    def add(scale: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for theta in params.values():
            theta.add_(torch.empty_like(theta).normal_(generator=generator), alpha=scale)

    add(zo_eps)
    plus = tuner.objective(tuner.model, params, batch).mean
    add(-2 * zo_eps)
    minus = tuner.objective(tuner.model, params, batch).mean
    add(zo_eps)
    add(-learning_rate * (plus - minus) / (2 * zo_eps))


def works(model: PreTrainedModel, batch: TokenBatch) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    tuner = ZerothOrderTuner(model, ZerothOrderConfig(), AnswerNats())
    state = tuner.init(params)
    state.learning_rate = 1e-9
    direction = partial(state.numbers.direction, num_pages=1)

    def two_passes() -> None:
        tuner.evaluate(state, batch)
        tuner.evaluate(state, batch)

    def signs() -> None:
        z = direction(1)
        for block in state.numbers.blocks():
            block.signs(z, block.flat.dtype)

    return {
        "two forward passes": two_passes,
        "step": lambda: tuner.step(state, batch),
        "published step": lambda: published_step(tuner, params, batch, 1),
        "all signs once": signs,
        "update": lambda: state.numbers.add([direction(1)], [1e-9]),
    }


def processor_time(work: Callable[[], object]) -> Timed:
    """Seconds of this process's one thread: the time of an idle machine, also on one that is shared."""

    def timed() -> float:
        started_s = time.process_time()
        work()
        return time.process_time() - started_s

    return timed


def child(what: str, args: Any) -> None:
    """In a process of its own: print the peak beyond the weights, in MB."""
    torch.set_num_threads(1)
    model, batch = random_model(args.dtype, args.seed), random_batch(args.sequences, args.length)
    params = {name: p.detach() for name, p in model.named_parameters()}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in params.values())
    mask = mask_by_magnitude(params, 0.01) if what == "mask" else None
    tuner = ZerothOrderTuner(model, ZerothOrderConfig(), AnswerNats(), mask=mask)
    state = tuner.init(params)
    steps: dict[str, Callable[[], object]] = {
        "inference": lambda: tuner.evaluate(state, batch),
        "published": lambda: published_step(tuner, params, batch, 1),
        "all": lambda: tuner.step(state, batch),
        "mask": lambda: tuner.step(state, batch),
    }
    if what == "lora":
        adapter = LoraAdapter.fresh(model, LoraShape())
        with adapter.attach(model) as attached:
            on_adapter = ZerothOrderTuner(attached, ZerothOrderConfig(), AnswerNats())
            adapted = on_adapter.init(adapter.params)
            before, peak = _peak_of(lambda: on_adapter.step(adapted, batch))
    else:
        before, peak = _peak_of(steps[what])
    print(json.dumps({"weights_mb": weights / 1e6, "before_mb": before, "peak_mb": peak}))


def _peak_of(work: Callable[[], object]) -> tuple[float, float]:
    """Resident memory before three runs and its peak in them, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    for _ in range(3):
        work()
    return before, _resident("VmHWM")


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def measure_memory(args: Any) -> dict[str, dict[str, float]]:
    found = {}
    for what in MEMORY_OF:
        command = [sys.executable, __file__, "--child", what, "--dtype", args.dtype, "--seed", str(args.seed)]
        command += ["--sequences", str(args.sequences), "--length", str(args.length)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
        found[what] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = make_parser(
        "zeroth_order",
        "Time and memory of a MeZO step on 50 M random parameters, on one CPU thread.",
        "  python benchmarks/zeroth_order.py\n  python benchmarks/zeroth_order.py --dtype bfloat16 --length 64",
    )
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--sequences", type=int, default=4, help="in a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=7, help="turns (default: %(default)s)")
    parser.add_argument("--child", choices=MEMORY_OF, help="measure one thing's memory in this process")
    args = parser.parse_args()
    if args.child:
        child(args.child, args)
        return
    machine = describe_machine()
    torch.set_num_threads(1)
    memory = measure_memory(args)
    model, batch = random_model(args.dtype, args.seed), random_batch(args.sequences, args.length)
    calls = {name: processor_time(work) for name, work in works(model, batch).items()}
    times = interleave(calls, runs=args.runs, calls_per_run=1, warm_up=1)

    console = Console()
    table = Table(title=f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.dtype}")
    table.add_column("what")
    table.add_column("ms, median (quartiles)", justify="right")
    for name, values in times.items():
        table.add_row(name, str(values["ms"]))
    for name, values in memory.items():
        table.add_row(f"memory: {name}", f"{values['peak_mb']:.0f} MB, {values['before_mb']:.0f} before")
    console.print(table)
    passes = times["two forward passes"]["ms"].median
    above = {n: values["peak_mb"] - values["before_mb"] for n, values in memory.items()}
    whole = memory["inference"]["weights_mb"] + above["inference"]
    targets = [
        Target(
            what="a step over two forward passes",
            measured=times["step"]["ms"].median / passes,
            limit=1.10,
            unit="times",
        ),
        Target(
            what="a step over the published one",
            measured=times["step"]["ms"].median / times["published step"]["ms"].median,
            limit=1.02,
            unit="times",
        ),
        *(
            Target(
                what=f"memory of weights and a step, {name}, over inference",
                measured=(memory[name]["weights_mb"] + above[name]) / whole,
                limit=1.05,
                unit="times",
            )
            for name in ("all", "mask", "lora")
        ),
    ]
    finish("zeroth_order", args, machine, {"times": times, "memory": memory}, targets)


if __name__ == "__main__":
    main()
