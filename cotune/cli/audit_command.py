"""`cotune audit`: what a model has memorised of the texts that it was tuned on; `cotune audit plant`: canaries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cotune.cli.connection import TlsCaOption, TokenFileOption, connector
from cotune.cli.default_group import group_with_default
from cotune.cli.output import Advance, print_json, progress, stderr, stdout
from cotune.errors import AuditError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cotune.data.templates import Example
    from cotune.evaluation.memorisation import Audit, Limits, Score
    from cotune.models.backbone import Backbone

audit = typer.Typer(
    name="audit",
    cls=group_with_default("model"),
    no_args_is_help=True,
    help="What a model has memorised: `cotune audit MODEL DATA`, or `cotune audit plant DATA` before tuning.",
)


@audit.command()
def model(
    model: Annotated[
        str, typer.Argument(help="A plugin folder (with --cloud), or a model folder, hub name or `starter`.")
    ],
    data: Annotated[str, typer.Argument(help="The texts that it was tuned on, with canaries or without.")],
    heldout: Annotated[str | None, typer.Option(help="Texts of the same kind that it was not tuned on.")] = None,
    canaries: Annotated[
        Path | None, typer.Option(help="Canary manifest; canaries.json in the folder DATA if left out.")
    ] = None,
    cloud: Annotated[str | None, typer.Option(help="For a plugin: URL of its cloud.")] = None,
    mode: Annotated[str | None, typer.Option(help="For a plugin: the mode; by default it consults always.")] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="For a model: a folder of `cotune tune`, of any method, or of peft.")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="Another word for --adapter.", hidden=True)] = None,
    base_bits: Annotated[int | None, typer.Option(help="For a model: 4 or 8, as in `cotune tune`.")] = None,
    base: Annotated[
        str | None, typer.Option(help="For a model that was tuned itself: what it was tuned from, to compare with.")
    ] = None,
    max_exposure: Annotated[
        float | None, typer.Option(help="Fail if a planted canary has an exposure of more bits.")
    ] = None,
    max_extraction: Annotated[
        float | None, typer.Option(help="Fail if a larger share of the training texts is reproduced, such as 0.01.")
    ] = None,
    prefix_tokens: Annotated[int, typer.Option(help="Tokens of the target that the model is given.")] = 8,
    next_tokens: Annotated[int, typer.Option(help="Tokens that it has to reproduce.")] = 16,
    candidates: Annotated[int, typer.Option(help="Other secrets that each canary is ranked among.")] = 1023,
    template: Annotated[
        str | None, typer.Option(help="How columns become prompts, or a data set's name; found by itself if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use this many texts at most, of each set.")] = 500,
    split: Annotated[
        str | None, typer.Option(help="Of a folder or Hub data set; train, or the only one, if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of texts.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder: config.json, audit.json, report.html.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    torch_device: Annotated[str, typer.Option("--device", help="A PyTorch device, such as cpu or cuda.")] = "cpu",
    token_file: TokenFileOption = None,
    tls_ca: TlsCaOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look for what MODEL has memorised of DATA: reproduced texts, losses, planted canaries.

    Ends with status 3 if a limit is broken.

    Examples:

        cotune audit starter texts.jsonl --adapter my-lora --heldout other-texts.jsonl --out runs/audit

        cotune audit my-plugin texts-with-canaries --cloud ws://127.0.0.1:7070 --max-exposure 6
    """
    from cotune.data.records import read_examples
    from cotune.evaluation.canaries import MANIFEST_NAME, Manifest
    from cotune.evaluation.memorisation import AuditConfig, Limits
    from cotune.evaluation.memorisation import audit as look

    is_plugin = (Path(model) / "plugin.json").is_file()
    _check_choices(model, is_plugin, cloud, mode, lora, adapter, base)
    if out is not None and any(each.exists() and not each.is_dir() for each in (out, *out.parents)):
        raise InputError(f"--out is {out}, where a file is in the way; give another folder")
    config = AuditConfig(num_prefix_tokens=prefix_tokens, num_next_tokens=next_tokens, num_candidates=candidates)
    limits = Limits(max_exposure=max_exposure, max_extraction=max_extraction)
    found = Path(data) / MANIFEST_NAME
    place = canaries if canaries is not None else found if found.is_file() else None
    manifest = None if place is None else Manifest.load(place)
    limits.check_possible(config, manifest)
    texts = read_examples(data, template, None, seed, split)
    texts = _drawn(texts if manifest is None else manifest.without_canaries(texts), limit)
    others = [] if heldout is None else read_examples(heldout, template, limit, seed)
    settings = {
        "model": model,
        "data": data,
        "heldout": heldout,
        "canaries": None if place is None else str(place),
        "adapter": adapter or lora,
        "base": base,
        "base_bits": base_bits,
        "mode": mode,
        "limit": limit,
        "seed": seed,
        "max_exposure": max_exposure,
        "max_extraction": max_extraction,
        "prefix_tokens": prefix_tokens,
        "next_tokens": next_tokens,
        "candidates": candidates,
    }
    with progress("auditing", enabled=not as_json) as advance:
        if cloud is not None:
            from cotune.cli.audit_scoring import plugin_scores

            make = connector(cloud, token_file=token_file, tls_ca=tls_ca)
            score = plugin_scores(Path(model), make, mode, advance)
        else:
            from cotune.models.backbone import Backbone

            backbone = Backbone.from_pretrained(model, dtype=dtype, device=torch_device, base_bits=base_bits)
            before = None if base is None else Backbone.from_pretrained(base, dtype=dtype, device=torch_device)
            score = _model_scores(backbone, before, adapter, lora, mode, advance)
        audited = look(score, texts, config, heldout=others, manifest=manifest)
    failure: AuditError | None = None
    try:
        audited.check(limits)
    except AuditError as error:
        failure = error
    if out is not None:
        _write_run(out, audited, limits, failure, settings)
    if as_json:
        print_json({"model": model, "data": data, "passed": failure is None, **audited.to_dict()})
    else:
        _print_audit(model, audited)
        if out is not None:
            stderr.print(f"report: {out / 'report.html'}", markup=False)
    if failure is not None:
        raise failure


