"""`cotune compress`: a model small enough for a device, in one command, with a report card."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from cotune.cli.connection import TlsCaOption, TokenFileOption, connector
from cotune.cli.label_option import split_words
from cotune.cli.output import Advance, print_json, progress, stderr, stdout
from cotune.cli.run_folder import command_line, plain, run_folder, versions
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.cli.compress_card import CardSettings, ReportCard
    from cotune.compression.calibration import CalibrationTexts
    from cotune.compression.compress import CompressInputs, CompressResult, Step
    from cotune.compression.stages import Stage
    from cotune.data.templates import Example
    from cotune.distillation.teacher import Teacher
    from cotune.evaluation.compression_report import CompressionRow

_CLOUD = ("ws://", "wss://")
_CLOUD_TOP_K = 64
_PROMPTS = 8
_COUNTS = (
    *("calibration_texts", "calibration_length", "limit", "eval_limit"),
    *("max_new_tokens", "max_length", "threads"),
)


@dataclass(frozen=True, kw_only=True)
class CompressSettings:
    """The arguments of the command, by their names there."""

    model: str
    out: Path
    prune: tuple[str, ...]
    distill: str | None
    quantize: str | None
    export: str | None
    recover: bool
    calibration: str | None
    calibration_texts: int
    calibration_length: int | None
    train_data: str | None
    data: str | None
    template: str | None
    limit: int | None
    eval_limit: int | None
    labels: tuple[str, ...] | None
    max_new_tokens: int
    max_length: int | None
    teacher: str | None
    epochs: int
    learning_rate: float
    rank: int
    dtype: str | None
    rounds: int
    threads: int | None
    seed: int

    @property
    def run(self) -> Path:
        """The run folder, beside the result."""
        return self.out.with_name(self.out.name + ".run")


def compress(
    model: Annotated[str, typer.Argument(help="A Hugging Face causal-LM folder or hub name, or `starter`.")],
    out: Annotated[Path, typer.Option(help="New folder for the result; its run and report are in OUT.run beside it.")],
    prune: Annotated[
        list[str] | None,
        typer.Option(
            help="METHOD:AMOUNT. depth:2 drops two blocks; channels, heads, hidden_size, width: a share such as 0.25; "
            "for study magnitude, wanda, sparse_gpt: a share, or 2:4. Again for another one."
        ),
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(help="DIVERGENCE[:LAYERS], forward, reverse or js: learn from --teacher, with so many layers."),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="METHOD:BITS, such as gptq:4; gptq, awq or rtn, 8, 4 or 3 bits.")
    ] = None,
    export: Annotated[
        str | None,
        typer.Option(help="onnx, onnx:8, gguf, gguf:Q8_0, ...: a folder for `cotune device generate --offline`."),
    ] = None,
    recover: Annotated[bool, typer.Option("--recover", help="Tune with LoRA after each stage but export.")] = False,
    calibration: Annotated[
        str | None, typer.Option(help="Texts that layers are measured with: .jsonl, .csv, .parquet, folder, Hub.")
    ] = None,
    calibration_texts: Annotated[int, typer.Option(help="Rows of these, at most.")] = 128,
    calibration_length: Annotated[
        int | None, typer.Option(help="Tokens in a row; 512 or the model's context if left out.")
    ] = None,
    train_data: Annotated[
        str | None, typer.Option(help="Texts for --recover and --distill; those of --calibration if left out.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Held-out texts for the scores before and after; no scores if left out.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="How columns become prompts, or a data set's name; found by itself if left out.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use this many training texts at most.")] = None,
    eval_limit: Annotated[int | None, typer.Option(help="Use this many held-out texts at most.")] = 100,
    labels: Annotated[
        list[str] | None, typer.Option(help="Label words, such as terrible,great: also score accuracy.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of each text that is written for the scores.")] = 64,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a training text; the context if left out.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="For --distill: a model, or a cloud's URL (ws:// or wss://); MODEL itself if left out."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="--recover: times that each text is seen.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="--recover: the largest one.")] = 1e-3,
    rank: Annotated[int, typer.Option(help="--recover: of the LoRA.")] = 8,
    dtype: Annotated[
        str | None, typer.Option(help="Of whole weights in the result; that of MODEL's file if left out.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Of the measurement of speed and memory; 0 leaves it out.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Of that measurement; as PyTorch takes them if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    keep_stages: Annotated[bool, typer.Option("--keep-stages", help="Keep the models of all stages in OUT.run.")] = (
        False
    ),
    token_file: TokenFileOption = None,
    tls_ca: TlsCaOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make MODEL smaller: prune, then distil, then quantise, then export, whichever are given, always in this order.

    The result is a model folder like any other, or with --export one that runs without PyTorch. What LoRA recovers goes
    into the weights; after --quantize it stays an adapter, OUT.adapter, for --adapter. OUT.run/report.html says for
    each stage what it costs and gives. Settings of a stage stand behind it: --prune sparse_gpt:0.5,damping=0.1.

    Examples:

        cotune compress my-model --out small --quantize gptq:4 --calibration texts.jsonl --data heldout.jsonl

        cotune compress my-model --out small --prune depth:2 --recover --calibration texts.jsonl --data heldout.jsonl

        cotune compress my-model --out phone --prune depth:2 --quantize gptq:4 --export onnx --calibration texts.jsonl

        cotune compress my-model --out small --distill js:4 --teacher wss://llm.example:7070 --train-data texts.jsonl

        cotune compress starter --out starter-gguf --export gguf:Q8_0
    """
    settings = CompressSettings(
        model=model,
        out=out,
        prune=tuple(prune or ()),
        distill=distill,
        quantize=quantize,
        export=export,
        recover=recover,
        calibration=calibration,
        calibration_texts=calibration_texts,
        calibration_length=calibration_length,
        train_data=train_data,
        data=data,
        template=template,
        limit=limit,
        eval_limit=eval_limit,
        labels=split_words(labels),
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        teacher=teacher,
        epochs=epochs,
        learning_rate=learning_rate,
        rank=rank,
        dtype=dtype,
        rounds=rounds,
        threads=threads,
        seed=seed,
    )
    _check(settings)

    # Only now: it loads PyTorch, which takes seconds.
    from cotune.cli.compress_card import ReportCard
    from cotune.compression.compress import check_request
    from cotune.compression.compress import compress as run_stages
    from cotune.evaluation.compression_report import write_compression_report
    from cotune.models.weights import digest_folder

    stages = _stages(settings)
    with ExitStack() as stack:
        inputs = _inputs(settings, stages, stack, token_file, tls_ca)
        source, resolved_dtype = check_request(model, stages, out, inputs, resume=resume)
        if teacher is not None and not resume:
            _check_teacher(teacher, source, token_file, tls_ca)
        card_settings = _card_settings(settings, source, inputs)
        config = {**plain(settings), "resolved": {"stages": plain(stages), "dtype": resolved_dtype}}
        run = stack.enter_context(run_folder(settings.run, "cotune compress", config))
        advance = stack.enter_context(progress("compressing", enabled=not as_json))
        card = ReportCard(run, card_settings, resume=resume)
        card.add_source(source, digest_folder(source), lambda done, total, note="": advance(done, total, f"0 {note}"))
        result = run_stages(
            model,
            stages,
            out,
            run,
            inputs,
            resume=resume,
            keeps_stages=keep_stages,
            on_step=lambda step: _measure(card, step, advance),
            progress=lambda stage, done, total, note: advance(done, total, f"{stage.label} {note}"),
        )
        report = write_compression_report(
            run,
            card.rows,
            title=f"{Path(model).name}, made smaller",
            repeat=command_line(),
            settings=config,
            versions=versions(),
        )
    if as_json:
        print_json(_summary(result, settings.run, report, card.rows))
        return
    _print_table(card.rows)
    beside = "" if result.adapter is None else f", with its adapter {result.adapter}"
    stderr.print(f"{escape(str(result.out))}{escape(beside)}; the report is {escape(str(report))}", soft_wrap=True)


