"""`cotune federate`: many devices tune one adapter together, here as a simulation in one process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from cotune.cli.default_group import group_with_default
from cotune.cli.federate_keys import certificates, check_cryptography, key
from cotune.cli.output import print_json, progress, stderr
from cotune.cli.run_folder import make_run_folder, plain, write_config, write_json
from cotune.durable import replacing
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.federation.coordinator import Progress, RoundRecord
    from cotune.federation.sealing import SealingKey
    from cotune.federation.settings import FederationSettings
    from cotune.federation.simulation import Simulation

ROUNDS_FILE = "rounds.jsonl"
CHECKPOINTS = "checkpoints"
SECRET_FILE = "run.secret"
LEDGER_FILE = "ledger.jsonl"
_RESULT_FILE = "adapter_config.json"

federate = typer.Typer(
    name="federate",
    cls=group_with_default("run"),
    no_args_is_help=True,
    help="Many devices tune one adapter together: `cotune federate CONFIG.toml --out DIR`.",
)
federate.command()(key)
federate.command()(certificates)


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
    folder = out.with_name(out.name + ".run")
    _check_folders(out, folder, resume=resume)

    # Only now: it loads PyTorch, which takes seconds.
    from cotune.federation.run_parts import algorithm_of, combine_of
    from cotune.federation.run_privacy import account_of, check_privacy
    from cotune.federation.run_secret import RunSecret
    from cotune.federation.sealing import SealingKey
    from cotune.federation.simulation import read_shards
    from cotune.models.backbone import Backbone

    # What does not fit is refused before a model is loaded or a folder made.
    algorithm_of(settings, RunSecret.generate())
    check_privacy(settings)
    combine_of(settings, num_devices=len(read_shards(settings).devices) + settings.audit.num_canaries)
    sealing_key = None if checkpoint_key is None else SealingKey.load(checkpoint_key)
    if settings.privacy.is_on and not as_json:
        planned = account_of(settings.privacy, settings.rounds.num_rounds)
        stderr.print(escape(f"privacy, if all rounds are merged: {planned.summary()}"), soft_wrap=True)
    backbone = Backbone.from_pretrained(settings.model, dtype=dtype, device=torch_device)
    settings = with_needs(settings, backbone, dtype)
    summary = _simulate(settings, backbone, out, folder, resume=resume, quiet=as_json, key=sealing_key)
    if as_json:
        print_json(summary)
        return
    after = summary["bytes_per_device_after_the_first_round"]
    stderr.print(
        f"[bold]{settings.algorithm}[/] {escape(str(out))}: {summary['num_accepted']} of {summary['num_rounds']} "
        f"rounds accepted, {summary['bytes_per_device_and_round']:,.0f} bytes for a device in a round"
        + ("" if after is None else f", {after:,.0f} after the first")
    )
    if "proxy_download_bytes" in summary:
        stderr.print(
            f"once: the proxy, {summary['proxy_download_bytes']:,} bytes, for each of "
            f"{summary['num_devices_with_proxy']} devices; with that {summary['bytes_down_with_proxy']:,} bytes down"
        )
    if summary["heldout_nats_per_token"] is not None:
        stderr.print(
            f"held-out loss {summary['start_nats_per_token']:.3f} (start) -> "
            f"{summary['heldout_nats_per_token']:.3f} nats per token"
        )
    _print_privacy(summary)
    stderr.print(f"report: {escape(summary['report'])}")


@federate.command()
def example() -> None:
    """Print a config with every setting and its default.

    Example:

        cotune federate example > my-federation.toml
    """
    from cotune.federation.settings import FederationSettings, as_toml

    typer.echo(as_toml(FederationSettings()), nl=False)


def with_needs(settings: FederationSettings, backbone: Any, dtype: str) -> FederationSettings:
    """The settings with what both classes of `mixed` need of this model, where they give the devices' memory alone.

    Raises:
        InputError: the model's memory cannot be predicted.
    """
    own = settings.options.get("mixed")
    if not isinstance(own, Mapping) or "memory_bytes" not in own or {"lora_bytes", "seed_bytes"} <= own.keys():
        return settings
    from cotune.evaluation.method_cost import MethodSettings, predict_cost
    from cotune.evaluation.model_shape import ModelShape
    from cotune.evaluation.plan import RUNTIME_BYTES
    from cotune.evaluation.workload import Workload

    shape = ModelShape.from_config(backbone.model.config.to_dict())
    sizes = MethodSettings(rank=settings.adapter.rank, num_blocks=1)
    needs = {}
    for name, method, batch in (
        ("lora_bytes", "lora", settings.steps.batch_size),
        ("seed_bytes", "zeroth_order_lora", _seed_batch(own)),
    ):
        load = Workload(batch=batch, length=settings.data.max_length, dtype=dtype)
        needs[name] = predict_cost(shape, method, load, sizes).peak + RUNTIME_BYTES
    return replace(settings, options={**settings.options, "mixed": {**needs, **own}})


def _seed_batch(own: Mapping[str, Any]) -> int:
    """Texts of a seed device's step."""
    from cotune.federation.mixed import SeedSteps

    table = own.get("seed_mode", {})
    return int(table.get("batch_size", SeedSteps.batch_size)) if isinstance(table, Mapping) else SeedSteps.batch_size


