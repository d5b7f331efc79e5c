"""Fine-tuning and deploying LLMs over edges (arXiv 2408.10691), third next check: the spectrum of devices.

From 256 MB to 16 GB of memory and 1 to N threads, what fits and how fast: models in PyTorch, ONNX and GGUF, each in a
process of its own whose memory is limited by the kernel. `benchmarks/limited_decode.py` says how, and what counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Cells, OutOfTimeError, Value
from page import Page, about_run
from result_folder import grid, plot_groups, plot_lines
from study_options import StudyParser, at_least_one, open_cells, plain_endings, positive, results_of

from cotune.cli.memory_size import parse_bytes
from cotune.compression.gguf_export import GgufExportConfig, export_gguf
from cotune.compression.onnx_export import OnnxExportConfig, export_onnx
from cotune.compression.written_weights import Rounding
from cotune.device.offline.memory import available_bytes
from cotune.device.offline.model import num_processors
from cotune.errors import CotuneError, InputError
from cotune.evaluation.markup import Html, bullets, join
from cotune.evaluation.measured_memory import ALLOCATOR
from cotune.evaluation.model_shape import ModelShape
from cotune.evaluation.report import Section
from cotune.models.weights import digest_folder, find_model_folder

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"
NAME = "device_spectrum"
# The meaning of a cell: one more, and all are run again.
PROTOCOL = 2
TIMEOUT_S = 3600.0
NO_THREAD = "libgomp: Thread creation failed"
"""What the runtime of PyTorch's threads says where it gets no memory for a stack, and ends the process."""
SIZES = ("256MB", "512MB", "1GB", "2GB", "4GB", "8GB", "16GB")
FORMATS = {
    "float32": "torch float32",
    "bfloat16": "torch bfloat16",
    "onnx8": "ONNX 8 bit",
    "onnx4": "ONNX 4 bit",
    "gguf8": "GGUF Q8_0",
    "gguf4": "GGUF Q4_K_M",
}
"""What runs a model, and what the page calls it."""
EXPECTED = {"question": "what fits 256 MB to 16 GB with 1 to N threads, and how fast; no numbers given"}
DEVIATIONS = (
    "The limit is RLIMIT_AS in the process, set when its libraries are imported: what is resident then, and every "
    "address that is mapped afterwards, count. Weights that are mapped from a file count in full, as a device must "
    "hold them or read them again for every token; addresses that libraries reserve and never touch do not count.",
    "What the rest of a device's system needs is not in it: a device of 512 MB has less for a model.",
    "A smaller process is the same process under a larger limit, so that limits above the first that fits are only run "
    "with --every-limit.",
    "Random shapes have random weights in bfloat16 and the tokenizer of starter; what a step costs does not depend on "
    "weights. Their head or embedding is rounded like the rest.",
    "One machine: threads share its memory bandwidth, and slower processors are not emulated.",
)


