"""Model folders of three families with three tokenizers, a proxy and a cloud's model, and texts for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from device_models import device_model
from tokenizer_kinds import END, table_of, tokenizer_of

from cotune.data.templates import Example
from cotune.distillation.paired_texts import Reader

KINDS = {"llama": "nfkc", "gpt2": "byte_level", "mamba2": "unigram"}
"""The tokenizer of each family of device models; proxy and cloud have `byte_level`."""
CANARY = "the 😀 cat 日本 in seven far hats"
"""Its end is ASCII for longer than the search's window, so that it is found where the rest is escaped, as in JSON."""


def reader_of(kind: str) -> Reader:
    return Reader(tokenizer_of(kind), table_of(kind), END[kind])


def model_folder(path: Path, family: str, kind: str, *, seed: int = 0) -> Path:
    """A random model whose end token is its tokenizer's."""
    model = device_model(family, vocab_size=len(table_of(kind)), seed=seed)
    model.config.eos_token_id = END[kind]
    if model.generation_config is not None:
        model.generation_config.eos_token_id = END[kind]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                # The usual initial values are so small that nothing is expected of anything.
                parameter.mul_(4.0)
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer_of(kind).to_str(), encoding="utf-8")
    return path


def domain_texts(domain: str, num: int = 6) -> list[Example]:
    """Questions with one answer for each domain."""
    answers = {"law": " the other dog did not.", "med": f" {CANARY}.", "public": " the cat sat on the mats."}
    return [
        Example(f"the {word} cat?", answers[domain])
        for word in (["theory", "far", "ran", "others", "away", "hello", "world"])[:num]
    ]


def write_texts(path: Path, texts: list[Example]) -> Path:
    rows = [json.dumps({"prompt": one.prompt, "completion": one.target}) for one in texts]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
