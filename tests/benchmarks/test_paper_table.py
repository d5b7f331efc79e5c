"""Table 1 of SPA by hand, and the paper's own rows out of what it states."""

from __future__ import annotations

import pytest
from paper_table import STATED, Link, Method, print_table

from cotune.errors import InputError


def test_a_transfer_by_hand() -> None:
    assert Link(rtt_ms=4, mbps=10).transfer_ms(1250) == pytest.approx(5)
    for wrong in ({"rtt_ms": -1, "mbps": 1}, {"rtt_ms": 1, "mbps": 0}):
        with pytest.raises(InputError, match="link is"):
            Link(**wrong)


def test_a_row_by_hand() -> None:
    method = Method(name="SPA", num_parameters=3, cloud_ms=60, device_ms=4, trips=0.5, trip_bytes=2500, device_rate=0.5)
    row = method.row(Link(rtt_ms=8, mbps=10), backbone_parameters=200, num_tokens=100)
    assert (row["percent"], row["inference_s"]) == (1.5, pytest.approx(6.2))
    assert row["network_s"] == pytest.approx(100 * 0.5 * (8 + 2) / 1e3)
    assert row["total_s"] == pytest.approx(6.7)
    assert row["is_computed"]


def test_the_papers_lst_follows_from_whole_hidden_states_over_a_gigabit() -> None:
    # 33 states of 4096 float16 numbers; see specs: 0.31 s for 50 transfers.
    method = Method(name="LST", num_parameters=1, cloud_ms=65.8, device_ms=0, trips=1, trip_bytes=270_336)
    row = method.row(Link(rtt_ms=4.0, mbps=1000), backbone_parameters=1)
    assert row["network_s"] == pytest.approx(STATED["LST"]["network_s"], abs=0.005)
    assert row["total_s"] == pytest.approx(STATED["LST"]["total_s"], abs=0.01)


def test_the_printed_table_says_that_it_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    method = Method(name="LoRA", num_parameters=1, cloud_ms=1, device_ms=1, trips=32, trip_bytes=1)
    print_table([method.row(Link(rtt_ms=4, mbps=1000), backbone_parameters=100)])
    out = capsys.readouterr().out
    assert "COMPUTED" in out
    assert "4 ms and 1000 Mbit/s" in out
