"""One model in one format under a limit of memory that the kernel enforces: does it fit, and how fast is it?

The process imports what it runs the model with, then limits itself, then loads. The limit is `RLIMIT_AS`, which counts
addresses: every mapping counts in full, weights that are mapped from a file too. A device has to hold those in memory
as well, or it reads them from its disk for every token; `RLIMIT_DATA` would leave them out. Libraries, though, map much
more than they touch (PyTorch 600 MB of which 200 are resident). So what counts of them is what is resident when the
imports are done, and the limit for what comes after is

    room = limit - resident;  RLIMIT_AS = addresses in use + room

A control group would count the same pages, and would push mapped ones out instead of refusing. It takes rights that a
user rarely has.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cotune.errors import InputError, first_line

FORMATS = ("float32", "bfloat16", "onnx8", "onnx4", "gguf8", "gguf4")
"""PyTorch in two number types; ONNX Runtime and llama.cpp with 8 and 4 bits."""

_STATUS = Path("/proc/self/status")
_TORCH_FORMATS = FORMATS[:2]


class NoRoomError(InputError):
    """The limit is less than what the process takes before it has loaded anything."""


def imported(kind: str) -> Callable[[Path, int, int], Any]:
    """Load all code that runs this format; gives what opens a text in (folder, threads, context)."""
    importlib.import_module("decode_speed")
    if kind in _TORCH_FORMATS:
        torch = importlib.import_module("torch")
        for name in ("transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2"):
            importlib.import_module(name)
        load_model = importlib.import_module("cotune.models.weights").load_model
        torch_text = importlib.import_module("torch_text").TorchText

        def open_torch(folder: Path, threads: int, context: int) -> Any:
            torch.set_num_threads(threads)
            return torch_text(load_model(folder, dtype=kind, device="cpu").eval())

        return open_torch
    importlib.import_module("onnxruntime" if kind.startswith("onnx") else "llama_cpp")
    settings = importlib.import_module("cotune.device.offline.model").OfflineSettings
    load = importlib.import_module("cotune.device.offline.runtimes").load_offline_model
    return lambda folder, threads, context: load(folder, settings(num_threads=threads, context=context)).open()


def limit_memory(limit_bytes: int) -> int:
    """Let this process take no more from now on; see above.

    Returns:
        The room that is left.

    Raises:
        NoRoomError: it has taken more already.
    """
    gc.collect()
    resident, addresses = _kilobytes("VmRSS") * 1024, _kilobytes("VmSize") * 1024
    room = limit_bytes - resident
    if room <= 0:
        raise NoRoomError(
            f"the runtime alone takes {resident / 2**20:.0f} MiB, expected less than {limit_bytes / 2**20:.0f} MiB"
        )
    resource.setrlimit(resource.RLIMIT_AS, (addresses + room, addresses + room))
    return room


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What a format comes to; an error where it does not fit."""
    open_text = imported(args.format)
    decode_speed = importlib.import_module("decode_speed")
    resident = _kilobytes("VmRSS") * 1024
    started_s = time.perf_counter()
    try:
        if args.limit_bytes is not None:
            limit_memory(args.limit_bytes)
        text = open_text(args.folder, args.threads, args.context)
        load_s = time.perf_counter() - started_s
        prompt = decode_speed.random_prompt(args.prompt, args.vocab)
        found = decode_speed.speeds(text, prompt, num_tokens=args.tokens, runs=args.runs)
    except (MemoryError, RuntimeError, OSError, InputError) as error:
        # PyTorch says that memory is short by bare errors, and no result names the place of a folder.
        said = first_line(error).replace(str(args.folder), args.folder.name)
        return {"fits": False, "error": said if isinstance(error, InputError) else f"PyTorch got no memory: {said}"}
    return {
        "fits": True,
        "load_s": load_s,
        **{name: asdict(spread) for name, spread in found.items()},
        "runtime_bytes": resident,
        "peak_bytes": _kilobytes("VmHWM") * 1024,
    }


def _kilobytes(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise InputError(f"{_STATUS} has no {name}; measure on Linux")


def main() -> None:
    """Entry point; prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the model, as the format has it")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--vocab", type=int, required=True, help="token ids of the prompt are below")
    parser.add_argument("--limit-bytes", type=int, help="none if left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=256, help="tokens that have to fit")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt, read in one piece")
    parser.add_argument("--tokens", type=int, default=16, help="written behind it")
    parser.add_argument("--runs", type=int, default=3)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
