"""`cotune federate`: many devices tune one adapter together, here as a simulation in one process.

Its other commands prepare the same over Flower (`federate_identities`, `federate_prepare`) and read what came of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cotune.cli.default_group import group_with_default
from cotune.cli.federate_answer import answer
from cotune.cli.federate_device_model import device_model
from cotune.cli.federate_identities import device_key, identities
from cotune.cli.federate_keys import certificates, check_cryptography, key
from cotune.cli.federate_prepare import prepare
from cotune.cli.federate_result import check_out, print_summary, result, summary_of, write_result, write_rounds
from cotune.cli.mixed_needs import with_needs
from cotune.cli.output import print_json, progress, stderr
from cotune.cli.run_folder import plain, run_folder, write_json
from cotune.errors import InputError
from cotune.evaluation.markup import size

if TYPE_CHECKING:
    from cotune.federation.coordinator import Progress, RoundRecord
    from cotune.federation.sealing import SealingKey
    from cotune.federation.settings import FederationSettings
    from cotune.federation.simulation import Shards, Simulation

CHECKPOINTS = "checkpoints"
SECRET_FILE = "run.secret"
LEDGER_FILE = "ledger.jsonl"
# Digest of the texts, and the numbers' type: what a run began with beside its settings.
INPUTS_FILE = "inputs.json"
_MAX_NAMES = 8

federate = typer.Typer(
    name="federate",
    cls=group_with_default("run"),
    no_args_is_help=True,
    help="Many devices tune one adapter together: `cotune federate CONFIG.toml --out DIR`.",
)
for _command in (key, certificates, identities, device_key, prepare, result, device_model, answer):
    federate.command()(_command)


@federate.command()
def run(
    config: Annotated[Path, typer.Argument(help="A TOML file; `cotune federate example` prints one.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter; the run is kept beside it in OUT.run.")],
    algorithm: Annotated[str | None, typer.Option(help="Instead of the config's.")] = None,
    model: Annotated[str | None, typer.Option(help="Instead of the config's.")] = None,
    num_rounds: Annotated[int | None, typer.Option(help="Instead of the config's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the config's.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    torch_device: Annotated[str, typer.Option("--device", help="A PyTorch device, such as cpu or cuda.")] = "cpu",
    checkpoint_key: Annotated[
        Path | None, typer.Option(help="Encrypt checkpoints with this key; `cotune federate key FILE` makes one.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last finished round.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Simulate a federation in this process: rounds, faults, bytes and all, with the loop that deployment runs.

    Every round is checkpointed; a run that was killed goes on with --resume along the same curve. OUT is a peft
    adapter: judge it with `cotune evaluate MODEL DATA --lora OUT`.

    Examples:

        cotune federate example > my-federation.toml

        cotune federate my-federation.toml --out my-adapter

        cotune federate my-federation.toml --algorithm seed --num-rounds 3 --out my-seed-adapter

        cotune federate my-federation.toml --out my-adapter --resume

        cotune federate my-federation.toml --out my-adapter --checkpoint-key my.key
    """
    check_cryptography("cotune federate")
    from cotune.federation.settings import FederationSettings

    settings = _with_options(FederationSettings.read(config), algorithm, model, num_rounds, seed)
    check_out(out)
    folder = out.with_name(out.name + ".run")
    _check_run(folder, resume=resume)

    # Only now: it loads PyTorch, which takes seconds.
    from cotune.federation.co_tuning_parts import inputs_of
    from cotune.federation.coplms import CoPlms
    from cotune.federation.run_parts import algorithm_of, combine_of
    from cotune.federation.run_privacy import account_of, check_privacy
    from cotune.federation.run_secret import RunSecret
    from cotune.federation.sealing import SealingKey
    from cotune.federation.simulation import read_shards
    from cotune.models.backbone import Backbone

    # What does not fit is refused before a model is loaded or a folder made.
    own = algorithm_of(settings, RunSecret.generate())
    check_privacy(settings)
    shards = read_shards(settings)
    num_merged = own.num_with_proxy(shards.devices) if isinstance(own, CoPlms) else None
    combine_of(settings, num_devices=len(shards.devices) + settings.audit.num_canaries, num_merged=num_merged)
    inputs = {"texts": shards.digest, "dtype": dtype}
    if isinstance(own, CoPlms):
        inputs |= inputs_of(own, settings)
    if resume:
        _check_inputs(folder, inputs)
    sealing_key = None if checkpoint_key is None else SealingKey.load(checkpoint_key)
    if settings.privacy.is_on and not as_json:
        planned = account_of(settings.privacy, settings.rounds.num_rounds)
        stderr.print(escape(f"privacy, if all rounds are merged: {planned.summary()}"), soft_wrap=True)
    backbone = Backbone.from_pretrained(settings.model, dtype=dtype, device=torch_device)
    settings = with_needs(settings, backbone, dtype)
    summary = _simulate(
        settings, backbone, shards, out, folder, inputs=inputs, resume=resume, quiet=as_json, key=sealing_key
    )
    if as_json:
        print_json(summary)
        return
    print_summary(summary)


