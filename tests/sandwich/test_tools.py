"""Tools: filled in here, run here, and nothing unknown is run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from redactors import redactor_here

from cotune.errors import InputError
from cotune.sandwich.chat import ToolCall
from cotune.sandwich.redact import RedactedRequest
from cotune.sandwich.tools import Tool, ToolBox

PARAMETERS = {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]}


def box(seen: list[Any]) -> ToolBox:
    def send(to: str, **rest: Any) -> dict[str, Any]:
        if to == "nobody":
            raise LookupError("no such address")
        seen.append((to, rest))
        return {"sent": True}

    return ToolBox([Tool(name="send", description="Sends mail.", parameters=PARAMETERS, function=send)])


@pytest.fixture
def request_() -> RedactedRequest:
    with redactor_here() as redactor:
        request = redactor.request()
        request.redact("ann@example.org")
        return request


def call(arguments: str, name: str = "send") -> ToolCall:
    return ToolCall(id="c", name=name, arguments=arguments)


def test_placeholders_become_values_only_here(request_: RedactedRequest) -> None:
    seen: list[Any] = []
    sent = request_.redact("ann@example.org").text
    run = box(seen).run(call(json.dumps({"to": sent, "n": 2})), request_)
    assert seen == [("ann@example.org", {"n": 2})] and run.is_done and run.result == {"sent": True}
    assert "ann@" not in repr(run) and sent in run.call.arguments


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (call("{}"), "lack to"),
        (call("[1]"), "no JSON object"),
        (call("{"), "no JSON"),
        (call('{"to": "<EMAIL_9999>"}'), "placeholder that stands for nothing"),
        (call('{"to": "x"}', name="rm"), "there is no tool 'rm'"),
        (call('{"to": "nobody"}'), "LookupError: no such address"),
    ],
)
def test_what_cannot_be_run_says_why_and_is_not_run(request_: RedactedRequest, made: ToolCall, said: str) -> None:
    seen: list[Any] = []
    run = box(seen).run(made, request_)
    assert said in run.result and not run.is_done and seen == []


def test_schemas_are_those_of_the_api() -> None:
    assert box([]).schemas == (
        {"type": "function", "function": {"name": "send", "description": "Sends mail.", "parameters": PARAMETERS}},
    )


def test_bad_tools_are_refused() -> None:
    tool = Tool(name="a", description="", parameters=PARAMETERS, function=print)
    with pytest.raises(InputError, match="same name"):
        ToolBox([tool, tool])
    with pytest.raises(InputError, match="name of a tool"):
        Tool(name="a b", description="", parameters=PARAMETERS, function=print)
    with pytest.raises(InputError, match="JSON schema"):
        Tool(name="a", description="", parameters={}, function=print)
