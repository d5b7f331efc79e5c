"""From JSON to a request: what is read, what is ignored, what is refused and in which words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.openai_api.api_error import ApiError
from cotune.openai_api.requests import CompletionRequest, Message, parse_chat, parse_text

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "Once"}


def test_a_chat_with_everything() -> None:
    assert parse_chat(
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "Be kind."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    "name": "me",
                },
                {"role": "assistant", "content": "c", "tool_calls": None},
                {"role": "user", "content": ""},
            ],
            "max_tokens": 5,
            "max_completion_tokens": 7,
            "temperature": 1,
            "top_p": 0.5,
            "seed": -1,
            "stop": "END",
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 2,
            "n": 1,
            "tools": [],
            "response_format": {"type": "text"},
            "frequency_penalty": 0,
            "presence_penalty": 0.0,
            "logit_bias": {},
            "user": "u",
            "metadata": {"a": "b"},
            "store": False,
            "cotune": {"mode": "spa"},
        }
    ) == CompletionRequest(
        form="chat",
        model="m",
        messages=(
            Message(role="system", content="Be kind."),
            Message(role="user", content="ab"),
            Message(role="assistant", content="c"),
            Message(role="user", content=""),
        ),
        max_tokens=7,
        temperature=1.0,
        top_p=0.5,
        seed=2**64 - 1,
        stop=("END",),
        stream=True,
        include_usage=True,
        logprobs=True,
        num_alternatives=2,
        extension={"mode": "spa"},
    )


@pytest.mark.parametrize(
    ("prompt", "expected"), [("Once", "Once"), (["Once"], "Once"), ([1, 2], (1, 2)), ([[1, 2]], (1, 2))]
)
def test_a_prompt_is_a_text_or_token_ids(prompt: object, expected: object) -> None:
    assert parse_text({**TEXT, "prompt": prompt}).prompt == expected


def test_log_probabilities_of_a_text_are_a_count() -> None:
    assert not parse_text(TEXT).logprobs
    asked = parse_text({**TEXT, "logprobs": 0})
    assert asked.logprobs and asked.num_alternatives == 0


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"model": None}, "model", "model is missing"),
    ({"messages": None}, "messages", "messages is missing"),
    ({"messages": []}, "messages", "a list of at least one message"),
    ({"messages": CHAT["messages"] * 1001}, "messages", "has 1001 entries, expected at most 1000"),
    ({"messages": ["Hi"]}, "messages[0]", "expected a JSON object"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "calling tools is not supported"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "system, user or assistant"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "a string or a list of text parts"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
        "only text is supported",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "only text is supported",
    ),
    ({"n": 2}, "n", "one text is made for each request"),
    ({"tools": [{}]}, "tools", "calling tools is not supported"),
    ({"tool_choice": "required"}, "tool_choice", "calling tools"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "only plain text"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "penalties are not supported"),
    ({"presence_penalty": -1}, "presence_penalty", "penalties are not supported"),
    ({"modalities": ["audio"]}, "modalities", "only text"),
    ({"temperature": 2.1}, "temperature", "a number from 0 to 2"),
    ({"temperature": "hot"}, "temperature", "a number from 0 to 2"),
    ({"top_p": 0}, "top_p", "above 0 and at most 1"),
    ({"max_tokens": 0}, "max_tokens", "an integer from 1"),
    ({"seed": 1.5}, "seed", "an integer"),
    ({"stop": ["a"] * 5}, "stop", "up to 4 strings"),
    ({"stop": ""}, "stop", "of 1 to 256 characters"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "without stream"),
    ({"top_logprobs": 3}, "top_logprobs", "without logprobs"),
    ({"cotune": "spa"}, "cotune", "a JSON object"),
    ({"min_p": 0.1}, "min_p", "'min_p' is not known here"),
]


@pytest.mark.parametrize(("changes", "param", "words"), REFUSED)
def test_what_is_refused_names_its_field(changes: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat({**CHAT, **changes})
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert (caught.value.param, caught.value.status) == (param, 400)


@pytest.mark.parametrize(
    "changes",
    [{"prompt": value} for value in (None, "", [], ["a", "b"], [[1], [2]], [-1], [1.0], [True], 3)]
    + [{"best_of": 2}, {"echo": True}, {"suffix": "end"}, {"logprobs": 6}, {"messages": []}],
)
def test_what_a_text_request_refuses(changes: dict[str, Any]) -> None:
    with pytest.raises(ApiError):
        parse_text({**TEXT, **changes})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([*CHAT, *TEXT, "stop", "stream", "stream_options", "temperature", "seed", "cotune", "tools"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names, json_values, max_size=4))
def test_no_json_makes_it_fail_in_another_way(changes: dict[str, Any]) -> None:
    for parse, good in ((parse_chat, CHAT), (parse_text, TEXT)):
        try:
            assert isinstance(parse({**good, **changes}), CompletionRequest)
        except ApiError as error:
            assert error.status == 400 and len(str(error)) < 500
