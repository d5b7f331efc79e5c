"""Findings that overlap, by hand and for any findings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.sandwich.finding import Finding, merge_overlaps

places = st.tuples(st.integers(0, 30), st.integers(1, 10))
findings = st.lists(places.map(lambda place: Finding(place[0], place[0] + place[1], "CARD", str(place))), max_size=12)


def test_the_longest_gives_its_kind_and_all_is_covered() -> None:
    merged = merge_overlaps([Finding(8, 14, "PHONE", "b"), Finding(0, 10, "CARD", "a"), Finding(20, 25, "IP", "c")])
    assert [(each.start, each.end, each.kind) for each in merged] == [(0, 14, "CARD"), (20, 25, "IP")]
    assert merged[0].identity == "CARD:a+PHONE:b" and merged[1].identity == "c"


def test_what_lies_inside_changes_nothing() -> None:
    longer = Finding(0, 20, "URL", "u")
    assert merge_overlaps([Finding(5, 9, "EMAIL", "e"), longer]) == [longer]


def test_neighbours_stay_apart() -> None:
    assert len(merge_overlaps([Finding(0, 3, "IP", "a"), Finding(3, 6, "IP", "b")])) == 2


@settings(max_examples=60)
@given(findings)
def test_exactly_what_was_found_is_covered_once(found: list[Finding]) -> None:
    merged = merge_overlaps(found)
    covered = [place for each in merged for place in range(each.start, each.end)]
    assert covered == sorted({place for each in found for place in range(each.start, each.end)})


@pytest.mark.parametrize(
    ("start", "end", "kind"), [(3, 3, "IP"), (-1, 3, "IP"), (0, 3, "ip"), (0, 3, "I"), (0, 3, "A_B")]
)
def test_findings_that_cannot_be_are_refused(start: int, end: int, kind: str) -> None:
    with pytest.raises(InputError):
        Finding(start, end, kind, "x")


def test_repr_tells_no_value() -> None:
    assert "secret" not in repr(Finding(0, 1, "KEY", "secret"))
