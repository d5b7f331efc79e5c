"""Put the tables of all result folders into `reproduce/README.md`, between its two marks.

python reproduce/update_readme.py            after new results
python reproduce/update_readme.py --check    ends with status 1 where the page is not up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Measured = dict[str, Any]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table.

    Example:
        >>> print(markdown(["a", "b"], [["1", "2"]]))
        | a | b |
        |---|---|
        | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell != "---" else cell for cell in line) + "|" for line in lines)


def number(mean: dict[str, Any], digits: int = 1) -> str:
    """A mean with half of its interval.

    Example:
        >>> number({"mean": 2.0, "low": 1.0, "high": 3.0})
        '2.0 ± 1.0'
    """
    if mean["low"] is None:
        return f"{mean['mean']:.{digits}f}"
    return f"{mean['mean']:.{digits}f} ± {(mean['high'] - mean['low']) / 2:.{digits}f}"


def by_mode(measured: Measured) -> str:
    datasets = list(measured["base"])

    def cell(scores: Measured | None) -> str:
        if scores is None:
            return ""
        asked = scores.get("consult_rate")
        return number(scores["rouge_l"]) + (f" ({asked['mean']:.2f})" if asked is not None else "")

    rows = [[name, *(cell(found.get(dataset)) for dataset in datasets)] for name, found in measured.items()]
    return markdown(["method", *datasets], rows)


def by_claim(measured: Measured) -> str:
    rows = [
        [
            one["dataset"],
            one["name"],
            number(one["difference"]),
            f"at least {one['least']:g}",
            one["remark"],
            "holds" if one["holds"] else "missed",
        ]
        for claims in measured.values()
        for one in claims
    ]
    return markdown(["data", "claim", "difference", "needed", "with", "verdict"], rows)


def by_time(measured: Measured) -> str:
    heads = {
        "percent": "parameters %",
        "inference_s": "inference s",
        "network_s": "network s",
        "total_s": "total s",
        "m": "M",
    }
    rows = [[name, *(f"{found[key]:.2f}" for key in heads)] for name, found in measured.items()]
    return markdown(["method", *heads.values()], rows)


def by_size(measured: Measured) -> str:
    rouge, asked = measured["rouge_l"], measured["consult_rate"]
    datasets = list(rouge["full"])
    rows = [
        [
            f"{name}, {size} texts",
            *(f"{number(rouge[name][dataset])} ({asked[name][dataset]['mean']:.2f})" for dataset in datasets),
        ]
        for name, size in measured["sizes"].items()
    ]
    return markdown(["training set", *datasets], rows)


def by_decision(measured: Measured) -> str:
    keys = ("differs", "asks", "asks_and_differs")
    rows = []
    for dataset, ways in measured.items():
        forced, free = ways["teacher_forced"], ways["free_running"]
        rows.append([dataset, *(f"{forced[key]['mean']:.2f} ({free[key]['mean']:.2f})" for key in keys)])
    return markdown(["data", "differ", "ask", "both"], rows)


def by_setting(measured: Measured) -> str:
    datasets = list(next(iter(measured["taps"].values())))
    rows = [
        [f"{what}: {choice}", *(number(found[dataset]["nats_per_token"], 3) for dataset in datasets)]
        for what, choices in measured.items()
        for choice, found in choices.items()
    ]
    return markdown(["setting", *datasets], rows)


def by_input(measured: Measured) -> str:
    nats = measured["nats"]
    choices = next(iter(nats.values()))
    rows = [[choice, *(number(found[choice]["0.25"], 3) for found in nats.values())] for choice in choices]
    return markdown(["gate sees", *nats], rows)


def by_beams(measured: Measured) -> str:
    rows = []
    for dataset, found in measured.items():
        cells = [(one["m_per_step"]["mean"], one["independent"]["mean"]) for one in found.values()]
        rows.append([dataset, *(f"{m:.2f} ({independent:.2f})" for m, independent in cells)])
    return markdown(["data", "1 beam", "2 beams", "4 beams"], rows)


def by_start(measured: Measured) -> str:
    rows = [
        [
            name,
            f"{measured['rates'][name]:g}",
            number(row["nats"], 3),
            "" if row["difference"] is None else number(row["difference"], 3),
            f"{row['start_s']:.2f}",
        ]
        for name, row in measured["starts"].items()
    ]
    return markdown(["start", "learning rate", "nats", "less the default's", "start, s"], rows)


def by_shared_start(measured: Measured) -> str:
    rows = [
        [
            name,
            f"{measured['factors'][name]:g}",
            number(row["loss"], 3),
            "" if row["difference"] is None else number(row["difference"], 3),
            f"{row['up'] / 1e3:.1f}",
        ]
        for name, row in measured["rows"].items()
    ]
    return markdown(["algorithm, start", "times its own rate", "nats", "less the random start's", "KB up"], rows)


def by_way(measured: Measured) -> str:
    times = sorted(measured["ways"]["before"]["bits"], key=int)
    rows = [
        [name, number(row["heldout_nats"], 3), *(number(row["bits"][one]) for one in times)]
        for name, row in measured["ways"].items()
    ]
    return markdown(["tuned", "held-out nats", *(f"{one}x" for one in times)], rows)


def by_combination(measured: Measured) -> str:
    rows = [
        [
            name,
            f"{row['weight_mb']:.1f}",
            f"{row['above_mb']:.1f}",
            number(row["nats"], 3),
            "" if row["step_s"] is None else f"{row['step_s']:.3f}",
        ]
        for name, row in measured["combinations"].items()
    ]
    rows += [[name, "", "", f"not run: {reason}", ""] for name, reason in measured["refused"].items()]
    return markdown(["what, how, bits", "weights MB", "peak above MB", "nats", "s a step"], rows)


def by_recipe(measured: Measured) -> str:
    rows = [
        [
            row["dataset"],
            row["name"],
            row["order"] or "-",
            f"{100 * row['share_of_bf16']:.0f}",
            number(row["rouge_l"], 3),
            number(row["nats"], 3),
        ]
        for row in measured["rows"]
    ]
    return markdown(["task", "recipe", "order", "% of bf16", "Rouge-L", "nats"], rows)


def setting(config: Measured) -> str:
    """What a study was run with, in words, as far as it has such a setting.

    Example:
        >>> setting({"backbone_parameters": 2_000_000, "parameter_budget": 1_000, "config": {"seeds": 3}})
        '2,000,000 parameters, of which methods train at most 1,000; 3 seeds.'
    """
    args, budget = config["config"], config.get("parameter_budget")
    trained = "" if budget is None else f", of which methods train at most {budget:,}"
    counts = {"num_train": "training texts", "num_test": "test texts", "seeds": "seeds"}
    told = ", ".join(f"{args[name]} {words}" for name, words in counts.items() if isinstance(args.get(name), int))
    return f"{config['backbone_parameters']:,} parameters{trained}{'; ' if told else ''}{told}."


def by_task(measured: Measured) -> str:
    accuracy = measured["accuracy"]
    methods = dict.fromkeys(method for found in accuracy.values() for method in found)
    rows = [
        [method, *(number(found[method]) if method in found else "" for found in accuracy.values())]
        for method in methods
    ]
    return markdown(["method", *accuracy], rows)


def by_cost(measured: Measured) -> str:
    def rounded(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}"

    rows = [
        [
            name,
            found["group"],
            rounded(found["measured_above_mb"]),
            rounded(found["predicted_above_mb"]),
            rounded(found["step_ms"]),
            "" if found["nats"] is None else number(found["nats"], 3),
        ]
        for name, found in measured["methods"].items()
    ]
    return markdown(["method", "kind", "MB above the weights", "predicted", "ms a step", "nats per test token"], rows)


def by_federation(measured: Measured) -> str:
    splits = {split: found["rows"] for split, found in measured["splits"].items()}
    methods = dict.fromkeys(method for rows in splits.values() for method in rows)
    first = next(iter(splits.values()))
    rows = []
    for method in methods:
        memory = measured["memory"].get(method, {})
        held = memory.get("measured_mb") or memory.get("predicted_mb")
        costs = first.get(method)
        rows.append(
            [
                method,
                *(number(found[method]["loss"], 3) if method in found else "" for found in splits.values()),
                "" if costs is None else f"{costs['bytes'] / 1e3:,.1f}",
                "" if costs is None else f"{costs['device_s']:.1f}",
                "" if held is None else f"{held:.1f}",
            ]
        )
    return markdown(["method", *splits, "KB of a device", "s of a device", "MB above the weights"], rows)


def by_co_tuning(measured: Measured) -> str:
    num, methods = next(iter(measured["summary"].items()))
    sets = {name: name for name in ("own", "crossed", "skills")} | {
        "devices": "devices, all",
        "cloud": "the cloud, all",
    }
    rows = [
        [
            name,
            *("" if one[key] is None else number(one[key], 1) for key in sets),
            f"{one['kb']:,.0f}",
            f"{one['gflop']:,.1f}",
        ]
        for name, one in methods.items()
    ]
    return markdown([f"method, {num} devices", *sets.values(), "kB of a device", "GFLOP of a device"], rows)


def by_attack(measured: Measured) -> str:
    attacks = dict.fromkeys(
        attack for found in measured["algorithms"].values() for columns in found.values() for attack in columns
    )

    def cell(one: Measured | None) -> str:
        if one is None:
            return ""
        return "lost" if one["ratio"] is None else f"{number(one['loss'], 3)} ({one['ratio']['mean']:.2f})"

    rows = [
        [f"{name}: {rule}", *(cell(columns.get(attack)) for attack in attacks)]
        for name, found in measured["algorithms"].items()
        for rule, columns in found.items()
    ]
    return markdown(["rule", *attacks], rows)


def by_scale(measured: Measured) -> str:
    rows = [
        [
            row["algorithm"],
            f"{row['num_parameters']:,}",
            str(row["num_devices"]),
            number(row["bytes"], 0),
            number(row["server_s"], 2),
            number(row["device_s"], 2),
            f"{row['peak_mb']['mean']:,.0f}",
        ]
        for row in measured["rows"]
    ]
    return markdown(["method", "parameters", "devices", "bytes", "server s", "device s", "process MB"], rows)


def by_device(measured: Measured) -> str:
    rows = []
    for row in measured["rows"]:
        cell = None if row["least_bytes"] is None else row["cells"][str(row["least_bytes"])]
        rows.append(
            [
                row["model"],
                row["format"],
                str(row["threads"]),
                "" if cell is None else f"{row['least_bytes'] / 1e6:,.0f}",
                "" if cell is None else f"{cell['peak_bytes'] / 1e6:,.0f}",
                *(
                    "" if cell is None else f"{cell[what]['median']:,.1f}"
                    for what in ("prefill", "decode", "decode_cpu_ms")
                ),
            ]
        )
    return markdown(
        ["model", "run as", "threads", "fits MB", "peak MB", "prefill tokens/s", "decode tokens/s", "CPU ms a token"],
        rows,
    )


def by_arm(measured: Measured) -> str:
    arms = dict.fromkeys(arm for found in measured.values() for arm in found["arms"])

    def cell(one: Measured | None) -> str:
        return (
            ""
            if one is None
            else f"{number(one['score'])} ({one['serve']['tokens_in'] + one['serve']['tokens_out']:,.0f})"
        )

    rows = [[arm, *(cell(found["arms"].get(arm)) for found in measured.values())] for arm in arms]
    return markdown(["arm", *measured], rows)


def by_question(measured: Measured) -> str:
    rows = [
        [question, label, f"{one['left']:.3f}", f"{one['gap']:.2g}"]
        for question, found in measured.items()
        for label, one in found.items()
    ]
    return markdown(["what", "setting", "still to go", "gap h"], rows)


BEGIN, END = "<!-- results begin -->", "<!-- results end -->"
# In this order: the words over a table, and what makes it.
TABLES: dict[str, tuple[str, Callable[[Measured], str]]] = {
    "spa_table2": (
        "Rouge-L of 100, mean ± 95 % over seeds; in brackets the share of tokens that ask the device",
        by_mode,
    ),
    "spa_goals": ("Claims: differences in Rouge-L on the same texts, ± 95 % over texts", by_claim),
    "spa_table1": ("Time for 50 tokens behind 4 ms and 1 Gbit/s", by_time),
    "spa_table3": ("Mode spa by size of the training set: Rouge-L, and in brackets the share that asks", by_size),
    "spa_table4": ("Shares of tokens, teacher-forced and in brackets free-running", by_decision),
    "spa_ablations": ("Nats per test token of mode integration", by_setting),
    "spa_gate_inputs": ("Nats per test token at M = 0.25 by what the gate sees", by_input),
    "spa_beams": ("Steps that wait for the device, and in brackets if gates were independent", by_beams),
    "lora_init": ("Nats per held-out token, each LoRA start at its best learning rate, ± 95 % over seeds", by_start),
    "memorisation": ("Exposure in bits of canaries by their copies, ± 95 % over seeds", by_way),
    "survey_combinations": ("Memory, nats per held-out token and time of each combination", by_combination),
    "survey_memory": ("Peak memory, time of a step and quality; quality is mean ± 95 % over seeds", by_cost),
    "survey_compression": ("Size and quality of compressed models, ± 95 % over seeds", by_recipe),
    "device_spectrum": ("The smallest enforced limit that fits, and the speed under it, medians", by_device),
    "federated_methods": (
        "Nats per held-out token by split, ± 95 % over seeds, and what a device spent on the whole first one",
        by_federation,
    ),
    "federated_starts": (
        "Nats per held-out token of a federation, each start at its best learning rate, ± 95 % over seeds",
        by_shared_start,
    ),
    "federated_attacks": (
        "Nats per held-out token, ± 95 % over seeds, and in brackets over the honest mean",
        by_attack,
    ),
    "federated_scale": ("Of one device and round; seconds of the server and process memory are of all", by_scale),
    "coplms_main": (
        "Exact match, %, ± 95 % over seeds, on questions of a device's own domain, of others' (crossed) and of what "
        "all have met, at equal compute but for the bounds; bytes with the proxy's download",
        by_co_tuning,
    ),
    "zocp_tasks": ("Score of 100, ± 95 % over seeds, and in brackets the cloud's tokens for an answer", by_arm),
    "zocp_toys": (
        "Share of the way from nothing to the bilevel optimum that is still to go, and the gap; medians over problems",
        by_question,
    ),
    "mezo_kshot": ("Accuracy with 16 texts of each class, %, mean ± 95 % over five draws", by_task),
}


def parts(root: Path) -> Iterator[str]:
    """The Markdown of all results under a folder, model after model."""
    for model in sorted(folder for folder in root.iterdir() if folder.is_dir()):
        yield f"## {model.name}"
        told = None
        for study, (words, table) in TABLES.items():
            path = model / study / "measured.json"
            if not path.is_file():
                continue
            config = json.loads((model / study / "config.json").read_text(encoding="utf-8"))
            if setting(config) != told:
                told = setting(config)
                yield told
            yield f"### {study}\n\n{words}.\n\n{table(json.loads(path.read_text(encoding='utf-8')))}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python reproduce/update_readme.py", description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = HERE / "README.md"
    old = page.read_text(encoding="utf-8")
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = before + BEGIN + "\n\n" + "\n\n".join(parts(HERE / "results")) + "\n\n" + END + after
    if args.check:
        sys.exit(0 if new == old else "reproduce/README.md is old; run python reproduce/update_readme.py")
    page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