def make_parser() -> argparse.ArgumentParser:
    made = StudyParser(
        prog=f"python reproduce/{NAME}.py",
        description=__doc__,
        epilog=(
            "examples:\n"
            "  python reproduce/device_spectrum.py      # starter, and random weights in shapes of 1 to 600 M\n"
            "  python reproduce/device_spectrum.py --models ./my-llama --shapes --memory 256MB 1GB --threads 1 2 4\n"
            "  python reproduce/device_spectrum.py --shapes tinyllama-1.1b --formats onnx4 onnx8 bfloat16\n\n"
            "A shape of n numbers takes 2 n bytes of disk in --work, and about 1.1 n and 0.6 n with 8 and 4 bits.\n"
            "Finished cells are kept in --cells and never run again."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--models", nargs="*", default=["starter"], help="folders, or starter (default: starter)")
    made.add_argument(
        "--shapes", nargs="*", default=["1m", "25m", "151m", "600m"], help="random weights (default: %(default)s)"
    )
    made.add_argument("--formats", nargs="+", choices=list(FORMATS), help="(default: all that are installed)")
    made.add_argument("--memory", nargs="+", default=list(SIZES), help="limits (default: %(default)s)")
    made.add_argument(
        "--threads", nargs="+", type=at_least_one, help="of a step (default: 1, 2, 4, ... up to the processors)"
    )
    made.add_argument("--every-limit", action="store_true", help="go on above the first limit that fits")
    made.add_argument("--context", type=at_least_one, default=256, help="tokens that must fit (default: %(default)s)")
    made.add_argument("--prompt", type=at_least_one, default=64, help="tokens that are read (default: %(default)s)")
    made.add_argument("--tokens", type=at_least_one, default=16, help="written behind it (default: %(default)s)")
    made.add_argument("--runs", type=at_least_one, default=5, help="texts after a first one (default: %(default)s)")
    made.add_argument("--work", type=Path, default=Path("runs/reproduce/spectrum"), help="folder of exported models")
    made.add_argument("--budget-minutes", type=positive, default=None, help="begin no cell after so much time")
    made.add_argument("--cells", type=Path, default=HERE / "cells", help="folder of finished cells")
    made.add_argument("--out", type=Path, help=f"folder of results (default: reproduce/results/MODEL/{NAME})")
    return made


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model as a Hugging Face folder.

    Attributes:
        name: in tables.
        folder: of its weights.
        identity: what tells it from others of the name.
        shape: its sizes.
    """

    name: str
    folder: Path
    identity: str
    shape: ModelShape


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in one format with so many threads.

    Attributes:
        model, kind, threads: which.
        cells: by limit, in bytes, ascending; of those that were run.
        least: the smallest limit under which it fits; None where there is none, or none is known yet.
    """

    model: str
    kind: str
    threads: int
    cells: dict[int, Value]

    @property
    def least(self) -> int | None:
        return next((limit for limit, cell in self.cells.items() if cell["fits"]), None)

    @property
    def fitting(self) -> Value | None:
        """What it came to under that limit."""
        return None if self.least is None else self.cells[self.least]


class SmallMachineError(CotuneError):
    """This machine has less memory free than a limit allows, so that it would not be the limit that is met."""


class Study:
    """Cells of some models.

    Args:
        args: from `make_parser`.

    Raises:
        InputError: a model or an option that cannot be used.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.limits = sorted({parse_bytes(size, "--memory") for size in args.memory})
        self.threads = args.threads or [2**i for i in range(num_processors().bit_length())]
        self.formats = [kind for kind in args.formats or FORMATS if _is_installed(kind, told=args.formats is not None)]
        self.cells: Cells = open_cells(args)
        self.sources = [self._model(name) for name in args.models] + [self._shape(name) for name in args.shapes]
        needed = args.prompt + args.tokens
        for source in self.sources:
            if needed > self._context(source):
                raise InputError(
                    f"prompt and tokens are {needed}, expected at most {self._context(source)}, the context with "
                    f"{source.name}; take fewer"
                )
        if not self.sources:
            raise InputError("there is no model, expected some of --models or --shapes")
        if len({source.name for source in self.sources}) < len(self.sources):
            raise InputError("two models have the same name, expected different ones; rename a folder")

    def _model(self, name: str) -> Source:
        folder = find_model_folder(name)
        return Source(
            name=Path(name).name,
            folder=folder,
            identity=digest_folder(folder)[:16],
            shape=ModelShape.load(folder / "config.json"),
        )

    def _shape(self, name: str) -> Source:
        sys.path.append(str(BENCHMARKS))
        from model_shapes import named_config
        from random_model import write_random_folder

        config, folder = named_config(name), self.args.work / name
        if not folder.is_dir():
            print(f"writing {name} with random weights", flush=True)
            write_random_folder(folder, config)
        return Source(name=name, folder=folder, identity="random", shape=ModelShape.load(folder / "config.json"))

    def row(self, source: Source, kind: str, threads: int, unfinished: list[str]) -> Row:
        """Limit after limit, up to the first that fits."""
        found: dict[int, Value] = {}
        for limit in self.limits:
            what = f"{source.name}, {FORMATS[kind]}, {_threads(threads)} under {_size(limit)}"
            try:
                found[limit] = self._cell(source, kind, threads, limit)
            except OutOfTimeError:
                unfinished.append(what)
                break
            except SmallMachineError:
                unfinished.append(f"{what}, which this machine has not free")
                break
            if found[limit]["fits"] and not self.args.every_limit:
                break
        return Row(model=source.name, kind=kind, threads=threads, cells=found)

    def _cell(self, source: Source, kind: str, threads: int, limit: int) -> Value:
        args = self.args
        key = {
            "what": "limited decode",
            "model": source.identity,
            "format": kind,
            "limit_bytes": limit,
            "threads": threads,
            "context": self._context(source),
            "prompt": args.prompt,
            "tokens": args.tokens,
            "runs": args.runs,
            "protocol": PROTOCOL,
        }
        return self.cells.get(f"{source.name}-spectrum", key, lambda: self._measure(source, kind, threads, limit))

    def _context(self, source: Source) -> int:
        return min(int(self.args.context), source.shape.context)

    def _measure(self, source: Source, kind: str, threads: int, limit: int) -> Value:
        free = available_bytes()
        if free is not None and limit > free:
            raise SmallMachineError
        try:
            folder = self._exported(source, kind)
        except InputError as error:
            return {"fits": False, "error": f"no export: {error}"}
        options = {
            "format": kind,
            "limit-bytes": limit,
            "vocab": source.shape.vocab,
            "threads": threads,
            "context": self._context(source),
            "prompt": self.args.prompt,
            "tokens": self.args.tokens,
            "runs": self.args.runs,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [str(BENCHMARKS / "limited_decode.py"), str(folder), *words]
        return run_limited(command, threads=threads)

    def _exported(self, source: Source, kind: str) -> Path:
        """The folder in this format, made where it is not there."""
        if kind in ("float32", "bfloat16"):
            return source.folder
        out: Path = self.args.work / f"{source.name}-{source.identity}-{kind}"
        if out.is_dir():
            return out
        if kind.startswith("onnx"):
            export_onnx(source.folder, out, OnnxExportConfig(rounding=Rounding(bits=int(kind[-1]))))
        else:
            export_gguf(source.folder, out, GgufExportConfig(kind="Q8_0" if kind == "gguf8" else "Q4_K_M"))
        return out


def run_limited(command: Sequence[str], *, threads: int, timeout_s: float = TIMEOUT_S) -> Value:
    """Run `limited_decode.py`; a runtime that ends its process for want of memory does not fit either.

    Raises:
        CotuneError: it failed for another reason, or took too long.
    """
    number = str(threads)
    variables = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": number, "OPENBLAS_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, timeout=timeout_s, check=False, env=variables
        )
    except subprocess.TimeoutExpired as error:
        raise CotuneError(f"a cell took longer than {timeout_s:g} s; measure a smaller model, or less") from error
    if done.returncode < 0:
        return {"fits": False, "error": f"the process was ended by {signal.Signals(-done.returncode).name}"}
    try:
        found: Value = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        said = " / ".join(done.stderr.strip().splitlines()[-3:])
        if NO_THREAD in said:
            return {"fits": False, "error": f"PyTorch got no memory: {said:.200}"}
        raise CotuneError(f"limited_decode.py gave no measurement: {said or 'it said nothing'}") from error
    return found


def _is_installed(kind: str, *, told: bool) -> bool:
    package = {"onnx": "onnxruntime", "gguf": "llama_cpp"}.get(kind[:4])
    if package is None or importlib.util.find_spec(package) is not None:
        return True
    if told:
        raise InputError(f"--formats has {kind}, which needs the package {package}; install it, or leave it out")
    print(f"left out: {FORMATS[kind]}, {package} is not installed")
    return False


def build(study: Study) -> Page:
    """Measure what is missing and show what there is."""
    rows: list[Row] = []
    unfinished: list[str] = []
    for source in study.sources:
        for kind in study.formats:
            rows += [study.row(source, kind, threads, unfinished) for threads in study.threads]
    return Page(
        title="What fits a device, and how fast it is",
        lead=f"{study.args.prompt} tokens are read and {study.args.tokens} written, {study.args.context} must fit.",
        expected=EXPECTED,
        measured={"rows": [as_measured(row, study) for row in rows]},
        sections=[
            Section(name="overview", short="Overview", heading="Least memory and speed", content=overview(study, rows)),
            *(
                _model_section(study, source, [row for row in rows if row.model == source.name])
                for source in study.sources
            ),
        ],
        deviations=DEVIATIONS,
        lines=[
            f"{row.model:16s} {FORMATS[row.kind]:15s} {_threads(row.threads)}: {_told(row)}"
            for row in rows
            if row.cells
        ],
        unfinished=unfinished,
    )


def as_measured(row: Row, study: Study) -> dict[str, Any]:
    """A row as `measured.json` holds it."""
    (source,) = [one for one in study.sources if one.name == row.model]
    return {
        "model": row.model,
        "num_parameters": source.shape.num_parameters,
        "format": FORMATS[row.kind],
        "threads": row.threads,
        "least_bytes": row.least,
        "cells": {str(limit): cell for limit, cell in row.cells.items()},
    }


def overview(study: Study, rows: Sequence[Row]) -> Html:
    """Both plots, of the fewest threads that were measured."""
    first = [row for row in rows if row.threads == study.threads[0]]
    by_format = {FORMATS[kind]: [row for row in first if row.kind == kind] for kind in study.formats}
    names = [source.name for source in study.sources]
    bars = {
        name: [
            next(((0.0, row.least / 1e6, None, None) for row in found if row.model == model and row.least), None)
            for model in names
        ]
        for name, found in by_format.items()
    }
    sizes = {source.name: source.shape.num_parameters / 1e6 for source in study.sources}
    lines = {
        name: sorted(
            (
                round(sizes[row.model], 1),
                *(1e3 / cell["decode"][part] for part in ("median", "upper_quartile", "lower_quartile")),
            )
            for row in found
            for cell in (row.fitting,)
            if cell is not None
        )
        for name, found in by_format.items()
    }
    threads = _threads(study.threads[0])
    made = Html("")
    if any(point is not None for points in bars.values() for point in points):
        caption = f"The smallest limit under which a model runs, with {threads}; no bar: none of them."
        made = join([made, plot_groups("least-memory", caption, names, bars, y_label="MB")])
    if any(lines.values()):
        made = join(
            [
                made,
                plot_lines(
                    "speed",
                    f"A written token by size of the model, where it first fits, with {threads}; bars are quartiles.",
                    {name: points for name, points in lines.items() if points},
                    x_label="million parameters",
                    y_label="ms a token",
                    is_log_x=True,
                ),
            ]
        )
    return made


def _model_section(study: Study, source: Source, rows: Sequence[Row]) -> Section:
    fits = {_size(limit): [_cell(row, limit) for row in rows] for limit in study.limits}
    fitting = [row.fitting for row in rows]
    columns = {"load s": ["" if one is None else f"{one['load_s']:.2f}" for one in fitting]}
    for what in ("prefill", "decode"):
        columns[f"{what} tokens/s"] = ["" if one is None else _spread(one[what]) for one in fitting]
    columns["CPU ms a token"] = ["" if one is None else f"{one['decode_cpu_ms']['median']:.1f}" for one in fitting]
    columns["peak MB"] = ["" if one is None else f"{one['peak_bytes'] / 1e6:,.0f}" for one in fitting]
    errors = dict.fromkeys(
        f"{FORMATS[row.kind]} under {_size(limit)}: {cell['error']}"
        for row in rows
        for limit, cell in row.cells.items()
        if not cell["fits"] and row.threads == study.threads[0]
    )
    names = [f"{FORMATS[row.kind]}, {_threads(row.threads)}" for row in rows]
    return Section(
        name=source.name.replace(".", "-"),
        short=source.name,
        heading=f"{source.name}: {source.shape.num_parameters / 1e6:,.1f} million parameters",
        content=join(
            [
                grid("Under each limit: fits or not", "run as", names, fits),
                grid("Speed where it first fits, median (quartiles)", "run as", names, columns),
                bullets(list(errors)),
            ]
        ),
    )


def _cell(row: Row, limit: int) -> str:
    if limit in row.cells:
        return "fits" if row.cells[limit]["fits"] else "no"
    return "fits" if row.least is not None and limit > row.least else ""


def _spread(spread: dict[str, float]) -> str:
    low, median, high = (spread[name] for name in ("lower_quartile", "median", "upper_quartile"))
    return f"{median:,.1f} ({low:,.1f} to {high:,.1f})"


def _told(row: Row) -> str:
    cell = row.fitting
    if cell is None:
        return f"does not fit {_size(max(row.cells))}: {row.cells[max(row.cells)]['error']}"
    return (
        f"fits {_size(row.least or 0)}, loads in {cell['load_s']:.1f} s, reads {_spread(cell['prefill'])}/s, "
        f"writes {_spread(cell['decode'])}/s, peak {cell['peak_bytes'] / 1e6:,.0f} MB"
    )


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _size(count: int) -> str:
    return f"{count / 1e9:g} GB" if count >= 10**9 else f"{count / 1e6:g} MB"


def main() -> None:
    """Entry point."""
    args = make_parser().parse_args()
    with plain_endings():
        study = Study(args)
        page = build(study)
        first = study.sources[0]
        args.model = first.name
        page.publish(
            results_of(args, NAME),
            about=about_run(
                {**vars(args), "models": [source.name for source in study.sources], "threads": study.threads},
                device="cpu",
                threads=max(study.threads),
                backbone_parameters=first.shape.num_parameters,
            ),
        )


if __name__ == "__main__":
    main()
