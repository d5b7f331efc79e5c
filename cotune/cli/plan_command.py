"""`cotune plan`: which tuning methods fit a device, and what each would cost, before anything is downloaded or run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

import cotune
from cotune.cli.memory_size import parse_bytes
from cotune.cli.output import print_json, stdout
from cotune.errors import InputError
from cotune.evaluation.method_cost import CHECKPOINTED

if TYPE_CHECKING:
    from cotune.evaluation.method_cost import MethodCost
    from cotune.evaluation.model_shape import ModelShape
    from cotune.evaluation.plan import Plan, PlanRow

STARTER = "starter"
# How to run a method: words of the planner to options of the commands that have it.
_TUNED_WITH = {
    "full": "full --out my-model",
    "lora": "lora --rank {rank} --out my-lora",
    "rslora": "rslora --rank {rank} --out my-lora",
    "dora": "dora --rank {rank} --out my-dora",
    "qlora": "lora --rank {rank} --base-bits 4 --out my-lora",
    "ia3": "ia3 --out my-ia3",
    "vera": "vera --rank {shared_rank} --out my-vera",
    "adapter": "adapter --width {width} --out my-adapter",
    "soft_prompt": "soft_prompt --virtual-tokens {virtual_tokens} --out my-prompt",
    "p_tuning": "p_tuning --virtual-tokens {virtual_tokens} --out my-prompt",
    "prefix": "prefix --virtual-tokens {virtual_tokens} --out my-prefix",
    "norms": "bias --out my-norms",
    "blocks": "blocks --memory-budget {memory} --out my-blocks",
    "side_local": "side --side-width {side_width} --out my-plugin",
    "zeroth_order": "full --estimator zeroth_order --out my-model",
    "zeroth_order_lora": "lora --rank {rank} --estimator zeroth_order --out my-lora",
    "forward_gradient": "full --estimator forward_gradient --out my-model",
}
# By the planner's word, without and with gradient checkpointing.
COMMANDS: dict[tuple[str, bool], str] = {
    **{(name, False): f"cotune tune {{model}} DATA --method {words}" for name, words in _TUNED_WITH.items()},
    **{
        (name, True): f"cotune tune {{model}} DATA --method {words} --gradient-checkpointing"
        for name, words in _TUNED_WITH.items()
        if name in CHECKPOINTED
    },
    ("side", False): "cotune device tune DATA --cloud URL --side-width {side_width} --out my-plugin",
}
_COLUMNS = ("method", "weights", "grads", "optim", "activ", "peak", "fits", "GFLOP", "s", "result", "sent")
_WIDTH = 96


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A model folder or config.json, a known shape such as llama-7b, `starter`, or a hub name, of which "
            "the config.json alone is fetched."
        ),
    ],
    memory: Annotated[str, typer.Option(help="Of the device, such as 4GB or 512MiB.")],
    batch: Annotated[int, typer.Option(help="Texts in one step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = 256,
    targets: Annotated[
        int | None, typer.Option(help="Tokens of a text that are answers; all of them if left out.")
    ] = None,
    steps: Annotated[int, typer.Option(help="side: steps in one epoch, whose features are all in memory.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    rank: Annotated[int, typer.Option(help="lora: width of the bottleneck.")] = 8,
    width: Annotated[int, typer.Option(help="adapter: width of each bottleneck.")] = 16,
    virtual_tokens: Annotated[int, typer.Option(help="soft_prompt, p_tuning, prefix: trained tokens.")] = 20,
    blocks: Annotated[int, typer.Option(help="blocks: decoder layers that are trained.")] = 2,
    side_width: Annotated[int, typer.Option(help="side: width of the side network.")] = 64,
    base_bits: Annotated[int, typer.Option(help="qlora: bits of the frozen base, 4 or 8.")] = 4,
    runtime: Annotated[str, typer.Option(help="What Python and PyTorch take by themselves.")] = "450MB",
    gflops: Annotated[
        float | None, typer.Option(help="Rate of the device in 10^9 operations a second; measured here if left out.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of that measurement; all if left out.")] = None,
    torch_device: Annotated[str, typer.Option("--device", help="Where to measure: cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say which methods fit a device with so much MEMORY, and what each would cost.

    Everything is worked out from the sizes in a config.json; no weights are downloaded and nothing is trained.

    Examples:

        cotune plan starter --memory 1GB

        cotune plan llama-7b --memory 24GB --dtype bfloat16 --length 512 --gflops 50000

        cotune plan Qwen/Qwen2.5-0.5B --memory 4GB --batch 4 --json
    """
    from cotune.evaluation.method_cost import MethodSettings
    from cotune.evaluation.plan import make_plan
    from cotune.evaluation.side_cost import SideSettings
    from cotune.evaluation.workload import Workload

    memory_bytes, runtime_bytes = parse_bytes(memory, "--memory"), parse_bytes(runtime, "--runtime")
    if threads is not None and threads < 1:
        raise InputError(f"--threads is {threads}, expected at least 1")
    load = Workload(batch=batch, length=length, targets=targets, dtype=dtype)
    shape = find_shape(model)
    _check_sizes(shape, rank=rank, width=width, virtual_tokens=virtual_tokens)
    settings = MethodSettings(
        rank=rank,
        width=width,
        num_virtual_tokens=virtual_tokens,
        num_blocks=min(blocks, shape.layers),
        base_bits=base_bits,
        side=SideSettings(side_width=side_width, num_steps=steps),
    )
    # Before the rate is measured: what cannot fit is told at once.
    make_plan(shape, load, settings, memory=memory_bytes, runtime=runtime_bytes)
    rate = 1e9 * gflops if gflops is not None else _measure(shape, batch, length, dtype, torch_device, threads)
    made = make_plan(shape, load, settings, memory=memory_bytes, runtime=runtime_bytes, flops_per_s=rate)
    best = made.best(COMMANDS)
    # A known shape is no model that could be loaded.
    words = {"model": model if _is_model(model) else "MODEL", "rank": rank, "width": width, "side_width": side_width}
    words |= {"shared_rank": settings.shared_rank, "virtual_tokens": virtual_tokens}
    words |= {"memory": memory.replace(" ", "")}
    command = None if best is None else _command(best, words, dtype)
    if as_json:
        print_json(
            {
                "model": model,
                "num_parameters": shape.num_parameters,
                "memory": memory_bytes,
                "runtime": runtime_bytes,
                "flops_per_s": rate,
                "shape": asdict(shape),
                "load": asdict(load),
                "methods": [{**asdict(row.cost), "fits": row.fits, "step_s": row.step_s} for row in made.rows],
                "best": None if best is None else {**_name(best), "command": command},
            }
        )
        return
    _show(model, made, rate, best, command)


