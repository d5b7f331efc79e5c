"""`cotune device`: tune a private plugin from a cloud's features, and generate with it."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cotune.cli.connection import (
    CloudOption,
    OptionalCloudOption,
    RttOption,
    TlsCaOption,
    TokenFileOption,
    connector,
    emulated,
)
from cotune.cli.offline_options import (
    AdapterOption,
    ContextOption,
    MemoryLimitOption,
    OfflineChoice,
    OfflineOption,
    PatienceOption,
    ThreadsOption,
    refuse_cloud_words,
)
from cotune.cli.offline_text import LOCAL_STYLE, write_offline
from cotune.cli.output import print_json, progress, stderr, stdout
from cotune.cli.serve_command import serve
from cotune.durable import is_free
from cotune.errors import InputError
from cotune.generation.request import DRAFTED_SCHEDULES
from cotune.generation.sampling import Sampling

if TYPE_CHECKING:
    from cotune.generation.request import Decision
    from cotune.tuning.personal import PersonalConfig, PersonalResult

device = typer.Typer(
    name="device", no_args_is_help=True, help="What a device does: tune its plugin, generate, and serve."
)
device.command()(serve)

# As in the report: what the device changed, what it confirmed, what it was not asked about.
_STYLES = {(True, True): "bold dark_orange", (True, False): "dodger_blue1", (False, False): "default"}
_LATE_STYLE = "red underline"


@device.command()
def generate(
    invocation: typer.Context,
    plugin: Annotated[
        str | None, typer.Argument(help="Folder of the plugin; left out with --offline alone.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(help="The request; `-` reads it from standard input.", show_default=False)
    ] = None,
    cloud: OptionalCloudOption = None,
    offline: OfflineOption = None,
    mode: Annotated[
        str | None,
        typer.Option(help="integration or spa; ladder or separation for serial plugins. Default: consult always."),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="blocking, gated, optimistic, drafted or auto. Default: optimistic; blocking with beams, which wait."
        ),
    ] = None,
    answer: Annotated[str, typer.Option(help="correction (cloud decides) or token (device decides).")] = "correction",
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End the text before this string; may be repeated.")] = None,
    top_k: Annotated[int, typer.Option(help="Base logits that each step brings in the token form.")] = 32,
    window: Annotated[int, typer.Option(help="How many tokens the cloud may run ahead.")] = 64,
    draft_from: Annotated[
        Path | None,
        typer.Option(help="Your texts, for schedules drafted and auto; drafts show pieces of them to the cloud."),
    ] = None,
    deadline_ms: Annotated[
        int, typer.Option(help="Go on with the cloud's own token where the device is later; 0 waits. Such are marked.")
    ] = 0,
    num_beams: Annotated[int, typer.Option(help="Search among so many texts for the likeliest, 2 to 8; 1 for no.")] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="With beams: above 0 favours long texts, below short ones.")
    ] = 1.0,
    raw: Annotated[bool, typer.Option("--raw", help="Send PROMPT as it is, not in the form of the training texts.")] = (
        False
    ),
    rtt_ms: RttOption = 0.0,
    ledger: Annotated[Path | None, typer.Option(help="Append what leaves the device to this JSON-lines file.")] = None,
    token_file: TokenFileOption = None,
    tls_ca: TlsCaOption = None,
    timeout_s: Annotated[float, typer.Option(help="How long to wait for any one answer.")] = 30.0,
    threads: ThreadsOption = None,
    context: ContextOption = None,
    adapter: AdapterOption = None,
    memory_limit: MemoryLimitOption = None,
    fallback_after: PatienceOption = 0.8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Generate a personal text for PROMPT, together with the cloud, or by an offline model.

    Orange tokens are there because of the device, blue ones it confirmed; red ones it was too late for; green ones
    were written by the offline model alone.

    Examples:

        cotune device generate my-plugin "What is my dog called?" --cloud ws://127.0.0.1:7070

        cotune device generate my-plugin "Write to my sister." --cloud ws://127.0.0.1:7070 --mode spa --schedule gated

        cotune device generate my-plugin "A toast for Ada." --cloud ws://127.0.0.1:7070 --num-beams 4

        cotune device generate my-plugin - --cloud wss://llm.example:443 --token-file token.txt --json < prompt.txt

        cotune device generate my-plugin "Dear Ada," --cloud ws://127.0.0.1:7070 --offline my-model

        cotune device generate --offline my-model "Dear Ada," --threads 2 --adapter my-lora
    """
    choice = OfflineChoice(path=offline, threads=threads, context=context, adapter=adapter, memory_limit=memory_limit)
    if choice.path is not None and cloud is None:
        if prompt is not None:
            raise InputError("PLUGIN is given without --cloud, expected both, or --offline and PROMPT alone")
        refuse_cloud_words(invocation)
        write_offline(
            choice,
            _prompt_text(plugin),
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
            stop_strings=tuple(stop or ()),
            raw=raw,
            ledger=ledger,
            as_json=as_json,
        )
        return
    if plugin is None or prompt is None or cloud is None:
        if plugin is None and cloud is None:
            # Nothing was said: the usage, as of commands whose arguments Typer itself asks for.
            stderr.print(invocation.get_usage(), markup=False, soft_wrap=True)
        missing = "PLUGIN" if plugin is None else "PROMPT" if prompt is None else "--cloud"
        raise InputError(f"{missing} is missing, expected PLUGIN, PROMPT and --cloud, or --offline and PROMPT")

    from cotune.cli.generation_output import measure, measure_beams
    from cotune.data.records import read_examples
    from cotune.device.client import ClientConfig
    from cotune.device.reach import ReachConfig
    from cotune.device.runtime import Device, GenerationOptions
    from cotune.ledger import EgressLedger
    from cotune.plugin import Plugin
    from cotune.wire.event_loop import run_coroutine

    loaded = Plugin.load(plugin)
    schedule = schedule or ("optimistic" if num_beams == 1 else "blocking")
    options = GenerationOptions(
        mode=mode or ("integration" if loaded.family == "parallel" else "ladder"),
        schedule=schedule,
        answer=answer,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
        stop_strings=tuple(stop or ()),
        top_k=top_k,
        window=window,
        deadline_ms=deadline_ms,
        num_beams=num_beams,
        length_penalty=length_penalty,
    )
    if draft_from is not None and schedule not in DRAFTED_SCHEDULES:
        raise InputError(f"--draft-from needs --schedule drafted or auto, got {schedule}")
    text = _prompt_text(prompt)
    may_draft = schedule in DRAFTED_SCHEDULES and draft_from is None
    writer = None if choice.path is None else choice.writer(num_drafts=int(may_draft))

    def show(piece: str, decision: Decision) -> None:
        style = _STYLES[decision.consulted, decision.changed]
        if decision.late or decision.local:
            style = _LATE_STYLE if decision.late else LOCAL_STYLE
        stdout.print(piece, style=style, end="", markup=False, soft_wrap=True)

    with EgressLedger(ledger) as book:
        make = connector(cloud, token_file=token_file, tls_ca=tls_ca, ledger=book, profile=emulated(rtt_ms), seed=seed)
        runtime = Device(loaded, make, ClientConfig(timeout_s=timeout_s))
        if draft_from is not None:
            runtime.draft_from(example.prompt + example.target for example in read_examples(draft_from))
        elif may_draft and writer is not None:
            runtime.draft_with(writer)
        full = text if raw else runtime.format_prompt(text)
        on_text = None if as_json else show
        if writer is None:
            result = run_coroutine(runtime.generate(full, options, on_text))
        else:
            patience = ReachConfig(patience_s=fallback_after)
            result = run_coroutine(runtime.generate_with_fallback(writer, full, options, on_text, patience))
        totals = book.totals()
    metrics = measure(result)
    beams = measure_beams(result, runtime.text.decode)
    if as_json:
        extra = {} if beams is None else {"beams": beams}
        print_json({**metrics.to_dict(), "ending": result.ending.reason, "egress": totals, **extra})
        return
    stdout.print()
    if metrics.late:
        stderr.print(f"[red]{len(metrics.late)} tokens are the cloud's own, because the device was late")
    num_local = metrics.sources.count("local")
    if num_local:
        stderr.print(f"[green4]{num_local} tokens are the offline model's, because the cloud was out of reach")
    if metrics.drafted:
        stderr.print(f"[dim]{metrics.drafted} tokens drafted, {metrics.drafts_kept} kept")
    if beams is not None:
        stderr.print(
            f"[dim]{num_beams} beams, {beams['num_steps']} steps; M per step {beams['M_per_step']:.2f}, "
            f"{beams['predicted_M_per_step']:.2f} if gates were independent at {beams['consult_rate_per_beam']:.0%}"
        )
    stderr.print(
        f"[dim]{metrics.num_tokens} tokens, {metrics.tokens_per_s:.1f}/s; device consulted on "
        f"{metrics.consult_rate:.0%}, changed {metrics.disagree_rate:.0%}; {metrics.M:.2f} round trips, "
        f"{metrics.bytes_down_per_token:.0f} bytes down and {metrics.bytes_up_per_token:.0f} up per token"
    )