def _check(settings: CompressSettings) -> None:
    """Refuse what can be refused before anything is loaded."""
    stages = (*settings.prune, settings.distill, settings.quantize, settings.export)
    if not any(stages):
        raise InputError("nothing is to be done, expected --prune, --distill, --quantize or --export; see --help")
    for name in _COUNTS:
        count = getattr(settings, name)
        if count is not None and count < 1:
            raise InputError(f"--{name.replace('_', '-')} is {count}, expected at least 1")
    if settings.rounds < 0 or settings.rounds == 1:
        raise InputError(f"--rounds is {settings.rounds}, expected at least 2, or 0 to leave speed and memory out")
    if settings.teacher is not None and settings.distill is None:
        raise InputError("--teacher is given without --distill, expected both; or leave --teacher out")
    if settings.labels is not None and settings.data is None:
        raise InputError("--labels are given without --data, expected held-out texts whose targets they are")


def _stages(settings: CompressSettings) -> list[Stage]:
    import dataclasses

    from cotune.compression.stage_words import parse_stage
    from cotune.compression.stages import Distil, Recover, with_recovery
    from cotune.tuning.loop import LoopConfig

    given = [
        *(("prune", "prune", text) for text in settings.prune),
        ("distill", "distil", settings.distill),
        ("quantize", "quantise", settings.quantize),
        ("export", "export", settings.export),
    ]
    stages: list[Stage] = []
    for option, kind, text in given:
        if text is None:
            continue
        try:
            stage = parse_stage(kind, text)
        except InputError as error:
            raise InputError(f"--{option} {text}: {error}") from error
        if isinstance(stage, Distil) and stage.settings.top_k is None and (settings.teacher or "").startswith(_CLOUD):
            stage = dataclasses.replace(stage, settings=dataclasses.replace(stage.settings, top_k=_CLOUD_TOP_K))
        stages.append(stage)
    if settings.recover:
        loop = LoopConfig(epochs=settings.epochs, learning_rate=settings.learning_rate)
        stages = with_recovery(stages, Recover(rank=settings.rank, loop=loop))
    return stages


