"""The demo as a user runs it, in small: real processes, a WebSocket between them, a report at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REQUIRED = [
    "mode",
    "schedule",
    "num_tokens",
    "token_ids",
    "text",
    "sources",
    "M",
    "consult_rate",
    "disagree_rate",
    "bytes_down_per_token",
    "bytes_up_per_token",
    "wasted_cloud_steps",
    "cloud_ms_per_token",
    "device_ms_per_token",
    "stall_ms_per_token",
    "tokens_per_s",
    "certificate_misses",
]


@pytest.mark.integration
def test_the_quick_demo_writes_metrics_and_a_report(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "cotune", "demo", "--quick", "--json", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((out / "metrics.json").read_text())
    assert json.loads(done.stdout) == metrics
    assert not [name for name in REQUIRED if name not in metrics]

    rows = {(row["name"], row.get("mode")): row for row in metrics["quality"]}
    assert set(rows) == {
        ("base", None),
        ("lora", None),
        ("plugin", "integration"),
        ("plugin", "spa"),
        ("plugin", "separation"),
        ("plugin", "ladder"),
    }
    assert rows["plugin", "integration"]["perplexity"] < rows["base", None]["perplexity"]
    lora, plugin = (rows[key]["trainable_parameters"] for key in (("lora", None), ("plugin", "integration")))
    assert lora == pytest.approx(plugin, rel=0.06)

    assert {row["schedule"] for row in metrics["speed"]} == {"blocking", "gated", "optimistic"}
    assert {row["answer"] for row in metrics["speed"]} == {"token", "correction"}
    assert len({row["rtt_ms"] for row in metrics["speed"]}) == 2
    # Every schedule, answer form and round-trip time gave the same texts.
    measured = json.loads((out / "measuring.json").read_text())
    assert len({tuple(row["text"]) for row in measured["speed"]}) == 1
    assert metrics["egress"]["correct"]["bytes"] > 0
    # The second plugin was tuned on cached features: it cost the cloud nothing but a fresh greeting.
    assert json.loads((out / "tuning.json").read_text())["serial"]["bytes_down"] == 0

    page = (out / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert (out / "plugin" / "plugin.safetensors").is_file()
