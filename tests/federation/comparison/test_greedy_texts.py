"""Greedy texts of an attention and of a state-space model, against transformers' own and one token at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cotune.federation.causal_model import CausalModel
from cotune.federation.comparison.greedy_texts import write_greedily

PROMPTS = ["the cat?", "the", "hello world", "far cat?", "the dog"]


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_texts_are_those_of_one_token_after_the_other_whatever_the_batch(models: Path, family: str) -> None:
    own = CausalModel(str(models / family))
    with own.loaded() as model:
        wanted = []
        for prompt in PROMPTS:
            ids, pieces = own.reader.tokenizer.encode(prompt).ids, b""
            for _ in range(4):
                token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                if token == own.reader.end_id:
                    break
                ids.append(token)
                pieces += own.reader.table.pieces[token] or b""
            wanted.append(pieces.decode(errors="replace"))
        for batch_size in (1, 8):
            assert write_greedily(model, own.reader, PROMPTS, max_new_tokens=4, batch_size=batch_size) == wanted
    assert any(wanted)


def test_a_text_ends_with_its_end_token(models: Path) -> None:
    own = CausalModel(str(models / "llama"))
    with own.loaded() as model:
        head = model.get_output_embeddings()
        handle = head.register_forward_hook(
            lambda module, args, output: output.index_fill(-1, torch.tensor([own.reader.end_id]), 1e4)
        )
        assert write_greedily(model, own.reader, PROMPTS, max_new_tokens=4) == [""] * len(PROMPTS)
        handle.remove()