@audit.command()
def plant(
    data: Annotated[str, typer.Argument(help="Texts to be tuned on.")],
    out: Annotated[Path, typer.Option(help="New folder for the texts with canaries, and the manifest.")],
    times: Annotated[
        str, typer.Option(help="How often each canary is repeated, such as 1,4,16; one more is left out.")
    ] = "1,4,16",
    num_each: Annotated[int, typer.Option("--each", help="Canaries for each of these.")] = 1,
    kind: Annotated[str, typer.Option(help="What secrets are made of: digits or words.")] = "digits",
    length: Annotated[int, typer.Option(help="Digits or words of a secret.")] = 6,
    template: Annotated[
        str | None, typer.Option(help="How columns become prompts, or a data set's name; found by itself if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use this many texts at most.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a folder or Hub data set; train, or the only one, if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of secrets and places.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plant random secrets in DATA, to tune on and to audit afterwards.

    Examples:

        cotune audit plant texts.jsonl --out texts-with-canaries

        cotune tune starter texts-with-canaries --out my-lora --heldout-share 0

        cotune audit starter texts-with-canaries --adapter my-lora
    """
    from cotune.data.records import read_examples
    from cotune.evaluation.canaries import MANIFEST_NAME, SecretSpace
    from cotune.evaluation.canaries import plant as plant_in

    if out.exists():
        raise InputError(f"--out is {out}, which is there already; give a new folder")
    examples = read_examples(data, template, limit, seed, split)
    space = SecretSpace(kind=kind, length=length)
    texts, manifest = plant_in(examples, _numbers(times), space=space, seed=seed, num_each=num_each)
    try:
        out.mkdir(parents=True)
        with (out / "train.jsonl").open("w", encoding="utf-8") as file:
            for text in texts:
                file.write(json.dumps({"prompt": text.prompt, "target": text.target}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"the folder {out} cannot be written ({error.strerror}); give another one") from error
    manifest.save(out / MANIFEST_NAME)
    if as_json:
        planted = [{"prompt": each.prompt, "times": each.times} for each in manifest.canaries]
        print_json({"out": str(out), "num_texts": len(texts), "space_bits": space.bits, "canaries": planted})
        return
    stdout.print(f"{out}: {len(examples):,} texts and {len(texts) - len(examples)} with canaries", markup=False)
    for each in manifest.canaries:
        stdout.print(f"  {each.times:>4} times  {each.prompt!r}", markup=False)


def _numbers(times: str) -> list[int]:
    try:
        return [int(part) for part in times.replace(",", " ").split()]
    except ValueError:
        raise InputError(f"--times is {times!r}, expected numbers such as 1,4,16") from None


def _check_choices(
    model: str,
    is_plugin: bool,
    cloud: str | None,
    mode: str | None,
    lora: Path | None,
    adapter: Path | None,
    base: str | None,
) -> None:
    if is_plugin and cloud is None:
        raise InputError(f"{model} is a plugin; give the cloud that it was tuned on with --cloud")
    if not is_plugin and cloud is not None:
        raise InputError(f"--cloud is given, but {model} holds no plugin.json; give a plugin folder, or drop --cloud")
    if mode is not None and not is_plugin and lora is None and adapter is None:
        raise InputError(f"--mode is given, but {model} is no plugin; drop --mode")
    given = [name for name, value in (("--lora", lora), ("--adapter", adapter), ("--base", base)) if value is not None]
    if len(given) > 1 or (given and is_plugin):
        raise InputError(f"{' and '.join(given)} cannot be given {'for a plugin' if is_plugin else 'together'}")


def _drawn(texts: Sequence[Example], limit: int | None) -> list[Example]:
    """The first ones of the order that the seed has drawn."""
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}, expected at least 1")
    return list(texts if limit is None else texts[:limit])


def _model_scores(
    backbone: Backbone,
    base: Backbone | None,
    adapter: Path | None,
    lora: Path | None,
    mode: str | None,
    advance: Advance,
) -> Score:
    from cotune.cli.audit_scoring import backbone_scores, folder_scores

    if adapter is not None:
        return folder_scores(backbone, adapter, mode, "adapter", advance)
    if lora is not None:
        return folder_scores(backbone, lora, mode, "lora", advance)
    return backbone_scores(backbone, None, base, "model", advance)


def _write_run(
    out: Path, audited: Audit, limits: Limits, failure: AuditError | None, settings: Mapping[str, object]
) -> None:
    from cotune.cli.run_folder import make_run_folder, write_config, write_json
    from cotune.evaluation.memorisation_report import write_audit_report

    make_run_folder(out)
    write_config(out, "cotune audit", settings)
    write_json(out / "audit.json", {"passed": failure is None, **audited.to_dict()})
    asked = limits.max_exposure is not None or limits.max_extraction is not None
    verdict = str(failure) if failure else "All limits are kept." if asked else "No limit was given."
    title = f"What {Path(str(settings['model'])).name} has memorised"
    write_audit_report(out, audited, title=title, limits=limits, verdict=verdict, settings=settings)


def _print_audit(model: str, audited: Audit) -> None:
    for found in audited.models:
        stdout.print(f"{found.name} ({model})" if found is audited.models[0] else found.name, markup=False)
        extracted = found.extraction
        stdout.print(f"  reproduced        {extracted.num_extracted} of {extracted.num_texts} training texts")
        if found.heldout_extraction is not None:
            other = found.heldout_extraction
            stdout.print(f"                    {other.num_extracted} of {other.num_texts} held-out texts")
        if found.membership is not None:
            member = found.membership
            stdout.print(f"  nats per token    {member.train_nats:.3f} training, {member.heldout_nats:.3f} held out")
            stdout.print(f"  loss gap          {member.gap:.3f}, members told apart {member.auc:.2f}")
        for each in found.exposures:
            stdout.print(f"  exposure {each.times:>5} x  {each.bits:.2f} of {each.max_bits:.2f} bits at most")
