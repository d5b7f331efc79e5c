"""`cotune tune`: tune on one machine, where the backbone is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cotune.cli.output import print_json, progress, stderr
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.data.templates import Example
    from cotune.models.backbone import Backbone
    from cotune.tuning.adapter import AdapterResult
    from cotune.tuning.lora import LoraResult

METHODS = ("lora", "adapter", "side")
SIDES = ("ladder", "attention")
SIDE_INITS = ("random", "backbone")


def tune(
    model: Annotated[str, typer.Argument(help="A Hugging Face causal-LM folder or hub name, or `starter`.")],
    data: Annotated[str, typer.Argument(help="Your texts: .jsonl, .csv or .parquet, a folder, or a Hub data set.")],
    out: Annotated[Path, typer.Option(help="Folder for the result; its run is kept beside it in OUT.run.")],
    method: Annotated[str, typer.Option(help="lora, adapter or side.")] = "lora",
    template: Annotated[
        str | None, typer.Option(help="How columns become prompts, or a data set's name; found by itself if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use this many examples at most.")] = None,
    share: Annotated[
        float | None, typer.Option(help="Use this part of the examples, such as 0.1; drawn by the seed.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a folder or Hub data set; train, or the only one, if left out.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Times that each text is seen; 3 for lora and adapter, 15 for side.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Largest one; 1e-3 for lora and adapter, 1e-2 for side.")
    ] = None,
    rank: Annotated[int, typer.Option(help="lora: width of the bottleneck.")] = 8,
    width: Annotated[int, typer.Option(help="adapter: width of each bottleneck.")] = 16,
    family: Annotated[str, typer.Option(help="side: parallel or serial.")] = "parallel",
    side: Annotated[
        str, typer.Option(help="side: ladder (a function of each token) or attention (remembers earlier ones).")
    ] = "ladder",
    side_width: Annotated[int, typer.Option(help="side: width of the side network.")] = 64,
    side_init: Annotated[
        str, typer.Option(help="side: random, or backbone (with attention: starts from pieces of the model).")
    ] = "random",
    heldout_share: Annotated[float, typer.Option(help="Part of the texts that judges instead of training.")] = 0.2,
    max_length: Annotated[int | None, typer.Option(help="Tokens of one text; the model's context if left out.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    torch_device: Annotated[str, typer.Option("--device", help="A PyTorch device, such as cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of split, initial weights and order.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tune MODEL on DATA with one method, on this machine.

    `lora` and `adapter` are baselines where personal weights may live beside the model; `side` makes the plugin that
    `cotune device tune` makes without the model at hand.

    Examples:

        cotune tune starter my-texts.jsonl --method lora --out my-lora

        cotune tune ./my-llama my-texts.jsonl --method side --out my-plugin --dtype bfloat16 --device cuda
    """
    if method not in METHODS:
        raise InputError(f"--method is {method!r}, expected one of {', '.join(METHODS)}")
    if side not in SIDES:
        raise InputError(f"--side is {side!r}, expected one of {', '.join(SIDES)}")
    if side_init not in SIDE_INITS:
        raise InputError(f"--side-init is {side_init!r}, expected one of {', '.join(SIDE_INITS)}")
    if side_init == "backbone" and side != "attention":
        raise InputError(f"--side-init is 'backbone' and --side {side!r}, expected --side attention, or random")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not _is_result(out))):
        raise InputError(f"--out is {out}, which holds something else; give a new folder")

    from cotune.cli.run_folder import make_run_folder, write_config
    from cotune.data.records import read_examples

    examples = read_examples(data, template, limit, seed, split, share=share)

    # Only now: it loads PyTorch, which takes seconds.
    from cotune.models.backbone import Backbone

    backbone = Backbone.from_pretrained(model, dtype=dtype, device=torch_device)
    run = make_run_folder(out.with_name(out.name + ".run"))
    settings = {
        "model": model,
        "data": data,
        "method": method,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "rank": rank,
        "width": width,
        "family": family,
        "side": side,
        "side_width": side_width,
        "side_init": side_init,
        "heldout_share": heldout_share,
        "max_length": max_length,
        "template": template,
        "limit": limit,
        "share": share,
        "split": split,
        "seed": seed,
    }
    write_config(run, "cotune tune", settings)
    work = _tune_side if method == "side" else _tune_attached
    with progress(f"tuning with {method}", enabled=not as_json) as advance:
        summary = work(
            backbone,
            examples,
            settings,
            out,
            run,
            resume,
            lambda stage, done, total, note: advance(done, total, f"{stage} {note}"),
        )
    summary = {"method": method, "out": str(out), "run": str(run), **summary}
    if as_json:
        print_json(summary)
        return
    stderr.print(
        f"[bold]{method}[/] {escape(str(out))}: {summary['num_parameters']:,} trained parameters, {len(examples)} texts"
    )
    if summary.get("heldout_nats_per_token") is not None:
        stderr.print(
            f"held-out loss {summary['base_nats_per_token']:.3f} (base) -> "
            f"{summary['heldout_nats_per_token']:.3f} nats per token"
        )


