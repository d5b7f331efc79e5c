"""`cotune device serve`: an OpenAI-compatible endpoint and a chat page for a personal model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cotune.cli.connection import TOKEN_VARIABLE, CloudOption, RttOption, TlsCaOption, connector, emulated
from cotune.cli.output import print_json, stderr


def serve(
    plugin: Annotated[Path, typer.Argument(help="Folder of the plugin.")],
    cloud: CloudOption,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when ready.")] = False,
) -> None:
    """Serve the personal model to any chat client on this machine, until interrupted.

    The root is a chat page; /v1 is an OpenAI-compatible endpoint. Only this machine can reach it, unless --host says
    otherwise.

    Examples:

        cotune device serve my-plugin --cloud ws://127.0.0.1:7070

        cotune device serve my-plugin --cloud wss://llm.example:443 --cloud-token-file token.txt --port 8000

        cotune device serve my-plugin --cloud ws://127.0.0.1:7070 --host 0.0.0.0 --allow-host laptop.local
        --tls-cert cert.pem --tls-key key.pem --token-file keys.txt
    """
    from cotune.device.client import ClientConfig
    from cotune.device.runtime import GenerationOptions
    from cotune.device.serve.personal_source import PersonalSource
    from cotune.device.serve.server import ServeConfig
    from cotune.device.serve.server import serve as run_server
    from cotune.generation.sampling import Sampling
    from cotune.ledger import EgressLedger
    from cotune.openai_api.routes import ApiLimits
    from cotune.plugin import Plugin
    from cotune.wire.event_loop import run_coroutine

    config = ServeConfig(
        host=host,
        port=port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        token_file=token_file,
        allow_hosts=tuple(allow_host or ()),
        limits=ApiLimits(max_concurrent=max_concurrent),
    )
    loaded = Plugin.load(plugin)
    defaults = GenerationOptions(
        mode=mode or ("integration" if loaded.family == "parallel" else "ladder"),
        schedule=schedule,
        answer=answer,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, top_p=top_p),
        deadline_ms=deadline_ms,
    )
    model_id = name or plugin.resolve().name

    def ready(url: str) -> None:
        if as_json:
            print_json({"url": url, "base_url": f"{url}/v1", "model": model_id})
            return
        stderr.print(f"[bold]{escape(model_id)}[/]: {loaded.num_parameters:,} private parameters, with {escape(cloud)}")
        stderr.print(f"chat page at [bold]{url}/[/], OpenAI-compatible endpoint at [bold]{url}/v1[/]; stop with Ctrl-C")
        key = "one of your tokens" if token_file is not None else "anything"
        stderr.print(
            f"[dim]next: open {url}/ in a browser, or give a client base_url {url}/v1, "
            f"model {escape(model_id)} and {key} as the API key"
        )

    with EgressLedger(ledger) as book:
        make = connector(
            cloud, token_file=cloud_token_file, tls_ca=tls_ca, ledger=book, way="serve", profile=emulated(rtt_ms)
        )
        source = PersonalSource(
            loaded, make, model_id=model_id, defaults=defaults, config=ClientConfig(timeout_s=timeout_s)
        )
        if draft_from is not None:
            from cotune.data.records import read_examples

            source.device.draft_from(example.prompt + example.target for example in read_examples(draft_from))
        run_coroutine(run_server(source, book.totals, config, on_ready=ready))
    if not as_json:
        stderr.print("stopped")
