"""`cotune evaluate`: how good a model, or a plugin with its cloud, is on texts that it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cotune.cli.connection import TlsCaOption, TokenFileOption, connector
from cotune.cli.label_option import split_words
from cotune.cli.output import Advance, print_json, progress, stdout
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.data.templates import Example
    from cotune.device.client import Connector
    from cotune.evaluation.judgement import Judgement


def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="A plugin folder (with --cloud), or a model folder, hub name, `starter`, offline folder."),
    ],
    data: Annotated[str, typer.Argument(help="Held-out texts: .jsonl, .csv or .parquet, a folder, a Hub data set.")],
    cloud: Annotated[str | None, typer.Option(help="For a plugin: URL of its cloud.")] = None,
    mode: Annotated[str | None, typer.Option(help="For a plugin: the mode; by default it consults always.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="For a model: a folder of `cotune tune`, of any method, or of peft.")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="Another word for --adapter.", hidden=True)] = None,
    base_bits: Annotated[int | None, typer.Option(help="For a model: 4 or 8, as in `cotune tune`.")] = None,
    template: Annotated[
        str | None, typer.Option(help="How columns become prompts, or a data set's name; found by itself if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use this many examples at most.")] = 100,
    share: Annotated[
        float | None, typer.Option(help="Use this part of the examples, such as 0.1; drawn by the seed.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a folder or Hub data set; train, or the only one, if left out.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of each generated text.")] = 64,
    labels: Annotated[
        list[str] | None,
        typer.Option(help="Label words, such as terrible,great: also how often the right one is the likeliest."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of examples and of the bootstrap.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    torch_device: Annotated[str, typer.Option("--device", help="A PyTorch device, such as cpu or cuda.")] = "cpu",
    token_file: TokenFileOption = None,
    tls_ca: TlsCaOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Judge MODEL on DATA: Rouge-L, exact match and F1 of what it writes, perplexity of what was written.

    With --labels also accuracy, by the likelihood of each label word, as MeZO's study has it.

    Examples:

        cotune evaluate starter heldout.jsonl

        cotune evaluate starter heldout.jsonl --adapter my-lora

        cotune evaluate starter reviews.jsonl --labels terrible,great

        cotune evaluate my-exported-model heldout.jsonl

        cotune evaluate my-plugin heldout.jsonl --cloud ws://127.0.0.1:7070 --mode spa
    """
    from cotune.data.label_words import label_words
    from cotune.data.records import read_examples
    from cotune.wire.event_loop import run_coroutine

    is_plugin = (Path(model) / "plugin.json").is_file()
    if is_plugin and cloud is None:
        raise InputError(f"{model} is a plugin; give the cloud that it was tuned on with --cloud")
    if not is_plugin and cloud is not None:
        raise InputError(f"--cloud is given, but {model} holds no plugin.json; give a plugin folder, or drop --cloud")
    if lora is not None and adapter is not None:
        raise InputError("both --lora and --adapter are given; give one of them")
    if is_plugin and (lora is not None or adapter is not None):
        raise InputError(f"{model} is a plugin, which takes no --adapter; give a model, or leave it out")
    is_offline = (Path(model) / "offline.json").is_file()
    if is_offline and (base_bits is not None or mode is not None):
        raise InputError(f"{model} is an exported model, which takes no --base-bits and no --mode; leave them out")
    examples = read_examples(data, template, limit, seed, split, share=share)
    words = () if labels is None else label_words(examples, split_words(labels))
    with progress("evaluating", enabled=not as_json) as advance:
        if cloud is not None:
            make = connector(cloud, token_file=token_file, tls_ca=tls_ca)
            result = run_coroutine(
                _judge_plugin(Path(model), make, examples, mode, max_new_tokens, words, seed, advance)
            )
        elif is_offline:
            from cotune.cli.offline_judging import judge_offline

            result = judge_offline(
                Path(model),
                examples,
                adapter=adapter or lora,
                max_new_tokens=max_new_tokens,
                labels=words,
                seed=seed,
                advance=advance,
            )
        else:
            from cotune.cli.backbone_judging import judge_model
            from cotune.models.backbone import Backbone

            backbone = Backbone.from_pretrained(model, dtype=dtype, device=torch_device, base_bits=base_bits)
            result = judge_model(
                backbone,
                adapter or lora,
                examples,
                max_new_tokens=max_new_tokens,
                labels=words,
                seed=seed,
                advance=advance,
                mode=mode,
            )
    if as_json:
        print_json({"model": model, "mode": mode, "data": data, **result.to_dict()})
        return
    low, high = result.rouge_l_interval or (0.0, 0.0)
    stdout.print(f"{model} on {result.num_texts} texts of {data}", markup=False)
    stdout.print(f"  Rouge-L      {result.rouge_l:.3f}  (95 %: {low:.3f} to {high:.3f})")
    stdout.print(f"  exact match  {result.exact_match:.3f}")
    stdout.print(f"  F1           {result.token_f1:.3f}")
    stdout.print(f"  perplexity   {result.perplexity:.2f}  ({result.nats_per_token:.3f} nats per token)")
    stdout.print(f"  bits/byte    {result.bits_per_byte:.3f}")
    if result.label_accuracy is not None:
        stdout.print(f"  accuracy     {result.label_accuracy:.3f}  (label words {', '.join(words)})", markup=False)


async def _judge_plugin(
    folder: Path,
    make: Connector,
    examples: list[Example],
    mode: str | None,
    max_new_tokens: int,
    labels: tuple[str, ...],
    seed: int,
    advance: Advance,
) -> Judgement:
    from cotune.cli.judging import encode_for, fit_for, generate_all, judge_labels, judge_likelihood
    from cotune.device.client import CloudClient
    from cotune.device.runtime import Device, GenerationOptions
    from cotune.evaluation.judgement import judge
    from cotune.plugin import Plugin

    device = Device(Plugin.load(folder), make)
    chosen = mode or device.default_mode
    options = GenerationOptions(mode=chosen, max_new_tokens=max_new_tokens)
    device.check(options)
    async with CloudClient(make) as client:
        device.check_cloud(client.description)
        examples = fit_for(client, device, examples, max_new_tokens)
        nats = await judge_likelihood(client, {chosen: device}, encode_for(client, device, examples), advance)
        accuracy = await judge_labels(client, device, chosen, examples, labels, advance) if labels else None
        texts = await generate_all(client, device, [example.prompt for example in examples], options, advance)
    return judge(
        [example.target for example in examples],
        predictions=[text.text for text in texts],
        token_nats=nats[chosen].tolist(),
        label_accuracy=accuracy,
        seed=seed,
    )