def _inputs(
    settings: CompressSettings,
    stages: Sequence[Stage],
    stack: ExitStack,
    token_file: Path | None,
    tls_ca: Path | None,
) -> CompressInputs:
    from cotune.compression.compress import CompressInputs
    from cotune.data.records import read_examples
    from cotune.models.weights import digest_folder, find_model_folder

    examples: list[Example] = []
    texts = settings.train_data or settings.calibration
    if texts is not None and any(stage.needs_examples for stage in stages):
        examples = read_examples(texts, settings.template, settings.limit, settings.seed)
    calibration = None
    if settings.calibration is not None and any(stage.kind in ("prune", "quantise") for stage in stages):
        calibration = _calibration(settings, settings.calibration)
    name, make = settings.teacher or "", None
    if settings.teacher is not None:
        url = settings.teacher
        if not url.startswith(_CLOUD):
            name = digest_folder(find_model_folder(url))

        def make() -> Teacher:
            return _teacher(url, settings.run, stack, token_file, tls_ca)

    return CompressInputs(
        calibration=calibration,
        examples=examples,
        max_length=settings.max_length,
        teacher=make,
        teacher_name=name,
        dtype=settings.dtype,
        seed=settings.seed,
    )


def _calibration(settings: CompressSettings, path: str) -> CalibrationTexts:
    from cotune.compression.calibration import CalibrationTexts
    from cotune.models.weights import find_model_folder, read_tokenizer

    folder = find_model_folder(settings.model)
    return CalibrationTexts.read(
        path,
        read_tokenizer(folder),
        template=settings.template,
        num_texts=settings.calibration_texts,
        length=settings.calibration_length or min(512, _context(folder)),
        seed=settings.seed,
        takes_fewer=True,
    )


