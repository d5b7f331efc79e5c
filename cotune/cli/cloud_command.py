"""`cotune cloud`: host a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cotune.cli.output import print_json, stderr


def cloud(
    model: Annotated[str, typer.Argument(help="A Hugging Face causal-LM folder or hub name, or `starter`.")],
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback only with TLS and tokens.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")] = 7070,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    torch_device: Annotated[str, typer.Option("--device", help="A PyTorch device, such as cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads for the model; 0 leaves it to PyTorch.")] = 0,
    projections: Annotated[
        Path | None, typer.Option(help="Frozen tap projections (safetensors); by default the model folder's own.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="Bearer tokens that are let in, one a line.")] = None,
    max_sessions: Annotated[int, typer.Option(help="Generations at once.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when ready.")] = False,
) -> None:
    """Host MODEL for devices, until interrupted.

    The weights stay here; devices get features, token by token, and send tokens or small corrections back.

    Examples:

        cotune cloud starter

        cotune cloud ./my-llama --port 7070 --dtype bfloat16 --device cuda

        cotune cloud ./my-llama --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem --token-file tokens.txt
    """
    from cotune.cloud.host import HostConfig
    from cotune.cloud.host import host as run_host
    from cotune.cloud.hosted import HostedModel
    from cotune.cloud.service import ServiceConfig
    from cotune.wire.event_loop import run_coroutine

    # Checked before the model loads, which may take minutes.
    config = HostConfig(
        host=host,
        port=port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        token_file=token_file,
        service=ServiceConfig(max_sessions=max_sessions),
    )

    import torch

    from cotune.models.backbone import Backbone

    if threads > 0:
        torch.set_num_threads(threads)
    backbone = Backbone.from_pretrained(model, dtype=dtype, device=torch_device, projections=projections)
    hosted = HostedModel.of(backbone)

    def ready(url: str) -> None:
        if as_json:
            print_json({"url": url, "model": model, "backbone_digest": hosted.description.backbone_digest})
            return
        spec = backbone.spec
        stderr.print(
            f"[bold]{escape(model)}[/]: {spec.architecture}, {spec.num_parameters / 1e6:.1f} M parameters, "
            f"{hosted.description.num_taps} taps of width {hosted.description.tap_dim}"
        )
        stderr.print(f"listening on [bold]{url}[/]; stop with Ctrl-C")
        stderr.print(f"[dim]next: cotune device tune DATA --cloud {url} --out my-plugin")

    run_coroutine(run_host(hosted, config, on_ready=ready))