def _print_privacy(summary: Mapping[str, Any]) -> None:
    """What was spent, what it rests on, and what an attack found."""
    account, audit = summary["privacy"], summary["audit"]
    if account:
        stderr.print(escape(f"privacy: {account['summary']}. It rests on this:"), soft_wrap=True)
        for sentence in account["assumptions"]:
            stderr.print(escape(f"- {sentence}"), soft_wrap=True)
    if audit:
        beside = f"; the account says {account['epsilon']:.2f}" if account else "; there is no account without noise"
        stderr.print(escape(f"audit: {audit['summary']}{beside}"), soft_wrap=True)


def _with_options(
    settings: FederationSettings, algorithm: str | None, model: str | None, num_rounds: int | None, seed: int | None
) -> FederationSettings:
    """The settings with what was given on the command line."""
    given: dict[str, Any] = {"algorithm": algorithm, "model": model, "seed": seed}
    if num_rounds is not None:
        given["rounds"] = replace(settings.rounds, num_rounds=num_rounds)
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def _check_folders(out: Path, folder: Path, *, resume: bool) -> None:
    """Refuse to write over anything that is not an earlier result of the same kind."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / _RESULT_FILE).is_file())):
        raise InputError(f"--out is {out}, which holds something else; give a new folder")
    has_run = (folder / CHECKPOINTS).is_dir()
    if resume and not has_run:
        raise InputError(f"--resume is given and {folder} has no run; leave it out, or give the --out of that run")
    if has_run and not resume:
        raise InputError(f"{folder} has a run already; go on with --resume, or give another --out")


def _simulate(
    settings: FederationSettings,
    backbone: Any,
    out: Path,
    folder: Path,
    *,
    resume: bool,
    quiet: bool,
    key: SealingKey | None,
) -> dict[str, Any]:
    from cotune.evaluation.federation_report import bytes_per_reply, write_federation_report
    from cotune.federation.co_tuning_simulation import simulation_of
    from cotune.federation.progress_checkpoint import load_progress, save_progress
    from cotune.federation.run_parts import run_id
    from cotune.federation.run_privacy import account_as_table
    from cotune.federation.run_secret import RunSecret
    from cotune.ledger import EgressLedger

    make_run_folder(folder)
    secret_file = folder / SECRET_FILE
    # A secret that somebody put there is that of the devices that know it.
    secret = RunSecret.load(secret_file) if secret_file.exists() else RunSecret.generate()
    if not secret_file.exists():
        secret.save(secret_file)
    if not resume:
        write_config(folder, "cotune federate", plain(settings))
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
        _write_rounds(folder, at.records)

    ledger = EgressLedger(folder / LEDGER_FILE)
    with (
        ledger,
        simulation_of(settings, backbone, secret=secret, folder=folder, ledger=ledger, save=save) as simulation,
    ):
        coordinator = simulation.coordinator
        if resume:
            start = load_progress(folder / CHECKPOINTS, run_id=name, base_digest=backbone.spec.backbone_digest, key=key)
        else:
            start = coordinator.begin(simulation.adapter)
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
    rows: list[Any] = [asdict(one) for one in at.records]
    accepted = [one for one in at.records if one.verdict == "accepted"]
    last_loss = next((one.heldout_loss for one in reversed(accepted) if one.heldout_loss is not None), None)
    summary = {
        "algorithm": settings.algorithm,
        "out": str(out),
        "run": str(folder),
        "num_rounds": len(at.records),
        "num_accepted": len(accepted),
        "num_devices": len(simulation.shards.devices),
        "start_nats_per_token": start.start_loss,
        "heldout_nats_per_token": last_loss,
        "bytes_up": sum(sum(one.bytes_up.values()) for one in at.records),
        "bytes_down": sum(sum(one.bytes_down.values()) for one in at.records),
        "bytes_per_device_and_round": bytes_per_reply(rows),
        "bytes_per_device_after_the_first_round": bytes_per_reply(rows[1:]) if len(rows) > 1 else None,
        "privacy": account_as_table(settings.privacy, at.released_rounds) or None,
        "audit": _audit(simulation, settings),
        **kept,
        "report": str(folder / "report.html"),
    }
    write_json(folder / "metrics.json", summary)
    if rows:
        write_federation_report(
            folder,
            rows,
            title=f"Federated tuning with {settings.algorithm}",
            start_loss=start.start_loss,
            settings=plain(settings),
            summary=summary,
        )
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
    """A round in one line."""
    parts = [f"round {record.round_number}: {record.verdict}"]
    if record.loss is not None:
        parts.append(f"devices' loss {record.loss:.4f}")
    if record.heldout_loss is not None:
        parts.append(f"held-out {record.heldout_loss:.4f}")
    parts.append(f"{len(record.counted)} of {len(record.asked)} replies")
    parts.append(f"{sum(record.bytes_up.values()):,} bytes up, {sum(record.bytes_down.values()):,} down")
    if record.device_seconds is not None:
        parts.append(f"{record.device_seconds:.2f} s of work")
    parts += [f"{name.replace('_', ' ')} {number:.3g}" for name, number in record.shown.items()]
    if record.remark:
        parts.append(record.remark)
    refused = "; ".join(f"{device}: {why}" for device, why in record.refused.items())
    return ", ".join(parts) + (f" (refused: {refused})" if refused else "")


def _write_rounds(folder: Path, records: Any) -> None:
    """`rounds.jsonl`, whole or not at all."""
    lines = "".join(json.dumps(asdict(one), allow_nan=False) + "\n" for one in records)
    with replacing(folder / ROUNDS_FILE, mode=0o644) as unfinished:
        unfinished.write_text(lines, encoding="utf-8")
