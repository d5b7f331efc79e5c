"""How a conversation becomes one prompt."""

from __future__ import annotations

import pytest

from cotune.device.serve.prompt import chat_prompt
from cotune.openai_api.api_error import ApiError
from cotune.openai_api.requests import Message, Role


def prompt_of(*turns: tuple[Role, str]) -> str:
    return chat_prompt([Message(role=role, content=text) for role, text in turns], "<{}>".format)


def test_one_request_is_what_the_plugin_was_tuned_on() -> None:
    assert prompt_of(("user", " Hi ")) == "< Hi >"


def test_earlier_turns_come_first_in_the_same_form() -> None:
    turns: list[tuple[Role, str]] = [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", " Hello. "),
        ("user", "Who are you?"),
    ]
    assert prompt_of(*turns) == "Be kind.\n\n<Hi> Hello.\n\n<Who are you?>"


def test_odd_orders_are_written_down_in_order() -> None:
    assert prompt_of(("assistant", "Hey"), ("user", "a"), ("user", "b")) == "Hey\n\n<a>\n\n<b>"
    assert prompt_of(("system", " "), ("user", "a")) == "<a>"


def test_a_form_that_ends_in_a_space_gets_no_second_one() -> None:
    messages = [Message(role=role, content=role) for role in ("user", "assistant", "user")]
    assert chat_prompt(messages, "{} ".format) == "user assistant\n\nuser "


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_the_last_message_is_the_users(role: Role) -> None:
    with pytest.raises(ApiError, match=f"the last message is of the {role}, expected one of the user"):
        prompt_of(("user", "a"), (role, "b"))


def test_an_empty_last_message_is_refused() -> None:
    with pytest.raises(ApiError, match="the last message is empty"):
        prompt_of(("user", " \n"))
