"""`cotune sandwich redact` and `restore`: what they show, what they never show, and what they refuse."""

from __future__ import annotations

import io
import json
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cotune.ledger import EgressLedger

TEXT = "Write to Ann Lee <ann@example.org>, card 4111 1111 1111 1111.\n"


@pytest.fixture
def mail(tmp_path: Path) -> Path:
    path = tmp_path / "mail.txt"
    path.write_text(TEXT, encoding="utf-8")
    (tmp_path / "words.txt").write_text("PERSON: Ann Lee | Ann\n", encoding="utf-8")
    return path


def test_shows_what_would_be_sent_and_counts(run: Callable[..., Any], mail: Path) -> None:
    done = run("sandwich", "redact", mail, "--dictionary", mail.with_name("words.txt"), "--timeout", 60)
    assert done.status == 0
    assert re.fullmatch(r"Write to <PERSON_\d+> <<EMAIL_\d+>>, card <CARD_\d+>\.\n", done.out)
    assert re.search(r"would be sent: \d+ bytes", done.err)
    assert all(re.search(rf"{kind}\W+1\b", done.err) for kind in ("PERSON", "EMAIL", "CARD"))


def test_colours_stand_on_the_placeholders_also_after_line_ends_of_windows(
    run: Callable[..., Any], mail: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(force_terminal=True, color_system="standard", highlight=False, file=io.StringIO())
    monkeypatch.setattr("cotune.cli.sandwich_command.stdout", console)
    mail.write_bytes(b"one\r\n\r\ntwo \x1b[31m ann@example.org, 192.0.2.7\r\n")
    assert run("sandwich", "redact", mail, "--timeout", 60).status == 0
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"\x1b\[1;36m<EMAIL_\d+>\x1b\[0m, \x1b\[1;35m<IP_\d+>\x1b\[0m", shown) and "\x1b[31m" not in shown


def test_json_holds_the_text_places_and_no_value(run: Callable[..., Any], mail: Path) -> None:
    done = run("sandwich", "redact", mail, "--json", "--seed", 1, "--timeout", 60)
    shown = json.loads(done.out)
    assert shown["counts"] == {"CARD": 1, "EMAIL": 1} and shown["bytes"] == len(shown["text"])
    assert [TEXT[each["start"] : each["end"]] for each in shown["replacements"]] == [
        "ann@example.org",
        "4111 1111 1111 1111",
    ]
    assert "example" not in done.out and "4111" not in done.out and done.err == ""
    assert run("sandwich", "redact", mail, "--json", "--seed", 1, "--timeout", 60).out == done.out


def test_plain_text_goes_out_and_the_answer_comes_back(
    run: Callable[..., Any], mail: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = mail.with_name("mail.map")
    sent = run("sandwich", "redact", mail, "--plain", "--save-map", saved, "--detectors", "email,card", "--timeout", 60)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600 and sent.err == ""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent.out.upper().encode())))
    assert run("sandwich", "restore", "-", "--map", saved).out == (
        "WRITE TO ANN LEE <ann@example.org>, CARD 4111 1111 1111 1111.\n"
    )
    run("sandwich", "redact", mail, "--save-map", saved).check_refusal("is there already")


def test_standard_input_and_the_ledger(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / "ledger.jsonl"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"192.0.2.7 \xc3\xa9")))
    done = run("sandwich", "redact", "-", "--plain", "--ledger", ledger, "--style", "surrogate", "--timeout", 60)
    assert re.fullmatch(r"(192\.0\.2|198\.51\.100|203\.0\.113)\.\d+ é", done.out)
    (entry,) = EgressLedger.read(ledger)
    assert (entry.way, entry.kind, entry.bytes) == ("sandwich", "request", len(done.out.encode()))


def test_a_json_document_stays_one(run: Callable[..., Any], tmp_path: Path) -> None:
    document = tmp_path / "body.json"
    document.write_text('{"card": 4111111111111111}', encoding="utf-8")
    done = run("sandwich", "redact", document, "--json-text", "--plain", "--timeout", 60)
    assert re.fullmatch(r"<CARD_\d+>", json.loads(done.out)["card"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--detectors", "emial"], "there is no detector 'emial'"),
        (["--detectors", ","], "detectors is empty"),
        (["--detectors", "email", "--dictionary", "words.txt"], "the detector dictionary is not among those chosen"),
        (["--detectors", "presidio"], "pip install 'cotune[presidio]'"),
        (["--detectors", "gliner"], "needs a model"),
        (["--language", "de"], "presidio_language is given"),
        (["--style", "nice"], "style is 'nice', expected typed or surrogate"),
        (["--max-chars", "5"], "has more than 20 bytes"),
        (["--max-chars", "20"], "characters, expected at most 20"),
        (["--timeout", "0"], "timeout_s is 0"),
        (["--plain", "--json"], "both given"),
        (["--dictionary", "none.txt"], "cannot be read"),
        (["--json-text"], "no JSON object"),
    ],
)
def test_refusals(
    run: Callable[..., Any], mail: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.chdir(mail.parent)
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    run("sandwich", "redact", mail, *options).check_refusal(words)


def test_files_that_are_none(run: Callable[..., Any], mail: Path) -> None:
    mail.with_name("latin").write_bytes(b"caf\xe9 ann@example.org")
    run("sandwich", "redact", mail.with_name("latin")).check_refusal("no UTF-8 at byte 3")
    run("sandwich", "redact", mail.with_name("missing")).check_refusal("cannot be read")
    run("sandwich", "restore", mail, "--map", mail).check_refusal("no map of placeholders")


def test_a_time_out_shows_nothing_of_the_text(
    run: Callable[..., Any], mail: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotune.cli.sandwich_command.read_settings", lambda *_, **__: _hanging())
    mail.write_text("hang ann@example.org", encoding="utf-8")
    done = run("sandwich", "redact", mail, "--timeout", 1, "--save-map", mail.with_name("map"))
    done.check_refusal("took longer than 1 s, so nothing is sent", status=1)
    assert "ann" not in done.err and not mail.with_name("map").exists()


def _hanging() -> Any:
    from cotune.sandwich.detector_table import DetectorSettings

    return DetectorSettings(detectors=("email",), own=("sandwich_detectors:Hanging",))


def test_strict_sends_common_words_alone(run: Callable[..., Any], mail: Path) -> None:
    texts = mail.with_name("texts.jsonl")
    texts.write_text('{"prompt": "write to the bank", "target": "a card"}\n' * 2)
    words = mail.with_name("common.txt")
    done = run("sandwich", "allow-list", texts, "--min-texts", 2, "--out", words, "--json")
    assert json.loads(done.out) == {"words": 6, "texts": 2}
    assert words.read_text() == "a\nbank\ncard\nthe\nto\nwrite\n"
    mail.write_text("Write to Zoe at the riverbank")
    strict = run("sandwich", "redact", mail, "--allow-list", words, "--plain", "--timeout", 60)
    assert re.fullmatch(r"Write to <WORD_\d+> <WORD_\d+> the <WORD_\d+>", strict.out)
    run("sandwich", "allow-list", texts, "--min-texts", 2, "--out", words).check_refusal("is there already")
    run("sandwich", "allow-list", texts, "--min-texts", 3, "--out", words).check_refusal("no word stands in 3")
    words.write_text(" ")
    run("sandwich", "redact", mail, "--allow-list", words).check_refusal("has no word")