def find_shape(model: str) -> ModelShape:
    """The sizes of a model, by a known shape's name, `starter`, a folder, a config.json or a hub name.

    Of a hub name the config.json is fetched, and nothing else.

    Raises:
        InputError: there is no such model or network, or it is no language model that is known here.
    """
    from cotune.evaluation.model_shape import KNOWN_SHAPES, ModelShape

    if model in KNOWN_SHAPES:
        return KNOWN_SHAPES[model]
    if model == STARTER:
        return ModelShape.load(Path(cotune.__file__).parent / "models" / STARTER / "config.json")
    path = Path(model)
    if model and path.is_dir():
        return ModelShape.load(path / "config.json")
    if model and path.is_file():
        return ModelShape.load(path)
    return ModelShape.load(_fetch_config(model, ", ".join(KNOWN_SHAPES)))


def _check_sizes(shape: ModelShape, *, rank: int, width: int, virtual_tokens: int) -> None:
    """Refuse to plan what `cotune tune` would refuse to run."""
    widest = max(shape.inner, shape.hidden, shape.heads * shape.head_dim)
    for name, value in (("--rank", rank), ("--width", width)):
        if value > widest:
            raise InputError(f"{name} is {value}, expected at most {widest}, the width of the model's widest layer")
    if virtual_tokens > shape.context - 2:
        raise InputError(
            f"--virtual-tokens is {virtual_tokens}, expected at most {shape.context - 2}: the model reads "
            f"{shape.context} tokens, and a text has at least 2"
        )


