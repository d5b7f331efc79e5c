"""`cotune tune`: tune on one machine, where the backbone is at hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cotune.cli.freed_memory import give_back_freed_memory
from cotune.cli.label_option import split_words
from cotune.cli.memory_size import parse_bytes
from cotune.cli.output import print_json, progress, stderr
from cotune.cli.run_folder import plain, run_folder
from cotune.cli.tune_checks import ESTIMATOR_NAMES, METHODS, OBJECTIVES, RESULT_FILES, check_settings, foreign_options
from cotune.cli.tune_settings import Summary, TuneSettings
from cotune.errors import InputError

_LORA_INITS = "default, gaussian, orthonormal, orthogonal, pissa, olora, eva, corda, lora_ga, mica or loftq"


def tune(
    model: Annotated[str, typer.Argument(help="A Hugging Face causal-LM folder or hub name, or `starter`.")],
    data: Annotated[str, typer.Argument(help="Your texts: .jsonl, .csv or .parquet, a folder, or a Hub data set.")],
    out: Annotated[Path, typer.Option(help="Folder for the result; its run is kept beside it in OUT.run.")],
    method: Annotated[str, typer.Option(help=f"What is tuned: {', '.join(METHODS)}.")] = "lora",
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
        int | None, typer.Option(help="Times that each text is seen; 3, 15 for side, 20 without gradients, 10 private.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Largest one; the method's own if left out, such as 1e-3 for lora.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="All but side: texts in one step.")] = 8,
    estimator: Annotated[
        str, typer.Option(help=f"All but side: how it is updated; {', '.join(ESTIMATOR_NAMES)}.")
    ] = "backprop",
    zo_eps: Annotated[
        float | None, typer.Option(help="zeroth_order, forward_gradient: distance to either side; 1e-3, 1e-2.")
    ] = None,
    directions: Annotated[
        int | None, typer.Option(help="zeroth_order: in a step, 1 if left out. forward_gradient: in a batch, 4.")
    ] = None,
    zo_rule: Annotated[
        str | None, typer.Option(help="zeroth_order: plain, momentum or adam, whose moments cost no memory.")
    ] = None,
    sparse_share: Annotated[
        float | None,
        typer.Option(help="zeroth_order, forward_gradient: tune the best part of the numbers only, such as 0.01."),
    ] = None,
    sparse_by: Annotated[
        str | None, typer.Option(help="With --sparse-share: chosen by gradient (16 backward passes) or magnitude.")
    ] = None,
    objective: Annotated[
        str,
        typer.Option(help=f"zeroth_order: what gets better, the likelihood or a score; {', '.join(OBJECTIVES)}."),
    ] = "nats",
    labels: Annotated[
        list[str] | None,
        typer.Option(
            help="With --objective accuracy: the label words, such as terrible,great; all targets if left out.",
        ),
    ] = None,
    forward_mode: Annotated[
        bool, typer.Option("--forward-mode", help="forward_gradient: exact derivatives in one pass, more memory.")
    ] = False,
    dp_epsilon: Annotated[
        float | None, typer.Option(help="Differential privacy of each text, for the whole run; needs cotune[private].")
    ] = None,
    dp_delta: Annotated[
        float | None, typer.Option(help="With --dp-epsilon; a tenth of 1 / texts, 1e-5 at most, if left out.")
    ] = None,
    dp_clip: Annotated[
        float | None, typer.Option(help="With --dp-epsilon: the most that one text's gradient counts for; 1.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="All but side: less memory, a third more time.")
    ] = False,
    base_bits: Annotated[
        int | None, typer.Option(help="4 or 8: hold the frozen model in so few bits (QLoRA); needs cotune[lowbit].")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="lora, dora, rslora: 8 if left out; vera: 64.")] = None,
    alpha: Annotated[float | None, typer.Option(help="lora, dora, rslora: strength; 16 if left out.")] = None,
    init: Annotated[str | None, typer.Option(help=f"lora, dora, rslora: the start; {_LORA_INITS}.")] = None,
    width: Annotated[int | None, typer.Option(help="adapter: width of each bottleneck; 16 if left out.")] = None,
    virtual_tokens: Annotated[
        int | None, typer.Option(help="soft_prompt, p_tuning, prefix: positions in front; 20 if left out.")
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="blocks: memory for training above inference, such as 500MB.")
    ] = None,
    merged: Annotated[
        Path | None, typer.Option(help="Also write the whole tuned model into this new folder, where that is possible.")
    ] = None,
    family: Annotated[str, typer.Option(help="side: parallel or serial.")] = "parallel",
    side: Annotated[
        str, typer.Option(help="side: ladder (a function of each token) or attention (remembers earlier ones).")
    ] = "ladder",
    side_width: Annotated[int, typer.Option(help="side: width of the side network.")] = 64,
    side_init: Annotated[
        str, typer.Option(help="side: random, or backbone (with attention: starts from pieces of the model).")
    ] = "random",
    heldout_share: Annotated[
        float | None,
        typer.Option(help="Part of the texts that judges instead of training; 0.2 if left out, 0 with --dp-epsilon."),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of one text; the model's context if left out.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    torch_device: Annotated[str, typer.Option("--device", help="A PyTorch device, such as cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of split, initial weights and order.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tune MODEL on DATA with one method, on this machine.

    `full`, `bias` and `blocks` change the model's own parameters: all, biases and norms, or the layers that a memory
    budget holds. `lora`, `dora`, `rslora`, `ia3`, `vera` and `adapter` put small layers into it; `soft_prompt`,
    `p_tuning` and `prefix` put something in front of the text. `side` makes the plugin that `cotune device tune` makes
    without the model at hand. Judge any result with `cotune evaluate MODEL DATA --adapter OUT`.

    Examples:

        cotune tune starter my-texts.jsonl --method lora --out my-lora

        cotune tune starter my-texts.jsonl --method lora --init pissa --rank 16 --out my-lora --merged my-model

        cotune tune ./my-llama my-texts.jsonl --method lora --base-bits 4 --gradient-checkpointing --out my-qlora

        cotune tune starter my-texts.jsonl --method lora --estimator zeroth_order --directions 4 --out my-zo-lora

        cotune tune starter my-texts.jsonl --method lora --estimator zeroth_order --objective rouge_l --out my-zo-lora

        cotune tune starter reviews.jsonl --estimator zeroth_order --objective accuracy --labels bad,good --out my-zo

        cotune tune ./my-llama my-texts.jsonl --method full --estimator zeroth_order --sparse-share 0.01 --out my-zo

        cotune tune starter my-texts.jsonl --method lora --dp-epsilon 8 --out my-private-lora

        cotune tune starter my-texts.jsonl --method side --dp-epsilon 8 --out my-private-plugin

        cotune tune ./my-llama my-texts.jsonl --method soft_prompt --virtual-tokens 30 --out my-prompt

        cotune tune ./my-llama my-texts.jsonl --method blocks --memory-budget 2GB --out my-blocks

        cotune tune ./my-llama my-texts.jsonl --method side --out my-plugin --dtype bfloat16 --device cuda
    """
    if not out.name:
        raise InputError(f"--out is {str(out)!r}, expected the name of a folder")
    if heldout_share is None:
        heldout_share = 0.2 if dp_epsilon is None else 0.0
    settings = TuneSettings(
        model=model,
        data=data,
        method=method,
        out=out,
        run=out.with_name(out.name + ".run"),
        merged=merged,
        resume=resume,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        estimator=estimator,
        zo_eps=zo_eps,
        directions=directions,
        zo_rule=zo_rule,
        sparse_share=sparse_share,
        sparse_by=sparse_by,
        objective=objective,
        labels=split_words(labels),
        forward_mode=forward_mode,
        dp_epsilon=dp_epsilon,
        dp_delta=dp_delta,
        dp_clip=dp_clip,
        gradient_checkpointing=gradient_checkpointing,
        base_bits=base_bits,
        rank=rank,
        alpha=alpha,
        init=init,
        width=width,
        virtual_tokens=virtual_tokens,
        memory_budget_bytes=None if memory_budget is None else parse_bytes(memory_budget, "--memory-budget"),
        family=family,
        side=side,
        side_width=side_width,
        side_init=side_init,
        heldout_share=heldout_share,
        max_length=max_length,
        template=template,
        limit=limit,
        share=share,
        split=split,
        dtype=dtype,
        seed=seed,
    )
    check_settings(settings)

    from cotune.data.label_words import label_words
    from cotune.data.records import read_examples

    examples = read_examples(data, template, limit, seed, split, share=share)
    if objective == "accuracy":
        settings = replace(settings, labels=label_words(examples, settings.labels))

    # Only now: it loads PyTorch, which takes seconds.
    from cotune.cli.tune_adaptation import tune_adaptation, tune_config
    from cotune.cli.tune_record import record_run
    from cotune.cli.tune_side import tune_side_network
    from cotune.evaluation.measured_memory import PeakMeter
    from cotune.models.backbone import Backbone

    give_back_freed_memory()
    if method not in RESULT_FILES:
        # Before memory is measured: what a library takes is not what tuning takes.
        import peft  # noqa: F401

    resolved = None if method == "side" else plain(tune_config(settings))
    backbone = Backbone.from_pretrained(model, dtype=dtype, device=torch_device, base_bits=base_bits)
    written = _written(settings)
    shown = {**{name: written[name] for name in written if name not in foreign_options(method)}, "resolved": resolved}
    work = tune_side_network if method == "side" else tune_adaptation
    with (
        run_folder(settings.run, "cotune tune", {**written, "resolved": resolved}),
        progress(f"tuning with {method}", enabled=not as_json) as advance,
    ):
        meter = PeakMeter(torch_device)
        trained = work(
            backbone, examples, settings, lambda stage, done, total, note: advance(done, total, f"{stage} {note}")
        )
        summary = record_run(backbone, settings, trained, meter.read(), shown)
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary, len(examples))


