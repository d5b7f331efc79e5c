"""The page of a tuning run: what it says with everything known, and with almost nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from cotune.evaluation.tuning_cost import Predicted, RunCost
from cotune.evaluation.tuning_report import EpochRow, write_tuning_report


def epoch(number: int, train: float | None, heldout: float | None) -> EpochRow:
    return {
        "epoch": number,
        "num_steps": 5 * number,
        "train_loss": train,
        "heldout_loss": heldout,
        "elapsed_s": 2.0 * number,
    }


def page(folder: Path, epochs: list[EpochRow], cost: RunCost, **changes: Any) -> str:
    about: dict[str, Any] = {
        "title": "lora on <model>",
        "loss": "nats per token",
        "num_parameters": 1234,
        "best_epoch": epochs[-1]["epoch"],
        "repeat": "cotune tune starter texts.jsonl",
        "versions": {"cotune": "0.9.0"},
        "settings": {"rank": 4, "alpha": None, "resolved": {"loop": {"epochs": 2}}},
    }
    write_tuning_report(folder, epochs, cost, **{**about, **changes})
    return (folder / "report.html").read_text(encoding="utf-8")


def test_measured_stands_beside_predicted(tmp_path: Path) -> None:
    cost = RunCost(
        num_steps=10,
        num_tokens=2000,
        seconds=4.0,
        peak_bytes=120_000_000,
        predicted=Predicted(peak_bytes=110_000_000, flops=2_500_000_000),
    )
    html = page(tmp_path, [epoch(0, None, 4.0), epoch(1, 3.0, 2.5), epoch(2, 2.0, 2.0)], cost)
    assert "The loss on the held-out texts (nats per token) went from 4.00 to 2.00; epoch 2 of 2 is the result." in html
    cells = re.findall(r"<th scope=\"row\"[^>]*>([^<]*)</th><td[^>]*>([^<]*)</td><td[^>]*>([^<]*)</td></tr>", html)
    assert ("Memory above the model", "120 MB", "110 MB") in cells
    assert ("Operations of a step", "–", "2.50 GFLOP") in cells  # noqa: RUF001
    assert ("Tokens per second", "500", "–") in cells  # noqa: RUF001
    assert "lora on &lt;model&gt;" in html and "Privacy" not in html
    assert "resolved.loop.epochs" in html and "alpha" not in html
    repeat, raw = re.findall(r'<pre class="code">(.*?)</pre>', html, re.DOTALL)
    assert repeat == "cotune tune starter texts.jsonl" and "0.9.0" in html
    told = json.loads(raw.replace("&quot;", '"'))
    assert told["cost"]["predicted"]["peak_bytes"] == 110_000_000 and len(told["epochs"]) == 3


def test_without_heldout_texts_and_prediction(tmp_path: Path) -> None:
    cost = RunCost(num_steps=5, num_tokens=100, seconds=2.0, peak_bytes=None, predicted=None)
    html = page(
        tmp_path, [epoch(0, None, None), epoch(1, 3.0, None)], cost, privacy=("epsilon 4.00", ["One text is the unit."])
    )
    assert "No texts were held out, so the last epoch is the result." in html
    assert "The planner has no prediction for this method on this model." in html
    assert "Spent: epsilon 4.00. It rests on this:" in html and "One text is the unit." in html


def test_a_run_that_only_harms_says_so(tmp_path: Path) -> None:
    cost = RunCost(num_steps=5, num_tokens=100, seconds=2.0, peak_bytes=None, predicted=None)
    html = page(tmp_path, [epoch(0, None, 2.0), epoch(1, 3.0, 2.2)], cost, best_epoch=0, loss="1 - accuracy")
    assert (
        "No epoch had a smaller loss on the held-out texts than the start (2.00, 1 - accuracy): nothing changed."
        in html
    )
    assert "Loss (1 - accuracy)" in html
    assert "remark" not in html.partition("How well it learns")[2].partition("What it took")[0]
    told = page(tmp_path, [epoch(0, None, 2.0), epoch(1, 3.0, 2.2)], cost, remarks=["Half of the texts chose it."])
    assert "Half of the texts chose it." in told
