"""The scripted server and its script files; its HTTP is tested with the official client in test_openai_cloud."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotune.errors import DataError, InputError
from cotune.sandwich.scripted_cloud import read_script, scripted_server


def test_the_first_rule_that_is_found_answers_with_its_groups(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    path.write_text(json.dumps([{"if": r"capital of (\w+)", "say": r"Of \1?"}, {"if": "^hello$", "say": "Hi."}]))
    answer = read_script(path)
    assert answer({"messages": [{"content": "be brief"}, {"content": "The CAPITAL of France?"}]}) == "Of France?"
    assert answer({"messages": [{"content": "hello there"}]}) == "I do not know."


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '[{"if": "("}]', '[{"if": "(", "say": "x"}]', '[{"if": "a", "say": 5}]']
)
def test_what_is_no_script_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(DataError, match="no script"):
        read_script(tmp_path / "s.json")


def test_a_port_that_is_taken_is_refused() -> None:
    with scripted_server(lambda body: "") as server:
        port = int(server.base_url.split(":")[2].split("/")[0])
        with pytest.raises(InputError, match=f"port {port}"), scripted_server(lambda body: "", port=port):
            pass