def _prompt_text(prompt: str | None) -> str:
    text = sys.stdin.read().rstrip("\n") if prompt == "-" else prompt
    if not text:
        raise InputError("PROMPT is empty, expected at least one character")
    return text


@device.command()
def tune(
    data: Annotated[str, typer.Argument(help="Your texts: .jsonl, .csv or .parquet, a folder, or a Hub data set.")],
    cloud: CloudOption,
    out: Annotated[Path, typer.Option(help="Folder for the plugin; its run is kept beside it in OUT.run.")],
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
    family: Annotated[
        str, typer.Option(help="parallel (modes integration and spa) or serial (ladder and separation).")
    ] = "parallel",
    side: Annotated[
        str, typer.Option(help="ladder (a function of each token) or attention (remembers earlier ones).")
    ] = "ladder",
    epochs: Annotated[int, typer.Option(help="Times that each text is seen; features are computed only once.")] = 15,
    learning_rate: Annotated[float, typer.Option(help="Largest learning rate.")] = 1e-2,
    side_width: Annotated[int, typer.Option(help="Width of the side network.")] = 64,
    inner_width: Annotated[int, typer.Option(help="Width inside each of its rungs.")] = 64,
    prompt_window: Annotated[
        int, typer.Option(help="attention: so many of a prompt's last positions are sent to the device.")
    ] = 128,
    tap_step: Annotated[int, typer.Option(help="attention: use every so many taps; each is a block.")] = 1,
    gate: Annotated[bool, typer.Option(help="Train a gate, which mode spa and schedule gated need.")] = True,
    price_nats: Annotated[
        float | None,
        typer.Option(
            help="Gate: ask where that brings so many nats, by marginal likelihood, instead of where choices differ."
        ),
    ] = None,
    gate_units: Annotated[int, typer.Option(help="Gate: width of its hidden layer; 0 for a linear gate.")] = 16,
    max_consult_rate: Annotated[float, typer.Option(help="Gate: largest share of tokens that ask the device.")] = 0.25,
    top_k: Annotated[int, typer.Option(help="Base logits kept for each training token.")] = 1024,
    max_length: Annotated[int | None, typer.Option(help="Tokens of one text; the model's context if left out.")] = None,
    heldout_share: Annotated[float, typer.Option(help="Part of the texts that judges instead of training.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of split, initial weights and order.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Feature cache; OUT.run/features if left out.")] = None,
    cache_gib: Annotated[float, typer.Option(help="Largest size of the feature cache, GiB.")] = 4.0,
    threads: Annotated[int, typer.Option(help="CPU threads for training; more than one rarely pays.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    rtt_ms: RttOption = 0.0,
    token_file: TokenFileOption = None,
    tls_ca: TlsCaOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a private plugin on DATA from the features that the cloud sends.

    The cloud reads the texts once, to compute features (there is no way round that); it never gets the plugin's
    weights, and no gradient leaves the device. Later epochs and runs use the cached features.

    Examples:

        cotune device tune my-texts.jsonl --cloud ws://127.0.0.1:7070 --out my-plugin

        cotune device tune chats.csv --template request --cloud ws://127.0.0.1:7070 --out my-plugin --resume

        cotune device tune letters.jsonl --side attention --cloud ws://127.0.0.1:7070 --out my-plugin
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError("tuning needs PyTorch, which is not installed; run: pip install 'cotune[train]'")

    from cotune.data.records import read_examples

    # What can be refused without PyTorch is refused before it is loaded, which takes seconds.
    if not is_free(out, earlier="plugin.json"):
        raise InputError(f"--out is {out}, which holds something else; give a new folder or that of a plugin")
    examples = read_examples(data, template, limit, seed, split, share=share)

    import torch

    from cotune.data.templates import common_prompt_format
    from cotune.device.features import RemoteFeatureSource
    from cotune.generation.output_basis import OutputBasis
    from cotune.ledger import EgressLedger
    from cotune.tuning.feature_cache import FeatureCache
    from cotune.tuning.gate import GateConfig
    from cotune.tuning.loop import LoopConfig
    from cotune.tuning.personal import PersonalConfig, PublicParts, tune_plugin
    from cotune.tuning.side import AttentionShape, SideConfig
    from cotune.wire.frames import AssetKind, Hello, encode

    gate_config = replace(GateConfig.for_family(family, seed=seed), units=gate_units)
    if price_nats is not None:
        gate_config = replace(gate_config, objective="marginal", price_nats=price_nats)
    config = PersonalConfig(
        side=SideConfig(
            loop=LoopConfig(epochs=epochs, learning_rate=learning_rate),
            family=family,
            side_width=side_width,
            inner_width=inner_width,
            attention=AttentionShape.for_side(side, prompt_window=prompt_window, tap_step=tap_step),
            seed=seed,
        ),
        gate=gate_config if gate else None,
        max_consult_rate=max_consult_rate,
        heldout_share=heldout_share,
        top_k=top_k,
        max_length=max_length,
        prompt_format=common_prompt_format(examples),
        seed=seed,
    )
    make = connector(cloud, token_file=token_file, tls_ca=tls_ca, profile=emulated(rtt_ms), seed=seed)
    if threads < 1:
        raise InputError(f"--threads is {threads}, expected at least 1")
    # The first connection stands before anything is written.
    with RemoteFeatureSource(make) as source:
        description = source.description
    run = _run_folder(out, cloud, config, data=data, template=template, limit=limit, share=share, split=split)
    torch.set_num_threads(threads)
    with EgressLedger(run / "ledger.jsonl") as book:
        # The first connection said hello before there was a ledger to write it to.
        book.record("tune", "hello", encode(Hello()))
        make = connector(
            cloud, token_file=token_file, tls_ca=tls_ca, ledger=book, way="tune", profile=emulated(rtt_ms), seed=seed
        )
        with RemoteFeatureSource(make) as source, progress("tuning", enabled=not as_json) as advance:
            public = PublicParts(
                tokenizer_json=source.fetch(AssetKind.TOKENIZER),
                output_basis=OutputBasis.from_bytes(source.fetch(AssetKind.OUTPUT_BASIS)),
            )
            result = tune_plugin(
                source,
                public,
                examples,
                config,
                cache=FeatureCache(
                    cache or run / "features",
                    backbone_digest=description.backbone_digest,
                    projections_digest=description.projections_digest,
                    max_bytes=int(cache_gib * 2**30),
                ),
                run_dir=run,
                resume=resume,
                progress=lambda stage, done, total, note: advance(done, total, f"{stage} {note}"),
            )
            down, up = source.bytes_received, source.bytes_sent
        totals = book.totals()
    result.plugin.save(out)
    _report(run, out, data, config, result, totals)
    point = next((p for p in result.gate_curve if p.consult_rate > 0 and _is_chosen(result, p.threshold)), None)
    summary = {
        "plugin": str(out),
        "run": str(run),
        "num_parameters": result.plugin.num_parameters,
        **result.summary,
        "consult_rate": None if point is None else point.consult_rate,
        "bytes_down": down,
        "bytes_up": up,
        "egress": totals,
    }
    if as_json:
        print_json(summary)
        return
    stderr.print(
        f"[bold]plugin[/] {escape(str(out))}: {result.plugin.num_parameters:,} private parameters, "
        f"{len(examples)} texts"
    )
    if result.summary:
        stderr.print(
            f"held-out loss {result.summary['base_nats_per_token']:.3f} (base) -> "
            f"{result.summary['side_nats_per_token']:.3f} nats per token with the plugin"
        )
    stderr.print(
        f"{down:,} bytes of features came, {up:,} bytes (texts as token ids) left this device; see {escape(str(run))}"
    )
    stderr.print(f'[dim]next: cotune device generate {escape(str(out))} "..." --cloud {escape(cloud)}')


def _run_folder(out: Path, cloud: str, config: PersonalConfig, **reading: str | float | None) -> Path:
    from cotune.cli.run_folder import make_run_folder, write_config

    run = make_run_folder(out.with_name(out.name + ".run"))
    write_config(run, "cotune device tune", {**reading, "cloud": cloud, "personal": config})
    return run


def _is_chosen(result: PersonalResult, threshold: float) -> bool:
    return result.plugin.gate is not None and threshold == result.plugin.gate.threshold


def _report(
    run: Path,
    out: Path,
    data: str,
    config: PersonalConfig,
    result: PersonalResult,
    totals: dict[str, dict[str, int]],
) -> None:
    from cotune.cli.run_folder import plain, versions
    from cotune.evaluation.report import write_report

    before, after = result.summary.get("base_nats_per_token"), result.summary.get("side_nats_per_token")
    told = (
        f"On held-out texts the loss went from {before:.3f} to {after:.3f} nats per token."
        if before is not None and after is not None
        else "There were too few texts to hold some out."
    )
    gate_curve = [
        {
            "threshold": point.threshold,
            "M": point.consult_rate,
            "nats_per_token": point.nats_per_token,
            "chosen": _is_chosen(result, point.threshold),
        }
        for point in result.gate_curve
    ]
    curve = result.side_curve
    write_report(
        run,
        {
            "title": f"A private plugin, tuned on {data}",
            "summary": [told, f"The plugin is in {out}; its weights never left this device."],
            "gate_curve": gate_curve or None,
            "egress": {kind: {"count": total["count"], "bytes": total["bytes"]} for kind, total in totals.items()},
            "training": [
                {
                    "name": "plugin",
                    "points": [(r.num_steps, r.train_loss) for r in curve if r.train_loss is not None],
                    "held_out": [(r.num_steps, r.heldout_loss) for r in curve if r.heldout_loss is not None] or None,
                }
            ],
            "config": plain(config),
            "versions": versions(),
            "seeds": {"seed": config.seed},
        },
    )
