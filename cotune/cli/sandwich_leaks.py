"""`cotune sandwich leaks`: how much private gets out of requests, counted; and how much an attacker guesses."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cotune.cli.output import print_json, stderr, stdout
from cotune.cli.sandwich_ask import (
    AllowList,
    CloudTimeout,
    Detectors,
    DetectorTimeout,
    Dictionary,
    KeyEnv,
    LedgerFile,
    Prices,
)
from cotune.cli.sandwich_command import read_settings
from cotune.cli.sandwich_edge import open_cloud, price_of
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.sandwich.leak import InversionResult, LeakMetrics


def leaks(
    data: Annotated[
        str, typer.Argument(help="Requests with a column `private`, a list of the values in them; `public`: pieces.")
    ],
    sent: Annotated[
        Path | None,
        typer.Option(help="`sent.jsonl` of a fit: look in all that was sent; else in what would be sent of DATA."),
    ] = None,
    attack: Annotated[
        str | None,
        typer.Option(help="Base URL of a model that guesses what stands for what from the redacted text alone."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --attack: its name there.")] = None,
    budget_calls: Annotated[int, typer.Option(help="With --attack: the most requests.")] = 100,
    limit: Annotated[int | None, typer.Option(help="Requests at most, drawn by --seed.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    prices: Prices = None,
    key_env: KeyEnv = None,
    cloud_timeout: CloudTimeout = 120.0,
    detectors: Detectors = None,
    dictionary: Dictionary = None,
    allow_list: AllowList = None,
    detector_timeout: DetectorTimeout = 5.0,
    ledger: LedgerFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; it holds no private value.")] = False,
) -> None:
    """Count the private values of DATA that stand in what is sent, without a judge; nothing is sent without --attack.

    With --attack a language model reads the redacted requests, which are sent to it, and guesses each placeholder.

    Examples:

        cotune sandwich leaks train.jsonl --dictionary my-words.txt

        cotune sandwich leaks train.jsonl --sent run/sent.jsonl

        cotune sandwich leaks train.jsonl --limit 50 --attack http://127.0.0.1:7070/v1 --model starter
    """
    from cotune.ledger import EgressLedger
    from cotune.sandwich.budget import Budget, Purse
    from cotune.sandwich.cloud_gate import CloudGate, RetryRules
    from cotune.sandwich.examples import read_private_examples
    from cotune.sandwich.leak import invert, measure_leaks, over_redaction
    from cotune.sandwich.redact import Redactor
    from cotune.sandwich.sent_log import read_sent

    if attack is not None and model is None:
        raise InputError("--attack is given without --model, expected the name of the attacking model")
    examples = read_private_examples(data, limit=limit, seed=seed if limit else None)
    if attack is None and not any(each.private for each in examples):
        raise InputError(f"{data} names no private value, expected a column `private` with lists of texts")
    logged = None if sent is None else read_sent(sent)
    with ExitStack() as stack:
        redactor = stack.enter_context(
            Redactor(read_settings(detectors, dictionary, allow_list), timeout_s=detector_timeout)
        )
        requests = [redactor.request() for _ in examples]
        texts = [request.redact(each.request).text for request, each in zip(requests, examples, strict=True)]
        public = [text for each in examples for text in each.public]
        found = measure_leaks([each.private for each in examples], texts if logged is None else logged, public)
        # Of what detectors took away, whatever a run sent.
        beside = fmean(
            over_redaction(each.request, each.private, text) for each, text in zip(examples, texts, strict=True)
        )
        guessed = None
        if attack is not None and model is not None:
            gate = CloudGate(
                stack.enter_context(open_cloud(attack, key_env)),
                price=price_of(model, prices),
                purse=Purse(Budget(calls=budget_calls)),
                ledger=None if ledger is None else stack.enter_context(EgressLedger(ledger)),
                retry=RetryRules(timeout_s=cloud_timeout),
            )
            guessed = invert(gate, list(zip(texts, requests, strict=True)), model=model)
    if as_json:
        print_json(_as_json(found, beside, guessed))
        return
    stdout.print(_as_text(found, beside, guessed), markup=False, soft_wrap=True)
    if attack is None:
        stderr.print("nothing was sent", markup=False)


def _as_json(found: LeakMetrics, beside: float, guessed: InversionResult | None) -> dict[str, Any]:
    attacked = None
    if guessed is not None:
        attacked = {"values": guessed.num_values, "right": guessed.num_right, "top1": guessed.top1}
    return {**found.to_json(), "over_redaction": beside, "inversion": attacked}


def _as_text(found: LeakMetrics, beside: float, guessed: InversionResult | None) -> str:
    shares = found.to_json()
    lines = [
        f"leak_rate       {shares['leak_rate']:.2%} of {found.num_units:,} marked values stand in it",
        f"leak_fuzzy      {shares['leak_fuzzy']:.2%} by most of their words",
        f"any_leak        {shares['any_leak']:.2%} of {found.num_requests:,} requests have one",
        f"of the user     {shares['leak_rate_own']:.2%}, {shares['leak_fuzzy_own']:.2%}, {shares['any_leak_own']:.2%} "
        "outside of the pieces that DATA calls public",
        f"as words        {shares['leak_words']:.2%} of the values, there and as words of their own",
        f"over_redaction  {beside:.2%} of the other words are missing in a request",
    ]
    if guessed is not None:
        lines.append(
            f"inversion       {guessed.top1:.2%} of {guessed.num_values:,} placeholders guessed "
            "at the first try by a model that reads what is sent"
        )
    return "\n".join(lines)
