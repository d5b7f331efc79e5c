"""`cotune demo`: the main job on the built-in model, from two processes to a report."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cotune.cli.output import Advance, print_json, progress, stderr, stdout


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run: metrics.json, report.html, plugin, ledger.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the persona's texts, the split, the weights.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer texts and round-trip times; for a first look.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print metrics.json on standard output.")] = False,
) -> None:
    """Show the main job end to end, in under three minutes, on the built-in model.

    A cloud process hosts the frozen model; a device process trains a private plugin from its features, then both
    generate together over a WebSocket. Ends with a report.

    Examples:

        cotune demo

        cotune demo --out runs/again --seed 1 --json
    """
    from cotune.cli.demo.plan import DemoFolder, DemoPlan
    from cotune.cli.run_folder import make_run_folder, write_config, write_json
    from cotune.evaluation.report import write_report

    plan = DemoPlan(seed=seed)
    if quick:
        plan = DemoPlan(
            seed=seed, num_train=60, num_heldout=4, epochs=4, lora_epochs=1, num_speed_prompts=1, rtt_ms=(0.0, 25.0)
        )
    folder = DemoFolder(make_run_folder(out))
    # What an earlier demo left would otherwise be taken for this one's.
    for path in (folder.ledger, *(folder.result(name) for name in ("tuning", "lora", "measuring"))):
        path.unlink(missing_ok=True)
    shutil.rmtree(folder.features, ignore_errors=True)
    write_config(folder.root, "cotune demo", {"plan": plan})
    started_s = time.monotonic()
    with progress("demo", enabled=not as_json) as advance:
        metrics = _run(folder, plan, advance, started_s)
    write_json(folder.root / "metrics.json", metrics)
    report = write_report(folder.root, metrics)
    if as_json:
        print_json(metrics)
        return
    _last_screen(folder.root, report, metrics, time.monotonic() - started_s)


def _run(folder: Any, plan: Any, advance: Advance, started_s: float) -> dict[str, Any]:
    from cotune.cli.demo.processes import started
    from cotune.cli.demo.results import assemble
    from cotune.ledger import EgressLedger, total_entries

    persona = _write_texts(folder, plan)
    plan.save(folder.plan)

    def tell(line: dict[str, Any]) -> None:
        advance(line["done"], line["total"], f"{line['stage']} {line['note']}")

    root = folder.root
    cloud_arguments = ["-m", "cotune", "cloud", "starter", "--port", "0", "--threads", "1", "--json"]
    with started("cloud", cloud_arguments, root / "cloud.log") as cloud:
        advance(0, 1, "the cloud loads its model")
        url = cloud.first(timeout_s=120)["url"]
        module = "cotune.cli.demo."
        # LoRA belongs to the other world, in which the cloud may hold personal weights: it trains meanwhile.
        with started("LoRA", ["-m", module + "lora", str(root), str(_PLUGIN_PARAMETERS)], root / "lora.log") as lora:
            with started("tuning", ["-m", module + "tuning", str(root), url], root / "tuning.log") as tuning:
                tuning.follow(tell)
            lora.follow(tell)
        with started("device", ["-m", module + "measuring", str(root), url], root / "device.log") as device:
            device.follow(tell)
            device_pid = device.pid
        cloud_pid = cloud.pid
    return assemble(
        plan,
        model=_describe_starter(),
        persona=persona,
        tuning=_read(folder.result("tuning")),
        lora=_read(folder.result("lora")),
        measuring=_read(folder.result("measuring")),
        egress=total_entries(EgressLedger.read(folder.ledger)),
        cloud_pid=cloud_pid,
        device_pid=device_pid,
        url=url,
        seconds=time.monotonic() - started_s,
    )


# Of the side network on the built-in model: 7 taps of width 32, side width 64, inner width 64, basis of 192.
_PLUGIN_PARAMETERS = 77_248


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _describe_starter() -> str:
    import importlib.resources

    config = json.loads((importlib.resources.files("cotune.models") / "starter" / "config.json").read_text())
    return f"starter, a Llama of {config['num_hidden_layers']} layers, hidden size {config['hidden_size']}"


def _write_texts(folder: Any, plan: Any) -> str:
    """The persona's texts as anybody would have them, in files; returns who the persona is."""
    from cotune.data import DEMO_PERSONA, persona_split

    train, heldout = persona_split(DEMO_PERSONA, plan.seed, plan.num_train, plan.num_heldout)
    folder.train.parent.mkdir(exist_ok=True)
    for path, exchanges in ((folder.train, train), (folder.heldout, heldout)):
        lines = [json.dumps({"request": e.request, "answer": e.answer}, ensure_ascii=False) + "\n" for e in exchanges]
        path.write_text("".join(lines), encoding="utf-8")
    return f"{DEMO_PERSONA.name}: private facts and a style of writing that the model has never read"


def _last_screen(root: Path, report: Path, metrics: dict[str, Any], seconds: float) -> None:
    from rich.markup import escape
    from rich.table import Table

    stdout.print()
    for sentence in metrics["summary"]:
        stdout.print(f"• {sentence}", markup=False)
    stdout.print()
    table = Table("", "Rouge-L", "perplexity", "parameters", "M", title="held-out texts of the persona")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in metrics["quality"]:
        name = row["name"] if row.get("mode") is None else f"{row['name']}, {row['mode']}"
        table.add_row(
            name,
            f"{row['rouge_l']:.3f}",
            f"{row['perplexity']:.2f}",
            f"{row['trainable_parameters']:,}",
            f"{row['M']:.2f}",
        )
    stdout.print(table)
    egress = Table("what left the device", "times", "bytes", "why")
    for kind, total in sorted(metrics["egress"].items(), key=lambda item: -item[1]["bytes"]):
        egress.add_row(kind, f"{total['count']:,}", f"{total['bytes']:,}", total.get("why") or "")
    stdout.print(egress)
    stdout.print(
        f"The report is [bold]{escape(str(report))}[/]; the numbers are in {escape(str(root / 'metrics.json'))}. "
        f"{seconds:.0f} s in all."
    )
    stdout.print("Next, on your own model and data, in two terminals:")
    stdout.print("  cotune cloud PATH/TO/MODEL", markup=False)
    stdout.print("  cotune device tune YOUR-TEXTS.jsonl --cloud ws://127.0.0.1:7070 --out my-plugin", markup=False)
    stdout.print('  cotune device generate my-plugin "..." --cloud ws://127.0.0.1:7070', markup=False)
    stderr.print(f"[dim]what left the device, line by line: cotune ledger {escape(str(root))}")
