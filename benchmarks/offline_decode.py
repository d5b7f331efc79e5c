"""What a token costs on the device: ONNX Runtime with 4 bits beside PyTorch's bfloat16 and llama.cpp's Q4_K_M.

The same random weights in the shape of 151 M numbers that the prototype was measured with (hidden 768, 16 layers,
vocabulary 32,768), one thread, all in one process. Q4_K_M keeps the head in 6 bits, so a graph with a head of 8 stands
beside the default of 4. The runtimes take turns, so that noise hits all alike, and a ratio is formed within a turn.
llama.cpp is measured where llama-cpp-python is installed.
"""

from __future__ import annotations

import importlib.util
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from decode_speed import decode_s, prefill_s, random_prompt
from measurement import Spread, Target, describe_machine, finish, make_parser
from model_shapes import DEVICE_CONFIGS, named_config
from random_model import write_random_folder
from rich.console import Console
from rich.table import Table
from torch_text import TorchText

from cotune.compression.gguf_export import GgufExportConfig, export_gguf
from cotune.compression.onnx_export import OnnxExportConfig, export_onnx
from cotune.compression.written_weights import Rounding
from cotune.device.offline.model import OfflineSettings, OfflineText
from cotune.device.offline.runtimes import load_offline_model
from cotune.evaluation.model_shape import KNOWN_CONFIGS
from cotune.models.weights import load_model

TORCH, ONNX, LLAMA = "torch bfloat16", "ONNX int4", "llama.cpp Q4_K_M"
ONNX_8 = "ONNX int4, head int8"
Turn = dict[str, dict[str, float]]


def texts(folder: Path, *, context: int, threads: int) -> dict[str, OfflineText]:
    """A text in each runtime that is installed; exports are made beside `folder` where they are not there."""
    torch.set_num_threads(threads)
    settings = OfflineSettings(num_threads=threads, context=context)
    found: dict[str, OfflineText] = {TORCH: TorchText(load_model(folder, dtype="bfloat16", device="cpu").eval())}
    for name, end, rounding in ((ONNX, "onnx4", Rounding()), (ONNX_8, "onnx4-head8", Rounding(embedding_bits=8))):
        exported = folder.with_name(f"{folder.name}-{end}")
        if not exported.is_dir():
            export_onnx(folder, exported, OnnxExportConfig(rounding=rounding))
        found[name] = load_offline_model(exported, settings).open()
    if importlib.util.find_spec("llama_cpp") is None:
        return found
    exported = folder.with_name(f"{folder.name}-q4_k_m")
    if not exported.is_dir():
        export_gguf(folder, exported, GgufExportConfig(kind="Q4_K_M"))
    return {**found, LLAMA: load_offline_model(exported, settings).open()}


def turn(opened: dict[str, OfflineText], prompt: list[int], num_tokens: int) -> Turn:
    """Each runtime once: milliseconds of a token read and of a token written, by its name.

    `decode_cpu_ms` is processor time, which on one thread is that of the clock on an idle machine.
    """
    found: Turn = {}
    for name, text in opened.items():
        read_s = prefill_s(text, prompt)
        before_s = time.process_time()
        written = Spread.of([1e3 * step for step in decode_s(text, num_tokens)])
        worked_s = time.process_time() - before_s
        found[name] = {
            "prefill_ms": 1e3 * read_s / len(prompt),
            "decode_ms": written.median,
            "decode_cpu_ms": 1e3 * worked_s / num_tokens,
        }
    return found


def ratios(turns: list[Turn], what: str, other: str) -> Spread:
    """How many times as long the other runtime takes as ONNX Runtime, over the turns."""
    return Spread.of([one[other][what] / one[ONNX][what] for one in turns])


def targets_of(turns: list[Turn]) -> list[Target]:
    """Decoding against both others, as far as they were measured."""
    wanted = {TORCH: ("decode speed over torch bfloat16's", 4.0), LLAMA: ("decode speed over llama.cpp Q4_K_M's", 1.0)}
    return [
        Target(what=what, measured=ratios(turns, "decode_ms", other).median, limit=limit, unit="times", is_upper=False)
        for other, (what, limit) in wanted.items()
        if other in turns[0]
    ]


def results_of(turns: list[Turn]) -> dict[str, Any]:
    """Spreads over the turns, by runtime."""
    names = list(turns[0])
    return {
        name: {
            **{what: Spread.of([one[name][what] for one in turns]) for what in turns[0][name]},
            "prefill_ratio": ratios(turns, "prefill_ms", name),
            "decode_ratio": ratios(turns, "decode_ms", name),
            "decode_cpu_ratio": ratios(turns, "decode_cpu_ms", name),
        }
        for name in names
    }


def make_args(arguments: list[str] | None = None) -> Namespace:
    parser = make_parser(
        "offline_decode",
        __doc__ or "",
        "  python benchmarks/offline_decode.py\n  python benchmarks/offline_decode.py --shape 25m --turns 3\n",
    )
    shapes = [*DEVICE_CONFIGS, *KNOWN_CONFIGS]
    parser.add_argument("--shape", choices=shapes, default="151m", help="of the weights (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="folder of the models")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--context", type=int, default=512, help="room of a text (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens that are read (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="written in a turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="after one that warms up (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    args, machine, console = make_args(arguments), describe_machine(), Console()
    folder = args.work / f"random-{args.shape}"
    if not folder.is_dir():
        write_random_folder(folder, named_config(args.shape), seed=args.seed)
    opened = texts(folder, context=args.context, threads=args.threads)
    prompt = random_prompt(args.prompt, named_config(args.shape).vocab_size, seed=args.seed)
    turns = [turn(opened, prompt, args.tokens) for _ in range(args.turns + 1)][1:]
    results = results_of(turns)
    shown = {"prefill_ms": "prefill, ms", "decode_ms": "decode, ms", "decode_ratio": "over ONNX int4's"}
    shown |= {"decode_cpu_ms": "decode, CPU ms", "decode_cpu_ratio": "over ONNX int4's"}
    table = Table("a token of", *shown.values())
    for name, found in results.items():
        table.add_row(name, *(str(found[what]) for what in shown))
    console.print(table)
    if LLAMA not in opened:
        console.print(f"{LLAMA} is not measured: llama-cpp-python is not installed")
    finish("offline_decode", args, machine, {"runtimes": results, "turns": turns}, targets_of(turns))


if __name__ == "__main__":
    main()
