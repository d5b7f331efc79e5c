"""Tools between a cloud that may not know and a device that may: the cloud calls, the device fills in.

    cloud   book_table(guest="<PERSON_4821>", hour=19)       sees schemas and placeholders
    device  book_table(guest="Ann Lee", hour=19)             fills in and runs

A call whose arguments still hold something unknown is not run: nothing is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cotune.errors import InputError
from cotune.sandwich.chat import ToolCall
from cotune.sandwich.placeholders import UNKNOWN
from cotune.sandwich.redact import RedactedRequest

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_UNKNOWN = UNKNOWN.split("{")[0]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """Something that the device can do.

    Attributes:
        name: letters, digits, _ and -.
        description: for the cloud; it is sent as it is.
        parameters: JSON schema of an object, sent as it is.
        function: takes the arguments by name and gives JSON, or text; an exception becomes its result.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InputError(f"name of a tool is {self.name!r:.80}, expected 1 to 64 letters, digits, _ or -")
        if self.parameters.get("type") != "object":
            raise InputError(f"parameters of {self.name} is no JSON schema of an object, expected type object")

    @property
    def schema(self) -> dict[str, Any]:
        """As the API wants it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolRun:
    """A call that was answered.

    Attributes:
        call: as it came, with placeholders.
        arguments: filled in; private.
        result: private, JSON or text.
        is_done: False where it was not run, and `result` says why.
    """

    call: ToolCall
    arguments: Mapping[str, Any]
    result: Any
    is_done: bool

    def __repr__(self) -> str:
        return f"ToolRun({self.call.name}, is_done={self.is_done})"


class ToolBox:
    """The tools of a device.

    Raises:
        InputError: two tools have one name.

    Example:
        >>> add = Tool(name="add", description="", parameters={"type": "object"}, function=lambda a, b: a + b)
        >>> box = ToolBox([add])
        >>> [each["function"]["name"] for each in box.schemas]
        ['add']
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._tools = {tool.name: tool for tool in tools}
        if len(self._tools) != len(tools):
            raise InputError("two tools have the same name, expected names of their own")

    @property
    def schemas(self) -> tuple[Mapping[str, Any], ...]:
        """What the cloud is told."""
        return tuple(tool.schema for tool in self._tools.values())

    def run(self, call: ToolCall, request: RedactedRequest) -> ToolRun:
        """Fill the placeholders of a call in and run it. Nothing that a cloud can write makes this fail."""
        tool = self._tools.get(call.name)
        if tool is None:
            return ToolRun(call, {}, f"there is no tool {call.name[:80]!r}", False)
        try:
            arguments = json.loads(request.restore_arguments(call.arguments or "{}"))
        except (ValueError, RecursionError):
            return ToolRun(call, {}, "the arguments are no JSON", False)
        if not isinstance(arguments, dict):
            return ToolRun(call, {}, "the arguments are no JSON object", False)
        if _UNKNOWN in json.dumps(arguments):
            return ToolRun(call, arguments, "the arguments hold a placeholder that stands for nothing", False)
        missing = [name for name in tool.parameters.get("required", ()) if name not in arguments]
        if missing:
            return ToolRun(call, arguments, f"the arguments lack {', '.join(missing)}", False)
        try:
            return ToolRun(call, arguments, tool.function(**arguments), True)
        except Exception as error:  # whatever a tool raises is its answer
            return ToolRun(call, arguments, f"{type(error).__name__}: {error}", False)
