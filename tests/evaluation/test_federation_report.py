"""The page of a federated run: every round, every refusal, every byte."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from cotune.evaluation.federation_report import RoundRow, bytes_per_reply, write_federation_report


def row(number: int, **changes: object) -> RoundRow:
    found: dict[str, object] = {
        "round_number": number,
        "verdict": "accepted",
        "remark": "",
        "asked": ["a", "b"],
        "counted": ["a", "b"],
        "refused": {},
        "lost": [],
        "loss": 2.5,
        "heldout_loss": 3.0 - 0.25 * number,
        "bytes_down": {"step": 800, "framing": 200},
        "bytes_up": {"slopes": 400, "framing": 100},
        "seconds": 1.5,
        "device_seconds": 0.25,
        "device_peak_bytes": 300_000_000,
        "shown": {},
    }
    return {**found, **changes}  # type: ignore[typeddict-item,return-value]


ROUNDS = [
    row(1),
    row(2, verdict="rejected", heldout_loss=9.0, remark="the held-out loss rose from 2.75 to 9"),
    row(
        3,
        verdict="void",
        counted=["a"],
        lost=["b"],
        refused={"c": "a signature <that> is not of its key"},
        heldout_loss=None,
        remark="1 replies count",
    ),
]


def test_bytes_of_a_device_in_a_round() -> None:
    # Each round 1,000 down and 500 up, of two devices that were asked.
    assert bytes_per_reply(ROUNDS) == 750.0
    assert bytes_per_reply([row(1, asked=[], counted=[], bytes_up={}, bytes_down={})]) == 0.0


def page(tmp_path: Path, rounds: list[RoundRow], start_loss: float | None = 3.0) -> str:
    path = write_federation_report(
        tmp_path,
        rounds,
        title="Together",
        start_loss=start_loss,
        repeat="cotune federate mine.toml",
        settings={"algorithm": "seed", "data.limit": None},
        versions={"cotune": "0.9.0"},
        summary={"out": "there"},
    )
    return path.read_text(encoding="utf-8")


def test_every_round_and_refusal_is_told(tmp_path: Path) -> None:
    text = page(tmp_path, ROUNDS)
    told = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    assert "1 of 3 rounds were accepted. The held-out loss went from 3.00 to 2.75 nats per token." in told
    assert "Round 2: the held-out loss rose from 2.75 to 9." in told and "Round 3: 1 replies count." in told
    assert "b was lost once." in told
    # What a device says is text, not markup.
    assert "&lt;that&gt;" in text and "<that>" not in text
    assert "both ways, all counted; 750 B after the first" in told
    assert "A device sends and receives 750 B in a round" in told and "5 of 6" in told
    assert "data.limit" not in told and "cotune federate mine.toml" in told and "0.9.0" in told
    numbers = html.unescape(text)[html.unescape(text).index('{\n "summary"') :]
    assert len(json.JSONDecoder().raw_decode(numbers)[0]["rounds"]) == 3


def test_what_an_algorithm_shows_is_a_column(tmp_path: Path) -> None:
    text = page(tmp_path, [row(1, shown={"answered": 46.0, "discarded_energy": 0.0125}), row(2, verdict="void")])
    rows = re.findall(r"<tr>(.*?)</tr>", text[text.index('id="rounds"') :], re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", one, re.DOTALL) for one in rows[:3]]
    assert [one[-1] for one in cells] == ["Discarded energy", "0.013", ""]
    # Counts are whole.
    assert [one[-2] for one in cells] == ["Answered", "46", ""]
    assert "Discarded energy" not in page(tmp_path, ROUNDS)


def test_what_was_held_and_downloaded_once_stands_on_top(tmp_path: Path) -> None:
    told = page(tmp_path, [row(1, device_held_bytes=5_000_000), row(2, device_held_bytes=None)])
    assert "Most that a device held" in told and "5.00 MB" in told and "Downloaded once" not in told
    write_federation_report(
        tmp_path,
        ROUNDS,
        title="t",
        start_loss=None,
        repeat="cotune federate mine.toml",
        settings={},
        versions={},
        summary={"proxy_download_bytes": 70_000_000},
    )
    told = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Downloaded once" in told and "70.0 MB" in told and "Most that a device held" not in told


def test_rounds_are_whole_on_the_axis(tmp_path: Path) -> None:
    svg = page(tmp_path, [row(1), row(2), row(3)]).split("<svg")[1]
    ticks = re.findall(r">([0-9.]+)</text>", svg)
    assert ticks[:4] == ["0", "1", "2", "3"]


def test_a_run_without_a_judge_has_the_devices_losses_alone(tmp_path: Path) -> None:
    text = page(tmp_path, [row(1, heldout_loss=None), row(2, heldout_loss=None)], None)
    assert "2 of 2 rounds were accepted." in text and "nats per token." not in text.split("<svg")[0]
    assert "Line plot of the loss in nats per token against round. devices: from 2.50 to 2.50." in text


@pytest.mark.parametrize("loss", [None, 2.0])
def test_void_rounds_alone_are_a_page_too(tmp_path: Path, loss: float | None) -> None:
    void = row(1, verdict="void", counted=[], loss=loss, heldout_loss=None, device_peak_bytes=None)
    assert "0 of 1 rounds were accepted." in page(tmp_path, [void], None)
