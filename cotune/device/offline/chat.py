"""From a conversation to the prompt that an offline model was trained to answer: its chat template, rendered here.

A template is a Jinja text that came with the model. It is rendered in Jinja's sandbox, where it reaches nothing but the
messages and the names of the special tokens.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from cotune.device.offline.folder import OfflineFolder
from cotune.errors import InputError, first_line
from cotune.generation.text import TextCodec
from cotune.openai_api.plain_chat import plain_chat_format
from cotune.openai_api.requests import Message
from cotune.openai_api.source import ChatFormat

MAX_PROMPT_CHARACTERS = 16 * 2**20


class _ComplaintError(Exception):
    """What a template raises where messages do not fit it."""


def chat_format_of(folder: OfflineFolder, text: TextCodec) -> ChatFormat:
    """The chat template of a model as a function, or plain lines where it has none.

    Args:
        folder: of the model.
        text: its tokenizer, which puts the first special token in front of every prompt itself.

    Raises:
        InputError: the template is no Jinja, or Jinja is not installed. The function raises it where messages do not
            fit the template.

    Example:
        >>> chat_format_of(folder, codec)([Message(role="user", content="Hello")])   # doctest: +SKIP
        '<|user|>\\nHello</s>\\n<|assistant|>\\n'
    """
    if folder.chat_template is None:
        return plain_chat_format
    jinja2 = _jinja()
    environment = importlib.import_module("jinja2.sandbox").ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _complain
    try:
        template = environment.from_string(folder.chat_template)
    except jinja2.TemplateError as error:
        raise InputError(
            f"the chat template in {folder.path} is no Jinja ({first_line(error)}); export the model again"
        ) from error
    words = _special_words(folder, text)

    def render(messages: Sequence[Message]) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            prompt = str(template.render(messages=turns, add_generation_prompt=True, **words))
        except Exception as error:  # whatever a text that is no code of ours can do
            raise InputError(
                f"messages do not fit the model's chat template: {first_line(error)}; send other roles, or a plain "
                "prompt"
            ) from error
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise InputError(
                f"the chat template makes {len(prompt)} characters, expected at most {MAX_PROMPT_CHARACTERS}"
            )
        # Encoding puts the first special token there itself.
        return prompt.removeprefix(words.get("bos_token", ""))

    return render


def _special_words(folder: OfflineFolder, text: TextCodec) -> dict[str, str]:
    description = folder.description
    ids = {"bos_token": description.bos_id, "eos_token": description.end_ids[0] if description.end_ids else None}
    known = {part: text.tokenizer.id_to_token(token) for part, token in ids.items() if token is not None}
    return {part: word for part, word in known.items() if word is not None} | dict(folder.special_tokens)


def _jinja() -> Any:
    try:
        return importlib.import_module("jinja2")
    except ImportError as error:
        raise InputError(f"the model's chat template needs Jinja ({error}); run: pip install 'cotune[edge]'") from error


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _complain(message: str) -> NoReturn:
    raise _ComplaintError(message)