def _is_result(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("plugin.json", "adapter_config.json", "bottleneck.safetensors"))


def _tune_attached(
    backbone: Backbone,
    examples: list[Example],
    settings: dict[str, Any],
    out: Path,
    run: Path,
    resume: bool,
    tell: Any,
) -> dict[str, Any]:
    from cotune.models.adapters import LoraShape
    from cotune.tuning.adapter import AdapterConfig, tune_adapter
    from cotune.tuning.loop import LoopConfig
    from cotune.tuning.lora import LoraConfig, tune_lora
    from cotune.tuning.personal import encode_examples, split_examples

    method, seed = settings["method"], settings["seed"]
    encoded = encode_examples(backbone.tokenizer_json, examples, backbone.description, settings["max_length"])
    train, first, second = split_examples(encoded, settings["heldout_share"], seed)
    loop = LoopConfig(epochs=settings["epochs"] or 3, learning_rate=settings["learning_rate"] or 1e-3)
    how: dict[str, Any] = {
        "heldout": [*first, *second],
        "run_dir": run / method,
        "resume": resume,
        "progress": lambda p: tell(method, p.step, p.num_steps, f"loss {p.loss:.3f}"),
    }
    if method == "lora":
        lora = tune_lora(
            backbone, train, LoraConfig(loop=loop, shape=LoraShape(rank=settings["rank"]), seed=seed), **how
        )
        lora.adapter.save(out, backbone.model)
        return _summary(lora)
    adapter = tune_adapter(backbone, train, AdapterConfig(loop=loop, width=settings["width"], seed=seed), **how)
    adapter.adapter.save(out)
    return _summary(adapter)


def _summary(result: LoraResult | AdapterResult) -> dict[str, Any]:
    heldout = {record.epoch: record.heldout_loss for record in result.curve}
    return {
        "num_parameters": result.adapter.num_parameters,
        "base_nats_per_token": heldout.get(0),
        "heldout_nats_per_token": heldout.get(result.best_epoch),
        "best_epoch": result.best_epoch,
    }


def _tune_side(
    backbone: Backbone,
    examples: list[Example],
    settings: dict[str, Any],
    out: Path,
    run: Path,
    resume: bool,
    tell: Any,
) -> dict[str, Any]:
    from cotune.data.templates import common_prompt_format
    from cotune.tuning.backbone_start import ladder_from_backbone
    from cotune.tuning.feature_cache import FeatureCache
    from cotune.tuning.loop import LoopConfig
    from cotune.tuning.personal import PersonalConfig, PublicParts, encode_examples, split_examples, tune_plugin
    from cotune.tuning.side import AttentionShape, SideConfig

    loop = LoopConfig(epochs=settings["epochs"] or 15, learning_rate=settings["learning_rate"] or 1e-2)
    config = PersonalConfig(
        side=SideConfig(
            loop=loop,
            family=settings["family"],
            side_width=settings["side_width"],
            attention=AttentionShape.for_side(settings["side"]),
            init=settings["side_init"],
            seed=settings["seed"],
        ),
        heldout_share=settings["heldout_share"],
        max_length=settings["max_length"],
        prompt_format=common_prompt_format(examples),
        seed=settings["seed"],
    )
    cache = FeatureCache(
        run / "features",
        backbone_digest=backbone.spec.backbone_digest,
        projections_digest=backbone.projections.digest,
    )
    public = PublicParts(tokenizer_json=backbone.tokenizer_json, output_basis=backbone.output_basis)
    network = None
    if config.side.init == "backbone":
        encoded = encode_examples(public.tokenizer_json, examples, backbone.description, config.max_length)
        for_side, _, _ = split_examples(encoded, config.heldout_share, config.seed)
        network = ladder_from_backbone(backbone, for_side, config.side)
    result = tune_plugin(
        backbone,
        public,
        examples,
        config,
        cache=cache,
        network=network,
        run_dir=run,
        resume=resume,
        progress=tell,
    )
    result.plugin.save(out)
    return {
        "num_parameters": result.plugin.num_parameters,
        "base_nats_per_token": result.summary.get("base_nats_per_token"),
        "heldout_nats_per_token": result.summary.get("side_nats_per_token"),
    }
