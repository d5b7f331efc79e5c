"""The gate's process: real time limits, real deaths, and nothing that leaks from them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cotune.errors import InputError, RedactionError
from cotune.sandwich.detect import HereFinder, Passage
from cotune.sandwich.detector_process import DetectorProcess
from cotune.sandwich.detector_table import RULES, DetectorSettings, build_detector

LONG_S = 60.0


def own(name: str) -> DetectorSettings:
    return DetectorSettings(detectors=("email",), own=(f"sandwich_detectors:{name}",))


@pytest.fixture(scope="module")
def rules() -> Iterator[DetectorProcess]:
    with DetectorProcess(DetectorSettings(), timeout_s=LONG_S) as finder:
        yield finder


def test_finds_what_the_same_detectors_find_here(rules: DetectorProcess) -> None:
    passages = [
        Passage("é ann@x.org 192.0.2.7"),
        Passage("4155552671", "phone: "),
        Passage('{"a": "\\u0061@b.org"}', is_json=True),
    ]
    here = HereFinder({name: build_detector(name, DetectorSettings()) for name in RULES})
    found = rules.find(passages)
    assert found == here.find(passages) and all(found)
    assert rules.find([]) == []


def test_lone_surrogates_and_large_texts_pass_the_pipe(rules: DetectorProcess) -> None:
    text = "\ud800 " + "word " * 30_000 + "ann@x.org"
    assert [(each.start, each.end) for each in rules.find([Passage(text)])[0]] == [(len(text) - 9, len(text))]


@pytest.mark.parametrize(
    "nasty",
    [
        "a" * 50_000,
        "a@" * 20_000,
        "1 " * 30_000,
        "((((" * 10_000,
        "a.b-" * 12_000,
        ":" * 40_000,
        "-----BEGIN " * 4_000,
        "password=" * 5_000,
        "https://" * 6_000,
        " at dot" * 7_000,
        "fe:" * 15_000,
        "DE12" * 12_000,
    ],
    ids=lambda nasty: nasty[:8].strip(),
)
def test_no_text_makes_a_rule_hang(rules: DetectorProcess, nasty: str) -> None:
    rules.find([Passage(nasty)])  # within the limit, or it raises


def test_a_failure_is_told_without_the_text() -> None:
    with DetectorProcess(own("Failing"), timeout_s=LONG_S) as finder:
        with pytest.raises(RedactionError, match="Failing failed with ValueError, so nothing is sent") as caught:
            finder.find([Passage("secret words")])
        assert "secret" not in str(caught.value) and caught.value.detector == "sandwich_detectors:Failing"


def test_a_detector_that_sleeps_is_stopped_and_the_next_request_works() -> None:
    with DetectorProcess(own("Hanging"), timeout_s=1.0) as finder:
        with pytest.raises(RedactionError, match=r"Hanging took longer than 1 s, so nothing is sent") as caught:
            finder.find([Passage("hang please")])
        assert caught.value.detector == "sandwich_detectors:Hanging"
        finder._timeout_s = LONG_S  # the machine may be slow; only the first one was to run out
        assert len(finder.find([Passage("ann@x.org")])[0]) == 1


def test_a_regular_expression_that_never_ends_is_stopped() -> None:
    with (
        DetectorProcess(own("Backtracking"), timeout_s=1.0) as finder,
        pytest.raises(RedactionError, match="took longer than 1 s"),
    ):
        finder.find([Passage("a" * 60)])


def test_a_detector_that_ends_its_process_is_a_failure() -> None:
    with (
        DetectorProcess(own("Dying"), timeout_s=LONG_S) as finder,
        pytest.raises(RedactionError, match="without an answer"),
    ):
        finder.find([Passage("text")])


def test_what_a_detector_prints_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    with DetectorProcess(own("Chatty"), timeout_s=LONG_S) as finder:
        assert [each.kind for each in finder.find([Passage("secret")])[0]] == ["TERM"]
    assert capfd.readouterr() == ("", "")


def test_a_detector_that_cannot_be_had_says_what_is_missing() -> None:
    with DetectorProcess(own("refused")) as finder, pytest.raises(InputError, match=r"pip install 'cotune\[thing\]'"):
        finder.find([Passage("text")])


def test_a_start_that_takes_too_long_is_a_failure() -> None:
    with (
        DetectorProcess(DetectorSettings(), start_timeout_s=1e-9) as finder,
        pytest.raises(RedactionError, match="starting the detectors took longer"),
    ):
        finder.find([Passage("text")])


def test_closing_ends_the_process_and_twice_is_fine() -> None:
    finder = DetectorProcess(DetectorSettings(detectors=("email",)), timeout_s=LONG_S)
    finder.find([Passage("text")])
    process = finder._process
    assert process is not None and process.poll() is None
    finder.close()
    finder.close()
    assert process.poll() is not None


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_times_that_cannot_be_are_refused(seconds: float) -> None:
    with pytest.raises(InputError, match="timeout_s"):
        DetectorProcess(DetectorSettings(), timeout_s=seconds)
