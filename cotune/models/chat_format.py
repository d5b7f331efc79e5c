"""From a conversation to the prompt that a model was trained to answer: its own chat template, where it has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cotune.errors import InputError

Turns = Sequence[tuple[str, str]]
"""(role, content) of each turn."""


def chat_format_of(folder: Path) -> Callable[[Turns], str] | None:
    """The chat template of the model in `folder` as a function; None where it has none.

    transformers renders templates in a sandbox; they cannot run code of their own.

    Raises:
        InputError: the tokenizer's files cannot be read.
    """
    from transformers import AutoTokenizer

    has_template = (folder / "chat_template.jinja").is_file()
    config = folder / "tokenizer_config.json"
    if not has_template and not (config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"the tokenizer in {folder} cannot be read: {error}; copy the model again") from error

    def render(turns: Turns) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # the template's own complaints, such as two turns of one role
            raise InputError(f"messages do not fit the model's chat template: {error}") from error
        # Encoding puts the first special token there itself.
        start = tokenizer.bos_token
        return str(text).removeprefix(start) if start else str(text)

    return render
