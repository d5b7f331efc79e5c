"""`cotune device serve`: an OpenAI-compatible endpoint and a chat page for a personal model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cotune.cli.connection import TOKEN_VARIABLE, OptionalCloudOption, RttOption, TlsCaOption, connector, emulated
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
from cotune.cli.output import print_json, stderr
from cotune.errors import InputError
from cotune.generation.request import DRAFTED_SCHEDULES

if TYPE_CHECKING:
    from cotune.device.serve.server import ServeConfig
    from cotune.generation.sampling import Sampling


def serve(
    invocation: typer.Context,
    plugin: Annotated[
        Path | None, typer.Argument(help="Folder of the plugin; left out with --offline alone.", show_default=False)
    ] = None,
    cloud: OptionalCloudOption = None,
    offline: OfflineOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback only with TLS and tokens.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")] = 7071,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Bearer tokens (API keys) that are let in here, one a line.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name of this service, name or name:port; may be repeated.")
    ] = None,
    cloud_token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the cloud's bearer token; without it {TOKEN_VARIABLE} is used, if set."),
    ] = None,
    tls_ca: TlsCaOption = None,
    name: Annotated[str | None, typer.Option(help="How clients call the model; the folder's name if left out.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="integration or spa; ladder or separation for serial plugins. Default: consult always."),
    ] = None,
    schedule: Annotated[str, typer.Option(help="blocking, gated, optimistic, drafted or auto.")] = "optimistic",
    answer: Annotated[str, typer.Option(help="correction (cloud decides) or token (device decides).")] = "correction",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a text, where a client does not say.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy; where a client does not say.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 1.0,
    deadline_ms: Annotated[
        int, typer.Option(help="Let the cloud go on alone where this device is later than this, ms; 0 waits for ever.")
    ] = 0,
    draft_from: Annotated[
        str | None,
        typer.Option(help="Your texts, for schedules drafted and auto; drafts show pieces of them to the cloud."),
    ] = None,
    max_concurrent: Annotated[int, typer.Option(help="Texts made at once; one more is told to come back.")] = 8,
    ledger: Annotated[Path | None, typer.Option(help="Append what leaves the device to this JSON-lines file.")] = None,
    rtt_ms: RttOption = 0.0,
    timeout_s: Annotated[float, typer.Option(help="How long to wait for any one answer of the cloud.")] = 30.0,
    threads: ThreadsOption = None,
    context: ContextOption = None,
    adapter: AdapterOption = None,
    memory_limit: MemoryLimitOption = None,
    fallback_after: PatienceOption = 0.8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when ready.")] = False,
) -> None:
    """Serve the personal model to any chat client on this machine, until interrupted.

    With --offline a text goes on by a model on this device while the cloud is out of reach, and the cloud takes over
    again when it is back. Without PLUGIN and --cloud that model serves alone, and nothing leaves this device.

    The root is a chat page; /v1 is an OpenAI-compatible endpoint. Only this machine can reach it, unless --host says
    otherwise.

    Examples:

        cotune device serve my-plugin --cloud ws://127.0.0.1:7070

        cotune device serve my-plugin --cloud wss://llm.example:443 --cloud-token-file token.txt --port 8000

        cotune device serve my-plugin --cloud ws://127.0.0.1:7070 --host 0.0.0.0 --allow-host laptop.local
        --tls-cert cert.pem --tls-key key.pem --token-file keys.txt

        cotune device serve my-plugin --cloud ws://127.0.0.1:7070 --offline my-model

        cotune device serve --offline my-model --threads 2 --context 1024 --adapter my-lora
    """
    from cotune.device.serve.server import ServeConfig
    from cotune.generation.sampling import Sampling
    from cotune.openai_api.routes import ApiLimits

    config = ServeConfig(
        host=host,
        port=port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        token_file=token_file,
        allow_hosts=tuple(allow_host or ()),
        limits=ApiLimits(max_concurrent=max_concurrent),
    )
    choice = OfflineChoice(path=offline, threads=threads, context=context, adapter=adapter, memory_limit=memory_limit)
    sampling = Sampling(temperature=temperature, top_p=top_p)
    tell = _Teller(has_token=token_file is not None, as_json=as_json)
    if offline is not None and plugin is None and cloud is None:
        refuse_cloud_words(invocation)
        model_id = name or offline.resolve().name
        _serve_offline(choice, config, tell, model_id, max_new_tokens, sampling, ledger)
        return
    if plugin is None or cloud is None:
        missing = "PLUGIN" if plugin is None else "--cloud"
        raise InputError(f"{missing} is missing, expected PLUGIN and --cloud, or --offline alone")

    from cotune.device.client import ClientConfig
    from cotune.device.reach import ReachConfig
    from cotune.device.runtime import GenerationOptions
    from cotune.device.serve.personal_source import PersonalSource
    from cotune.device.serve.server import serve as run_server
    from cotune.ledger import EgressLedger
    from cotune.plugin import Plugin
    from cotune.wire.event_loop import run_coroutine

    loaded = Plugin.load(plugin)
    defaults = GenerationOptions(
        mode=mode or ("integration" if loaded.family == "parallel" else "ladder"),
        schedule=schedule,
        answer=answer,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        deadline_ms=deadline_ms,
    )
    model_id = name or plugin.resolve().name
    may_draft = schedule in DRAFTED_SCHEDULES and draft_from is None
    num_drafts = max_concurrent if may_draft else 0
    writer = None if offline is None else choice.writer(num_texts=max_concurrent, num_drafts=num_drafts)
    with EgressLedger(ledger) as book:
        make = connector(
            cloud, token_file=cloud_token_file, tls_ca=tls_ca, ledger=book, way="serve", profile=emulated(rtt_ms)
        )
        source = PersonalSource(
            loaded,
            make,
            model_id=model_id,
            defaults=defaults,
            config=ClientConfig(timeout_s=timeout_s),
            offline=writer,
            reach_config=ReachConfig(patience_s=fallback_after),
        )
        if draft_from is not None:
            from cotune.data.records import read_examples

            source.device.draft_from(example.prompt + example.target for example in read_examples(draft_from))
        elif may_draft and writer is not None:
            source.device.draft_with(writer)

        def ready(url: str) -> None:
            tell.ready(url, model_id, f"{loaded.num_parameters:,} private parameters, with {cloud}")
            why = "" if source.fallback is None else source.fallback.reach.why
            if why and not as_json:
                stderr.print(f"[green4]the cloud is out of reach, the offline model writes: {escape(why)}")

        run_coroutine(run_server(source, book.totals, config, on_ready=ready))
    tell.stopped()


def _serve_offline(
    choice: OfflineChoice,
    config: ServeConfig,
    tell: _Teller,
    model_id: str,
    max_new_tokens: int,
    sampling: Sampling,
    ledger: Path | None,
) -> None:
    """The offline model alone."""
    from cotune.device.serve.offline_source import OfflineSource
    from cotune.device.serve.server import serve as run_server
    from cotune.device.serve.wishes import OfflineOptions
    from cotune.ledger import EgressLedger
    from cotune.wire.event_loop import run_coroutine

    defaults = OfflineOptions(max_new_tokens=max_new_tokens, sampling=sampling)
    writer = choice.writer(num_texts=config.limits.max_concurrent)
    source = OfflineSource(writer, model_id=model_id, defaults=defaults)
    bits = writer.model.description.bits
    what = f"{bits} bits a weight, room for {writer.model.context:,} tokens, on this device alone"
    with EgressLedger(ledger) as book:
        ready = partial(tell.ready, model_id=model_id, what=what)
        run_coroutine(run_server(source, book.totals, config, on_ready=ready))
    tell.stopped()


@dataclass(frozen=True, kw_only=True)
class _Teller:
    """Says when the service is ready, and that it has stopped."""

    has_token: bool
    as_json: bool

    def ready(self, url: str, model_id: str, what: str) -> None:
        if self.as_json:
            print_json({"url": url, "base_url": f"{url}/v1", "model": model_id})
            return
        stderr.print(f"[bold]{escape(model_id)}[/]: {escape(what)}")
        stderr.print(f"chat page at [bold]{url}/[/], OpenAI-compatible endpoint at [bold]{url}/v1[/]; stop with Ctrl-C")
        key = "one of your tokens" if self.has_token else "anything"
        stderr.print(
            f"[dim]next: open {url}/ in a browser, or give a client base_url {url}/v1, "
            f"model {escape(model_id)} and {key} as the API key"
        )

    def stopped(self) -> None:
        if not self.as_json:
            stderr.print("stopped")
