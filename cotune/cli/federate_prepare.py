"""`cotune federate prepare`: the folder of a run over Flower, and the app that `flwr run` takes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cotune.cli.federate_keys import check_cryptography
from cotune.cli.mixed_needs import with_needs
from cotune.cli.output import print_json, stderr


def prepare(
    config: Annotated[Path, typer.Argument(help="A TOML file; `cotune federate example` prints one.")],
    run: Annotated[Path, typer.Argument(help="A new folder for the run, on the SuperLink's machine.")],
    registry: Annotated[Path, typer.Option(help="Public keys of the devices, of `cotune federate identities`.")],
    secret: Annotated[Path, typer.Option(help="The run's secret, which the devices have too.")],
    app: Annotated[Path | None, typer.Option(help="Folder for the app that `flwr run` takes.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16 or float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Prepare a run over Flower: its folder from a config, the devices' registry and the run's secret, and its app.

    The model is loaded once, and what it alone knows is kept with the run: where the adapter begins, its digest, and
    options such as the number of its layers. What the run could not begin with is refused now. RUN/federation.toml has
    every setting; more rounds later are one number in it.

    Examples:

        cotune federate prepare federation.toml run-1 --registry registry.json --secret run.secret --app app

        cotune federate prepare federation.toml run-1 --registry registry.json --secret run.secret --dtype bfloat16
    """
    check_cryptography("cotune federate prepare")
    # Only now: these ask for Flower.
    from cotune.federation.flower.app_folder import AppConfig, check_app_folder, write_app
    from cotune.federation.flower.server_folder import ServerFolder
    from cotune.federation.run_secret import RunSecret
    from cotune.federation.signing import Registry

    app_config = AppConfig(folder="" if app is None else str(run.absolute()))
    if app is not None:
        check_app_folder(app)
    folder = ServerFolder.prepare_from_model(
        run,
        config,
        registry=Registry.load(registry),
        secret=RunSecret.load(secret),
        dtype=dtype,
        complete=lambda settings, backbone: with_needs(settings, backbone, dtype),
    )
    if app is not None:
        write_app(app, app_config)
    settings, devices = folder.settings, sorted(folder.registry.devices)
    steps = next_steps(run, app)
    if as_json:
        print_json(
            {
                "run": str(run),
                "app": None if app is None else str(app),
                "run_id": folder.run_id,
                "algorithm": settings.algorithm,
                "options": settings.options.get(settings.algorithm, {}),
                "model": settings.model,
                "base_digest": folder.base_digest,
                "dtype": folder.dtype,
                "num_rounds": settings.rounds.num_rounds,
                "devices": devices,
                "next": [command for _, command in steps],
            }
        )
        return
    lines = [
        f"{run}: run {folder.run_id}, {settings.algorithm} on {settings.model} ({folder.base_digest[:16]}), "
        f"{settings.rounds.num_rounds} rounds of {', '.join(devices)}",
        f"each device's settings name the same model, and have the [adapter] of {run / 'federation.toml'}",
        *(f"{what}: {command}" for what, command in steps),
    ]
    for line in lines:
        stderr.print(escape(line), soft_wrap=True)


def next_steps(run: Path, app: Path | None) -> list[tuple[str, str]]:
    """What to run next: words, and a command.

    Example:
        >>> for _, command in next_steps(Path("/srv/run-1"), Path("app")):
        ...     print(command)
        python -m cotune.federation.resident_device device.toml
        flwr run app CONNECTION --stream
        cotune federate result /srv/run-1 --out my-adapter
        >>> next_steps(Path("/srv/run-1"), None)[1][1]
        'flwr run APP CONNECTION --stream --run-config \\'folder="/srv/run-1"\\''
    """
    start = ["flwr", "run", "APP" if app is None else str(app), "CONNECTION", "--stream"]
    if app is None:
        start += ["--run-config", f'folder="{run.absolute()}"']
    return [
        ("next, on each device, beside its SuperNode", "python -m cotune.federation.resident_device device.toml"),
        ("then here, CONNECTION being what flwr calls the SuperLink", shlex.join(start)),
        (
            "its result, while it runs or afterwards",
            shlex.join(["cotune", "federate", "result", str(run), "--out"]) + " my-adapter",
        ),
    ]
