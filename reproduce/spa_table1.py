"""SPA, table 1: parameters, times for 50 tokens, round trips and quality of LoRA, adapters, LST and SPA.

Quality comes from the cells of table 2. Times are measured: `benchmarks/network.py` runs LoRA and adapters split over
the network, LST and SPA on this model behind an emulated link of 4 ms and 1 Gbit/s, about the paper's, with plugins of
this study. Those times are of that benchmark's texts; M of SPA on each data set is in table 2.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cells import Value
from mean import Mean
from page import Page
from result_folder import grid, plot_groups
from spa_paper import TABLE_1
from spa_study import Row, Study, plugin_row, rows_of, run_study
from spa_training import Method

from cotune.errors import CotuneError
from cotune.evaluation.markup import Html
from cotune.evaluation.report import Section

NUM_TOKENS = 50
RTT_MS, MBPS = 4, 1000
# By the paper's name: quality in the cloud or with a plugin, and what the benchmark calls it.
ROWS: dict[str, tuple[Row, str]] = {
    "LoRA": (Row(name="lora", method=Method(family="lora")), "lora"),
    "Adapter": (Row(name="adapter", method=Method(family="adapter")), "adapter"),
    "LST": (plugin_row("ladder", side="published"), "ladder"),
    "SPA": (plugin_row("spa"), "spa"),
}
NETWORK = Path(__file__).parents[1] / "benchmarks" / "network.py"


def measure_network(study: Study, dataset: str) -> Value:
    """Medians of the benchmark, by its names of the methods; a cell of its own."""
    key = {"what": "network", "rtt_ms": RTT_MS, "mbps": MBPS, "tokens": NUM_TOKENS}
    plugins = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run() -> Value:
            for family in ("parallel", "serial"):
                plugin = study.plugin(dataset, Method(family=family), seed=0)
                plugin.save(folder / family)
                plugins[family] = folder / family
            command = [sys.executable, str(NETWORK), "--model", str(study.args.model)]
            command += ["--plugin", str(plugins["parallel"]), "--serial-plugin", str(plugins["serial"])]
            command += ["--rtt-ms", str(RTT_MS), "--mbps", str(MBPS), "--max-new-tokens", str(NUM_TOKENS)]
            command += ["--methods", *(method for _, method in ROWS.values()), "--turns", "5", "--seconds", "10"]
            command += ["--work", str(folder / "work"), "--out", str(folder / "network.json")]
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
            if done.returncode:
                raise CotuneError(f"benchmarks/network.py failed: {(done.stderr or done.stdout)[-500:]}")
            rows = json.loads((folder / "network.json").read_text())["results"]["rows"]
            return {row["method"]: _medians(row) for row in rows}

        return study.cell(dataset, key, run)


def _medians(row: dict[str, Any]) -> dict[str, float]:
    return {name: value["median"] for name, value in row.items() if isinstance(value, dict) and "median" in value}


def times(medians: dict[str, float]) -> dict[str, float]:
    """Seconds for `NUM_TOKENS` tokens: cloud and device, the rest of the time, and both.

    Example:
        >>> times({"tokens_per_s": 20.0, "step_ms": 30.0, "device_ms": 10.0})
        {'inference_s': 2.0, 'network_s': 0.5, 'total_s': 2.5}
    """
    total_s = NUM_TOKENS / medians["tokens_per_s"]
    inference_s = NUM_TOKENS * (medians["step_ms"] + medians["device_ms"]) / 1e3
    return {"inference_s": inference_s, "network_s": max(0.0, total_s - inference_s), "total_s": total_s}


def build(study: Study) -> Page:
    """Times of the link, and quality on each data set."""
    datasets = study.args.datasets
    backbone = sum(parameter.numel() for parameter in study.backbone.model.parameters())
    network = measure_network(study, datasets[0])
    measured: dict[str, dict[str, Any]] = {}
    for name, (row, method) in ROWS.items():
        runs = {dataset: rows_of(study, dataset, row) for dataset in datasets}
        measured[name] = {
            "percent": 100 * runs[datasets[0]][0]["num_parameters"] / backbone,
            **times(network[method]),
            "m": network[method]["trips"],
            "bytes_per_token": network[method]["bytes_down"] + network[method]["bytes_up"],
            "rouge_l": {dataset: Mean.of([run["rouge_l"] for run in runs[dataset]]) for dataset in datasets},
        }
    names = list(ROWS)
    words = {"percent": "parameters %", "inference_s": "inference s", "network_s": "network s", "total_s": "total s"}
    words["m"] = "M"
    columns: dict[str, list[str]] = {}
    for key, head in words.items():
        columns[head] = [f"{measured[name][key]:.2f} ({TABLE_1[name][key]:g})" for name in names]
    columns["bytes a token"] = [f"{measured[name]['bytes_per_token']:,.0f}" for name in names]
    for dataset in datasets:
        columns[f"Rouge-L, {dataset}"] = [
            str(measured[name]["rouge_l"][dataset])
            + (f" ({TABLE_1[name][dataset]:.2f})" if dataset in TABLE_1[name] else "")
            for name in names
        ]
    bars = {
        part: [(0.0, measured[name][f"{part}_s"], None, None) for name in names] for part in ("inference", "network")
    }
    return Page(
        title="SPA, table 1: time, trips and quality",
        lead=f"{NUM_TOKENS} tokens over {RTT_MS} ms and {MBPS} Mbit/s.",
        expected=TABLE_1,
        measured=measured,
        sections=[
            Section(
                name="table",
                short="Table",
                heading="Times for 50 tokens, and quality",
                content=Html(
                    plot_groups("times", "Medians of five texts.", names, bars, y_label="seconds for 50 tokens")
                    + grid("Measured, and in brackets what the paper states for Llama-7B", "method", names, columns)
                ),
            )
        ],
        deviations=(
            "The link is emulated. Network time is what a text takes beyond the cloud's steps and the device's work.",
            "LoRA of the times is rank 16 on q, k, v and adapters are 48 wide, as in the paper; their quality is that "
            "of as many parameters as SPA has. Neither changes the number of trips.",
        ),
        lines=[
            f"{name:8s} {one['percent']:.2f} %  inference {one['inference_s']:.2f} s  "
            f"network {one['network_s']:.2f} s  total {one['total_s']:.2f} s  M {one['m']:.2f}  "
            + "  ".join(f"{dataset} {value!s}" for dataset, value in one["rouge_l"].items())
            for name, one in measured.items()
        ],
    )


if __name__ == "__main__":
    run_study("spa_table1", __doc__ or "", build)
