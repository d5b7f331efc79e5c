"""`cotune federate device-model`: on a real device, its own model after the rounds that it took part in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cotune.cli.federate_keys import check_cryptography
from cotune.cli.output import print_json, stderr
from cotune.durable import is_free
from cotune.errors import InputError


def device_model(
    settings: Annotated[Path, typer.Argument(help="The device.toml of the device's trainer, with [co_tuning].")],
    out: Annotated[Path, typer.Option(help="A new folder for the model.")],
    run: Annotated[
        str | None, typer.Option(help="Of which run, where the device took part in several; they are named then.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a device's own model as it is after its last round of co-tuning, on that device.

    OUT is a folder that transformers loads: answer with it and the proxy together, `cotune federate answer`.

    Examples:

        cotune federate device-model device.toml --out my-tuned-model

        cotune federate device-model device.toml --out my-tuned-model --run 5f1c0e7a9b2d4c6e8f01
    """
    check_cryptography("cotune federate device-model")
    # Only now: these load PyTorch.
    from cotune.federation.causal_model import CausalModel
    from cotune.federation.device_store import ROUNDS, DeviceStore
    from cotune.federation.resident_device import DeviceSettings
    from cotune.federation.small_model import save_small_model

    found = DeviceSettings.read(settings)
    own = found.co_tuning
    if own is None:
        raise InputError(f"{settings} has no [co_tuning], expected the settings of a co-tuned device; name its file")
    if not is_free(out):
        raise InputError(f"--out is {out}, which holds something already; give a new folder")
    store = DeviceStore(Path(own.folder) / ROUNDS)
    runs = store.runs()
    if not runs or (run is not None and run not in runs):
        has = f"has rounds of {', '.join(runs)}" if runs else "has no round of any run"
        raise InputError(f"{store.folder} {has}, expected {run or 'one'}; run a round first, or name another --run")
    if run is None and len(runs) > 1:
        raise InputError(f"{store.folder} has rounds of {', '.join(runs)}, expected one run; choose by --run")
    chosen = run or runs[0]
    model = CausalModel(own.small_model, found.dtype, found.torch_device)
    save_small_model(model, store, chosen, out)
    told = {"out": str(out), "run": chosen, "round": store.last_round(chosen)}
    if as_json:
        print_json(told)
        return
    stderr.print(f"{out}: {own.small_model} after round {told['round']} of run {chosen}", markup=False, soft_wrap=True)