@federate.command()
def example() -> None:
    """Print a config with every setting and its default.

    Example:

        cotune federate example > my-federation.toml
    """
    from cotune.federation.settings import FederationSettings, as_toml

    typer.echo(as_toml(FederationSettings()), nl=False)


def _with_options(
    settings: FederationSettings, algorithm: str | None, model: str | None, num_rounds: int | None, seed: int | None
) -> FederationSettings:
    """The settings with what was given on the command line."""
    given: dict[str, Any] = {"algorithm": algorithm, "model": model, "seed": seed}
    if num_rounds is not None:
        given["rounds"] = replace(settings.rounds, num_rounds=num_rounds)
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def _check_run(folder: Path, *, resume: bool) -> None:
    """Refuse to go on where there is nothing, and to begin where there is something."""
    has_run = (folder / CHECKPOINTS).is_dir()
    if resume and not has_run:
        raise InputError(f"--resume is given and {folder} has no run; leave it out, or give the --out of that run")
    if has_run and not resume:
        raise InputError(f"{folder} has a run already; go on with --resume, or give another --out")


def _check_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Refuse to go on with other texts or numbers than the run began with; one of an older version does not say it."""
    from cotune.federation.run_parts import check_inputs

    try:
        began_with = json.loads((folder / INPUTS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        raise InputError(f"{folder / INPUTS_FILE} is damaged; remove it if the texts are those of the run") from None
    check_inputs(began_with, inputs, of=str(folder), instead="give another --out")


def _simulate(
    settings: FederationSettings,
    backbone: Any,
    shards: Shards,
    out: Path,
    folder: Path,
    *,
    inputs: Mapping[str, str],
    resume: bool,
    quiet: bool,
    key: SealingKey | None,
) -> dict[str, Any]:
    from cotune.federation.co_tuning_simulation import simulation_of
    from cotune.federation.progress_checkpoint import load_progress, save_progress
    from cotune.federation.run_parts import run_id
    from cotune.federation.run_privacy import account_as_table
    from cotune.federation.run_secret import RunSecret
    from cotune.ledger import EgressLedger

    secret_file = folder / SECRET_FILE
    # A secret that somebody put there is that of the devices that know it; a run that goes on has one.
    secret = RunSecret.load(secret_file) if resume or secret_file.exists() else RunSecret.generate()
    name = run_id(settings, secret)

    def save(at: Progress) -> None:
        save_progress(
            folder / CHECKPOINTS,
            at,
            run_id=name,
            base_digest=backbone.spec.backbone_digest,
            key=key,
            accountant=account_as_table(settings.privacy, at.released_rounds),
        )
        write_rounds(folder, at.records)

    with (
        # What ends before there is a checkpoint leaves nothing behind.
        nullcontext() if resume else run_folder(folder, "cotune federate", plain(settings)),
        EgressLedger(folder / LEDGER_FILE) as ledger,
        simulation_of(
            settings, backbone, secret=secret, folder=folder, shards=shards, ledger=ledger, save=save
        ) as simulation,
    ):
        coordinator = simulation.coordinator
        if resume:
            start = load_progress(folder / CHECKPOINTS, run_id=name, base_digest=backbone.spec.backbone_digest, key=key)
            # It may have been killed between a checkpoint and the line that tells of it.
            write_rounds(folder, start.records)
        else:
            start = coordinator.begin(simulation.adapter)
            if not secret_file.exists():
                secret.save(secret_file)
            write_json(folder / INPUTS_FILE, inputs)
            save(start)
        at = start
        with progress(f"federating with {settings.algorithm}", enabled=not quiet) as advance:
            advance(at.round_number, settings.rounds.num_rounds)
            for at in coordinator.run(start):
                ledger.flush()
                last = at.records[-1]
                if not quiet:
                    stderr.print(escape(_line(last)), soft_wrap=True)
                advance(at.round_number, settings.rounds.num_rounds)
        adapter = simulation.adapter_of(coordinator.adapter(at))
        kept = simulation.keep(at)
    adapter.save(out, backbone.model)
    summary = {
        **summary_of(settings, at, out, folder, num_devices=len(simulation.shards.devices)),
        "audit": _audit(simulation, settings),
        **kept,
    }
    write_result(folder, settings, at, summary)
    return summary


def _audit(simulation: Simulation, settings: FederationSettings) -> dict[str, Any] | None:
    """What the canaries found, as JSON values; None without any."""
    if simulation.canaries is None:
        return None
    try:
        found = simulation.canaries.audit(settings.privacy.delta)
    except InputError as error:
        # The run is whole all the same.
        return {"summary": f"not possible: {error}"}
    return {**asdict(found), "summary": found.summary()}


def _line(record: RoundRecord) -> str:
    """A round in one line: who took part, losses, bytes up and down by kind, seconds and memory."""
    parts = [f"round {record.round_number}: {record.verdict}"]
    if record.loss is not None:
        parts.append(f"devices' loss {record.loss:.4f}")
    if record.heldout_loss is not None:
        parts.append(f"held-out {record.heldout_loss:.4f}")
    who = f" ({_some(record.counted)})" if record.counted else ""
    parts.append(f"{len(record.counted)} of {len(record.asked)} replies{who}")
    if record.lost:
        parts.append(f"nothing from {_some(record.lost)}")
    parts += [f"{_by_kind(record.bytes_up)} up", f"{_by_kind(record.bytes_down)} down", f"{record.seconds:.1f} s"]
    if record.device_seconds is not None:
        parts.append(f"{record.device_seconds:.2f} s of work")
    if record.device_peak_bytes is not None:
        parts.append(f"{size(record.device_peak_bytes)} of memory")
    parts += [f"{name.replace('_', ' ')} {number:.3g}" for name, number in record.shown.items()]
    if record.remark:
        parts.append(record.remark)
    refused = "; ".join(f"{device}: {why}" for device, why in record.refused.items())
    return ", ".join(parts) + (f" (refused: {refused})" if refused else "")


def _some(names: Sequence[str]) -> str:
    """Names, as many as a line bears; `rounds.jsonl` has all of them.

    Example:
        >>> _some(["a", "b"]), _some([f"d{number}" for number in range(12)])
        ('a, b', 'd0, d1, d2, d3, d4, d5, d6, d7 and 4 more')
    """
    rest = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + rest


def _by_kind(num_bytes: Mapping[str, int]) -> str:
    """A number of bytes, and what they were.

    Example:
        >>> _by_kind({"framing": 888, "slopes": 4_096}), _by_kind({})
        ('4,984 bytes (888 framing, 4,096 slopes)', '0 bytes')
    """
    kinds = ", ".join(f"{num:,} {kind}" for kind, num in sorted(num_bytes.items()))
    return f"{sum(num_bytes.values()):,} bytes" + (f" ({kinds})" if kinds else "")
