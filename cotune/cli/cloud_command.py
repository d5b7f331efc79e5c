"""`cotune cloud`: host a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cotune.cli.output import print_json, stderr
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.models.anatomy import BackboneSpec
    from cotune.wire.description import CloudDescription


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

        def ready(url: str) -> None:
            _announce(url, model, backbone.spec, hosted.description, as_json)

        run_coroutine(run_host(hosted, config, on_ready=ready))


def _announce_replicas(url: str, model: str, as_json: bool) -> None:
    if as_json:
        print_json({"url": url, "model": model})
        return
    stderr.print(f"[bold]{escape(model)}[/] in replicas, listening on [bold]{url}[/]; stop with Ctrl-C")


def _announce(url: str, model: str, spec: BackboneSpec, description: CloudDescription, as_json: bool) -> None:
    if as_json:
        print_json({"url": url, "model": model, "backbone_digest": description.backbone_digest})
        return
    stderr.print(
        f"[bold]{escape(model)}[/]: {spec.architecture}, {spec.num_parameters / 1e6:.1f} M parameters, "
        f"{description.num_taps} taps of width {description.tap_dim}"
    )
    stderr.print(f"listening on [bold]{url}[/]; stop with Ctrl-C")
    stderr.print(f"[dim]next: cotune device tune DATA --cloud {url} --out my-plugin")