def _context(folder: Path) -> int:
    """The model's, from its config alone."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True).get_text_config()
        return int(config.max_position_embeddings)
    except (AttributeError, ValueError, KeyError, TypeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder / 'config.json'} cannot be used ({reason}); copy the model again") from error


def _teacher(name: str, run: Path, stack: ExitStack, token_file: Path | None, tls_ca: Path | None) -> Teacher:
    """A model in this process, or one behind a cloud, to which only the ids of texts go, through the ledger."""
    from cotune.device.features import RemoteFeatureSource
    from cotune.distillation.teacher import CloudTeacher, LocalTeacher
    from cotune.ledger import EgressLedger
    from cotune.models.backbone import Backbone

    if not name.startswith(_CLOUD):
        return LocalTeacher(Backbone.from_pretrained(name))
    ledger = stack.enter_context(EgressLedger(run / "ledger.jsonl"))
    make = connector(name, token_file=token_file, tls_ca=tls_ca, ledger=ledger, way="distil")
    return CloudTeacher(stack.enter_context(RemoteFeatureSource(make, want_hidden=False)))


def _check_teacher(name: str, source: Path, token_file: Path | None, tls_ca: Path | None) -> None:
    """Refuse a teacher that is not there or counts in other tokens, before minutes of measuring."""
    from cotune.device.features import RemoteFeatureSource
    from cotune.models.weights import find_model_folder, read_tokenizer

    if name.startswith(_CLOUD):
        # A greeting holds nothing of the texts.
        make = connector(name, token_file=token_file, tls_ca=tls_ca)
        with RemoteFeatureSource(make, want_hidden=False) as cloud:
            theirs = cloud.description.tokenizer_digest
    else:
        theirs = hashlib.sha256(read_tokenizer(find_model_folder(name))).hexdigest()
    ours = hashlib.sha256(read_tokenizer(source)).hexdigest()
    if ours != theirs:
        raise InputError(
            f"--teacher {name} has tokenizer {theirs[:12]} and the model {ours[:12]}, expected the same; take a model "
            "with the teacher's tokenizer.json, or make the teacher itself smaller"
        )


def _card_settings(settings: CompressSettings, source: Path, inputs: CompressInputs) -> CardSettings:
    import torch

    from cotune.cli.compress_card import CardSettings, agreement_prompts
    from cotune.cli.decode_cost import DecodeSettings
    from cotune.data.label_words import label_words
    from cotune.data.records import read_examples

    examples: list[Example] = []
    if settings.data is not None:
        examples = read_examples(settings.data, settings.template, settings.eval_limit, settings.seed)
    prompts: tuple[str, ...] = ()
    if settings.export is not None:
        own = [each.prompt or each.target for each in (examples or inputs.examples)[:_PROMPTS]]
        prompts = agreement_prompts(source, own or _SENTENCES, context=_context(source), num=_PROMPTS)
    decode = None
    if settings.rounds:
        threads = settings.threads or torch.get_num_threads()
        decode = DecodeSettings(num_rounds=settings.rounds, num_threads=threads)
    return CardSettings(
        examples=tuple(examples),
        max_new_tokens=settings.max_new_tokens,
        labels=() if settings.labels is None else label_words(examples, settings.labels),
        decode=decode,
        agreement_prompts=prompts,
        seed=settings.seed,
    )


# Where no texts are given: an exported model is held against its source all the same.
_SENTENCES = (
    "The weather in the north was",
    "User: What is the capital of France?",
    "def add(a, b):",
    "Once upon a time there was a",
)


def _measure(card: ReportCard, step: Step, advance: Advance) -> None:
    card.add_step(step, lambda done, total, note="": advance(done, total, f"{step.stage.label}: {note}"))


def _summary(result: CompressResult, run: Path, report: Path, rows: Sequence[CompressionRow]) -> dict[str, Any]:
    return {
        "out": str(result.out),
        "adapter": None if result.adapter is None else str(result.adapter),
        "run": str(run),
        "report": str(report),
        "rows": [{name: value for name, value in row.items() if name != "layers"} for row in rows],
        "stages": [{"label": step.stage.label, "report": step.report} for step in result.steps],
    }


def _print_table(rows: Sequence[CompressionRow]) -> None:
    from cotune.evaluation.compression_report import bits_per_weight
    from cotune.evaluation.markup import number, share, size

    scores = [
        (head, name)
        for head, name in (("perplexity", "perplexity"), ("Rouge-L", "rouge_l"), ("accuracy", "label_accuracy"))
        if any((row.get("judgement") or {}).get(name) is not None for row in rows)
    ]
    speeds = any(row.get("decode") for row in rows)
    heads = ["size", "share", "bits", *(head for head, _ in scores)]
    heads += ["prefill/s", "decode/s", "memory"] if speeds else []
    table = Table("stage", *heads, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # So that all fit 80 characters and stages keep their names.
    table.columns[0].min_width = 13
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for row in rows:
        cells = [
            size(row["size_bytes"]),
            share(row["size_bytes"] / rows[0]["size_bytes"]),
            number(bits_per_weight(row)),
            *(number((row.get("judgement") or {}).get(name)) for _, name in scores),
        ]
        if speeds:
            prefill, decode = row.get("prefill"), row.get("decode")
            cells += [number(None if one is None else one["median"]) for one in (prefill, decode)]
            cells.append(size(row.get("peak_bytes")))
        table.add_row(escape(row["name"]), *cells)
    stdout.print(table)
