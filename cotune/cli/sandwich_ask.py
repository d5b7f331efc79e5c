"""`cotune sandwich ask`: one request through a closed cloud, with nothing private in what leaves."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cotune.cli.output import print_json, stderr, stdout
from cotune.cli.sandwich_command import read_settings, read_text
from cotune.cli.sandwich_edge import KEY_VARIABLE, Fitted, open_fitted_edge, price_of
from cotune.cli.sandwich_prompts import open_cloud_or_hosted
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.sandwich.pipeline import Pipeline

CloudUrl = Annotated[
    str | None, typer.Option("--cloud", help="Base URL of an OpenAI-compatible API, such as https://host/v1.")
]
KeyEnv = Annotated[
    str | None,
    typer.Option(help=f"Variable of the environment with the API key; {KEY_VARIABLE} if left out, if it is set."),
]
Prices = Annotated[
    Path | None,
    typer.Option(help='JSON: {"MODEL": {"usd_per_million_in": 0.15, "usd_per_million_out": 0.6}}; yours to keep true.'),
]
CloudTimeout = Annotated[float, typer.Option(help="Seconds for each of the cloud's answers.")]
Detectors = Annotated[str | None, typer.Option(help="As in `cotune sandwich redact`.")]
Dictionary = Annotated[Path | None, typer.Option(help="As in `cotune sandwich redact`.")]
AllowList = Annotated[Path | None, typer.Option(help="As in `cotune sandwich redact`: strict.")]
DetectorTimeout = Annotated[float, typer.Option(help="Seconds for each detector; nothing is sent if it takes longer.")]
LedgerFile = Annotated[Path | None, typer.Option(help="Append what leaves to this egress ledger.")]


def ask(
    file: Annotated[str, typer.Argument(help="The request: a text file, or - for standard input.")],
    cloud: CloudUrl = None,
    model: Annotated[
        str | None, typer.Option(help="The cloud's name for its model; a fitted sandwich knows it.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="System message; sent as it is.")] = None,
    fitted: Annotated[
        Path | None, typer.Option(help="Folder of `cotune sandwich fit`: prompt, edge and adapter.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of the cloud's answer; 256 if left out.")] = None,
    max_usd: Annotated[float | None, typer.Option(help="Send nothing that could cost more; needs --prices.")] = None,
    prices: Prices = None,
    key_env: KeyEnv = None,
    cloud_timeout: CloudTimeout = 120.0,
    detectors: Detectors = None,
    dictionary: Dictionary = None,
    allow_list: AllowList = None,
    detector_timeout: DetectorTimeout = 5.0,
    cache: Annotated[Path | None, typer.Option(help="Folder of answers that were paid for.")] = None,
    ledger: LedgerFile = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print the answer as it comes; without an edge model alone.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent and its cost; send nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; it holds the restored answer.")
    ] = False,
) -> None:
    """Redact FILE, ask a cloud, merge on the edge, restore, and print the answer.

    If a detector fails or takes too long nothing is sent and the status is 1.

    Examples:

        cotune sandwich ask mail.txt --cloud http://127.0.0.1:7070/v1 --model starter

        cotune sandwich ask mail.txt --cloud https://api.example.org/v1 --model m --prices prices.json --max-usd 0.01

        cotune sandwich ask mail.txt --cloud http://127.0.0.1:7070/v1 --model starter --dry-run

        cotune sandwich ask mail.txt --cloud http://127.0.0.1:7070/v1 --model starter --stream
    """
    from cotune.ledger import EgressLedger
    from cotune.sandwich.budget import Budget, Purse
    from cotune.sandwich.cloud_gate import AnswerCache, CloudGate, RetryRules
    from cotune.sandwich.pipeline import Pipeline, PipelineConfig
    from cotune.sandwich.redact import Redactor

    if stream and as_json:
        raise InputError("--stream and --json are both given, expected one; JSON is printed when the answer is whole")
    known = None if fitted is None else Fitted.load(fitted)
    name = model or (known.model if known else None)
    if name is None:
        raise InputError("--model is missing, expected the cloud's name for its model; or --fitted")
    if prompt is not None and known is not None:
        raise InputError("--prompt and --fitted are both given, expected one; the fitted prompt would not be used")
    hosted = known.hosted if known else None
    text = read_text(file)
    config = PipelineConfig(model=name, max_tokens=max_tokens or (known.max_tokens if known else 256))
    with ExitStack() as stack:
        merger = rewriter = None
        if known is not None and (known.is_rewriting or not dry_run):
            merger, rewriter = stack.enter_context(open_fitted_edge(known))
        redactor = stack.enter_context(
            Redactor(read_settings(detectors, dictionary, allow_list), timeout_s=detector_timeout)
        )
        gate = CloudGate(
            stack.enter_context(open_cloud_or_hosted(cloud, hosted, key_env)),
            price=price_of(name, prices),
            purse=Purse(Budget(usd=max_usd)),
            cache=None if cache is None else AnswerCache(cache),
            ledger=None if ledger is None else stack.enter_context(EgressLedger(ledger)),
            retry=RetryRules(timeout_s=cloud_timeout),
        )
        chosen = known.prompt if known else prompt or ""
        if half := merger or rewriter:
            half.edge.count_in(gate.account)
        pipeline = Pipeline(redactor, gate, config, prompt=chosen, rewriter=rewriter, merger=merger)
        if dry_run:
            _show_dry_run(pipeline, text, as_json)
            return
        if stream:
            pipeline.run_streamed(text, _print_piece)
            stdout.print()
            stderr.print(gate.account.taken().to_text(), markup=False, soft_wrap=True)
            return
        done = pipeline.run(text)
        taken = gate.account.taken()
    if as_json:
        print_json({"text": done.text, "sent": [json.loads(each) for each in gate.sent.payloads], **taken.to_json()})
        return
    stdout.print(done.text, markup=False, soft_wrap=True)
    stderr.print(taken.to_text(), markup=False, soft_wrap=True)


def _print_piece(piece: str) -> None:
    stdout.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    stdout.file.flush()


def _show_dry_run(pipeline: Pipeline, text: str, as_json: bool) -> None:
    from cotune.sandwich.cost import shown_usd

    prepared = pipeline.prepare(text)
    requests = [pipeline.request_of(prepared, question) for question in prepared.questions]
    most = [pipeline.gate.most(request) for request in requests]
    tokens, usd = sum(each.tokens for each in most), sum(each.usd for each in most)
    if as_json:
        bodies = [request.body() for request in requests]
        print_json({"would_send": bodies, "at_most": {"calls": len(most), "tokens": tokens, "usd": usd}})
        return
    for request in requests:
        stdout.print(json.dumps(request.body(), ensure_ascii=False, indent=1), markup=False, soft_wrap=True)
    stderr.print(
        f"nothing was sent; it would cost at most {len(most)} calls, {tokens:,} tokens{shown_usd(usd)}", markup=False
    )
