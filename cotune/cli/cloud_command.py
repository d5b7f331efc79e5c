"""`cotune cloud`: host a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cotune.cli.output import print_json, stderr
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.cloud.host import HostConfig
    from cotune.models.backbone import Backbone
    from cotune.openai_api.requests import Message


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
    max_sessions_per_token: Annotated[
        int | None, typer.Option(help="Generations at once for each bearer token; no limit by default.")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Requests a minute for each bearer token; no limit by default.")
    ] = None,
    max_batch_rows: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 64,
    max_branches: Annotated[
        int, typer.Option(help="Tokens to go on with side by side where a gated session waits, in free rows; 1 is off.")
    ] = 1,
    kv_tokens: Annotated[
        int, typer.Option(help="Tokens whose keys and values fit at once; 0 takes what free memory allows.")
    ] = 0,
    idle_timeout_s: Annotated[float, typer.Option(help="How long a device may be silent, seconds.")] = 300.0,
    session_ttl_s: Annotated[
        float, typer.Option(help="How long a session waits for a device whose connection broke, seconds.")
    ] = 60.0,
    drain_s: Annotated[
        float, typer.Option(help="At the end: how long running texts may go on before their devices resume elsewhere.")
    ] = 30.0,
    device_map: Annotated[
        str | None, typer.Option(help="`auto` spreads the layers over all GPUs of this machine, in one process.")
    ] = None,
    tensor_parallel: Annotated[
        bool, typer.Option("--tensor-parallel", help="Share each layer among the processes that torchrun started.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="`local`, this process; or `ray`, replicas on a Ray cluster (needs the extra `ray`).")
    ] = "local",
    replicas: Annotated[int, typer.Option(help="How many replicas Ray runs.")] = 2,
    ray_address: Annotated[
        str, typer.Option(help="A running Ray cluster, such as `auto`; `local` starts one on this machine.")
    ] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when ready.")] = False,
) -> None:
    """Host MODEL for devices, until interrupted.

    The weights stay here; devices get features, token by token, and send tokens or small corrections back.

    Examples:

        cotune cloud starter

        cotune cloud ./my-llama --port 7070 --dtype bfloat16 --device cuda

        torchrun --nproc-per-node 2 -m cotune cloud ./my-llama --tensor-parallel --device cuda

        cotune cloud ./my-llama --engine ray --replicas 4 --ray-address auto --device cuda

        cotune cloud ./my-llama --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem --token-file tokens.txt
    """
    from cotune.cloud.engine import EngineConfig
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
        drain_s=drain_s,
        service=ServiceConfig(
            max_sessions=max_sessions,
            max_sessions_per_token=max_sessions_per_token,
            requests_per_minute=requests_per_minute,
            idle_timeout_s=idle_timeout_s,
            session_ttl_s=session_ttl_s,
            max_branches=max_branches,
            engine=EngineConfig(
                max_batch_rows=max_batch_rows, max_blocks=_blocks(kv_tokens) if kv_tokens != 0 else None
            ),
        ),
    )

    if engine not in ("local", "ray"):
        raise InputError(f"--engine is {engine!r}, expected local or ray")
    if engine == "ray":
        if tensor_parallel:
            raise InputError("--tensor-parallel and --engine ray do not go together; drop one of them")
        from cotune.cloud.ray_cluster import ClusterConfig, check_ray, host_on_ray

        check_ray()
        cluster = ClusterConfig(
            replicas=replicas, address=ray_address, gpus=1.0 if torch_device.startswith("cuda") else 0.0
        )
        from cotune.cli.backbone_placement import load_replica
        from cotune.models.weights import find_model_folder

        find_model_folder(model)  # a wrong name is refused here, not in a replica
        load = partial(
            load_replica,
            model,
            dtype=dtype,
            device=torch_device,
            projections=projections,
            device_map=device_map,
            threads=threads,
        )
        run_coroutine(host_on_ray(load, config, cluster, on_ready=lambda url: _announce_replicas(url, model, as_json)))
        return

    import torch

    from cotune.cli.backbone_placement import open_backbone

    if threads > 0:
        torch.set_num_threads(threads)
    with open_backbone(
        model,
        dtype=dtype,
        device=torch_device,
        projections=projections,
        device_map=device_map,
        tensor_parallel=tensor_parallel,
    ) as backbone:
        if backbone is None:
            return  # a rank that followed another to its end
        hosted = HostedModel.of(backbone)
        config = _sized(config, backbone, model)

        def ready(url: str) -> None:
            _announce(url, model, backbone, config, as_json)

        run_coroutine(run_host(hosted, config, on_ready=ready))


def _blocks(kv_tokens: int) -> int:
    if kv_tokens < 0:
        raise InputError(f"--kv-tokens is {kv_tokens}, expected 0 or more")
    return max(1, kv_tokens // 64)


def _sized(config: HostConfig, backbone: Backbone, model: str) -> HostConfig:
    """The config with what only the loaded model tells: room for keys and values, and how it is talked to."""
    from cotune.models.chat_format import chat_format_of
    from cotune.models.kv_memory import blocks_that_fit
    from cotune.models.weights import find_model_folder

    service, engine = config.service, config.service.engine
    if engine.max_blocks is None:
        most_tokens = service.max_sessions * backbone.spec.max_context
        engine = replace(engine, max_blocks=blocks_that_fit(backbone.model, most_tokens=most_tokens))
    backbone.kv_pool.max_blocks = engine.max_blocks
    render = chat_format_of(find_model_folder(model))

    def from_template(messages: Sequence[Message]) -> str:
        assert render is not None
        return render([(message.role, message.content) for message in messages])

    chat = None if render is None else from_template
    return replace(config, chat_format=chat, service=replace(service, engine=engine))


def _announce_replicas(url: str, model: str, as_json: bool) -> None:
    if as_json:
        print_json({"url": url, "model": model})
        return
    stderr.print(f"[bold]{escape(model)}[/] in replicas, listening on [bold]{url}[/]; stop with Ctrl-C")


def _announce(url: str, model: str, backbone: Backbone, config: HostConfig, as_json: bool) -> None:
    spec, description = backbone.spec, backbone.description
    max_blocks = config.service.engine.max_blocks or 0
    _ = backbone.row_floor  # measured now, not by the first device
    if as_json:
        print_json(
            {
                "url": url,
                "model": model,
                "backbone_digest": description.backbone_digest,
                "kv_tokens": max_blocks * backbone.block_size,
                "rows_are_independent": backbone.rows_are_independent,
            }
        )
        return
    stderr.print(
        f"[bold]{escape(model)}[/]: {spec.architecture}, {spec.num_parameters / 1e6:.1f} M parameters, "
        f"{description.num_taps} taps of width {description.tap_dim}"
    )
    stderr.print(
        f"room for {max_blocks * backbone.block_size:,} tokens in the cache; sessions in one batch "
        + ("do not disturb each other" if backbone.rows_are_independent else "[yellow]agree up to rounding only[/]")
    )
    stderr.print(f"listening on [bold]{url}[/]; stop with Ctrl-C")
    http = url.replace("ws", "http", 1)
    stderr.print(f"[dim]next: cotune device tune DATA --cloud {url} --out my-plugin")
    stderr.print(f"[dim]the plain model for any OpenAI client: {http}/v1; metrics: {http}/metrics")