def _is_model(model: str) -> bool:
    from cotune.evaluation.model_shape import KNOWN_SHAPES

    return model not in KNOWN_SHAPES and not Path(model).is_file()


def _fetch_config(model: str, known: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    choices = f"give a folder, a config.json, {STARTER}, or one of {known}"
    if not model or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(f"{model!r} is neither a folder nor a hub name such as Qwen/Qwen2.5-0.5B; {choices}")
    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the config.json of {model} cannot be had from the Hugging Face hub ({reason}); {choices}"
        ) from error


def _measure(shape: ModelShape, batch: int, length: int, dtype: str, torch_device: str, threads: int | None) -> float:
    from cotune.evaluation.measured_flops import measure_flops_per_s
    from cotune.evaluation.workload import Workload

    load = Workload(batch=batch, length=length, dtype=dtype)
    return measure_flops_per_s(shape, load, device=torch_device, num_threads=threads)


def _name(row: PlanRow) -> dict[str, object]:
    return {"method": row.cost.method, "has_checkpoints": row.cost.has_checkpoints}


def _command(row: PlanRow, words: dict[str, object], dtype: str) -> str:
    command = COMMANDS[row.cost.method, row.cost.has_checkpoints].format(**words)
    return command if dtype == "float32" or row.cost.method == "side" else f"{command} --dtype {dtype}"


def _show(model: str, made: Plan, rate: float, best: PlanRow | None, command: str | None) -> None:
    from cotune.evaluation.plan import format_bytes

    load = made.load
    unit, name = (10**9, "GB") if max(row.cost.peak for row in made.rows) >= 10**10 else (10**6, "MB")
    stdout.print(
        f"{model}: {made.shape.num_parameters:,} parameters in {load.dtype}, {load.batch} x {load.length} tokens a "
        f"step; {name} of {format_bytes(made.memory)}",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in made.rows:
        cost = row.cost
        sizes = (cost.weights, cost.gradients, cost.optimizer, cost.activations, cost.peak)
        table.add_row(
            _title(cost),
            *(_number(size / unit) for size in sizes),
            "yes" if row.fits else "no",
            _number(cost.flops / 1e9),
            "" if row.step_s is None else _number(row.step_s),
            _number(cost.result / unit),
            _number(cost.sent / unit),
            style="" if row.fits else "dim",
        )
    # Numbers that are cut off are worse than lines that the terminal breaks.
    Console(width=max(stdout.width, _WIDTH), highlight=False).print(table)
    stdout.print(
        f"A method fits if its peak and the {format_bytes(made.runtime)} of Python and PyTorch do; gc: with gradient "
        f"checkpointing. s: a step's operations at {rate / 1e9:,.0f} GFLOP/s, so at least. result: the file that is "
        "made. sent: through the network in a step. side reads features that a cloud sends, side_local makes them "
        "here. Of a model on the hub the config.json alone was fetched.",
        soft_wrap=True,
    )
    if best is None:
        stdout.print("None of the methods that fit is one that cotune can run yet.")
        return
    stdout.print(f"Best fit: [bold]{_title(best.cost)}[/]")
    stdout.print(f"  {command}", markup=False, soft_wrap=True)


def _title(cost: MethodCost) -> str:
    return cost.method + (" + gc" if cost.has_checkpoints else "")


def _number(value: float) -> str:
    """Three digits, at most two behind the point; a dash for nothing."""
    if value == 0:
        return "-"
    if value < 0.005:
        return "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
