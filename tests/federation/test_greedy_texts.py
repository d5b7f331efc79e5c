"""Greedy texts of an attention and of a state-space model, against transformers' own and one token at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from co_tuning_scene import make_models

from cotune.federation.causal_model import CausalModel
from cotune.federation.greedy_texts import GreedyText, write_greedily


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("greedy"))


PROMPTS = ["the cat?", "the", "hello world", "far cat?", "the dog"]


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_texts_are_those_of_one_token_after_the_other_whatever_the_batch(models: Path, family: str) -> None:
    own = CausalModel(str(models / family))
    with own.loaded() as model:
        wanted, means = [], []
        for prompt in PROMPTS:
            ids, pieces, nats = own.reader.tokenizer.encode(prompt).ids, b"", []
            for _ in range(4):
                log_probs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(0)
                token = int(log_probs.argmax())
                nats.append(float(log_probs[token]))
                if token == own.reader.end_id:
                    break
                ids.append(token)
                pieces += own.reader.table.pieces[token] or b""
            wanted.append(pieces.decode(errors="replace"))
            means.append(sum(nats) / len(nats))
        for batch_size in (1, 8):
            written = write_greedily(model, own.reader, PROMPTS, max_new_tokens=4, batch_size=batch_size)
            assert [one.text for one in written] == wanted
            assert [one.log_likelihood for one in written] == pytest.approx(means, rel=1e-4)
    assert any(wanted)


def test_a_text_ends_with_its_end_token(models: Path) -> None:
    own = CausalModel(str(models / "llama"))
    with own.loaded() as model:
        head = model.get_output_embeddings()
        handle = head.register_forward_hook(
            lambda module, args, output: output.index_fill(-1, torch.tensor([own.reader.end_id]), 1e4)
        )
        written = write_greedily(model, own.reader, PROMPTS, max_new_tokens=4)
        # The end is a token that was written, and nothing else could have been.
        assert written == [GreedyText("", 0.0)] * len(PROMPTS)
        handle.remove()
