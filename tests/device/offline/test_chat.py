"""Chat templates without transformers, against transformers where it is there, and in a sandbox."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from byte_tokens import BOS, EOS, TOKENIZER
from offline_folders import TinyLlama, write_onnx_folder

from cotune.device.offline import chat
from cotune.device.offline.chat import chat_format_of
from cotune.device.offline.folder import OfflineFolder
from cotune.errors import InputError
from cotune.generation.text import TextCodec
from cotune.openai_api.requests import Message

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
<|{{ message['role'] }}|>
{{ message['content'] | trim }}{{ eos_token }}
{% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}"""
TURNS = [("system", "Be kind."), ("user", " Hi ö \n"), ("assistant", "Hello."), ("user", "Bye")]
MESSAGES = [Message(role=role, content=content) for role, content in TURNS]  # type: ignore[arg-type]


def format_of(path: Path, template: str | None, config: dict[str, Any] | None = None, **changes: Any) -> Any:
    texts = {} if template is None else {"chat_template.jinja": template}
    if config is not None:
        texts["tokenizer_config.json"] = json.dumps(config)
    data = TOKENIZER.to_str().encode()
    ids = {"bos_id": BOS, "end_ids": (EOS,), **changes}
    folder = OfflineFolder.open(
        write_onnx_folder(path / "model", TinyLlama(vocab_size=258), tokenizer_json=data, texts=texts, **ids)
    )
    return chat_format_of(folder, TextCodec(data))


def test_a_conversation_as_the_template_says(tmp_path: Path) -> None:
    prompt = format_of(tmp_path, TEMPLATE)(MESSAGES)
    turns = ("system", "Be kind."), ("user", "Hi ö"), ("assistant", "Hello."), ("user", "Bye")
    assert prompt == "".join(f"<|{role}|>\n{text}<eos>\n" for role, text in turns) + "<|assistant|>\n"


def test_it_is_what_transformers_makes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, bos_token="<bos>", eos_token="<eos>")
    turns = [{"role": role, "content": content} for role, content in TURNS]
    tokenizer.chat_template = TEMPLATE
    theirs = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert format_of(tmp_path, TEMPLATE)(MESSAGES) == theirs.removeprefix("<bos>")


def test_words_of_the_tokenizers_settings_go_before_those_of_the_ids(tmp_path: Path) -> None:
    render = format_of(tmp_path, "{{ bos_token }}{{ eos_token }}|{{ pad_token }}", {"eos_token": "!", "pad_token": "?"})
    assert render(MESSAGES) == "!|?"


def test_without_a_template_there_are_plain_lines(tmp_path: Path) -> None:
    assert format_of(tmp_path, None)(MESSAGES[1:2]) == "User:  Hi ö \n\nAssistant:"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('turns must alternate') }}", "chat template: turns must alternate; send other roles"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template: access to attribute '__class__'"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "chat template: Range too big"),
        ("{{ nothing.there }}", "chat template: 'nothing' is undefined"),
        ("{% include '/etc/hostname' %}", "chat template: no loader"),
    ],
)
def test_a_template_reaches_nothing_but_the_messages(tmp_path: Path, template: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        format_of(tmp_path, template)(MESSAGES)


def test_a_template_that_is_none_and_jinja_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"is no Jinja \(unexpected 'end of template'\); export the model again"):
        format_of(tmp_path, "{{")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match=r"chat template needs Jinja \(.*\); run: pip install 'cotune\[edge\]'"):
        format_of(tmp_path / "other", TEMPLATE)


def test_a_prompt_of_any_length_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_PROMPT_CHARACTERS", 99)
    assert len(format_of(tmp_path, "{{ 'x' * 99 }}")(MESSAGES)) == 99
    with pytest.raises(InputError, match="makes 100 characters, expected at most 99"):
        format_of(tmp_path / "other", "{{ 'x' * 100 }}")(MESSAGES)


def test_an_object_as_json(tmp_path: Path) -> None:
    assert format_of(tmp_path, "{{ messages[0] | tojson }}")(MESSAGES) == '{"role": "system", "content": "Be kind."}'