def _written(settings: TuneSettings) -> dict[str, object]:
    written: dict[str, object] = plain(settings)
    # Where it lies and whether it was interrupted is not how it was made.
    return {name: value for name, value in written.items() if name not in ("out", "run", "resume")}


def _print_summary(summary: Summary, num_texts: int) -> None:
    stderr.print(
        f"[bold]{summary['method']}[/] {escape(summary['out'])}: {summary['num_parameters']:,} trained parameters, "
        f"{num_texts} {'text' if num_texts == 1 else 'texts'}"
    )
    if summary.get("heldout_nats_per_token") is not None:
        stderr.print(
            f"held-out loss {summary['base_nats_per_token']:.3f} (start) -> "
            f"{summary['heldout_nats_per_token']:.3f} nats per token"
        )
    for score in OBJECTIVES[1:]:
        if summary.get(f"heldout_{score}") is not None:
            stderr.print(
                f"held-out {score} {summary[f'base_{score}']:.3f} (start) -> {summary[f'heldout_{score}']:.3f}"
            )
    stderr.print(_told_cost(summary))
    if "privacy" in summary:
        stderr.print(escape(str(summary["privacy"])))
        for assumption in summary["privacy_assumptions"]:
            stderr.print(f"  {escape(assumption)}")
    stderr.print(f"report: {Path(summary['run']) / 'report.html'}", markup=False, soft_wrap=True)


def _told_cost(summary: Summary) -> str:
    from cotune.evaluation.markup import number, size

    told = f"{number(summary['seconds'])} s, {number(summary['tokens_per_s'])} tokens per second"
    if summary["peak_bytes"] is None:
        return told
    told += f", {size(summary['peak_bytes'])} of memory above the model"
    predicted = summary["predicted_peak_bytes"]
    return told if predicted is None else f"{told} ({size(predicted)} predicted)"
