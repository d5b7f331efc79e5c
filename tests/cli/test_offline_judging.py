"""An exported model is judged by the same scores as any other, with its own numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from offline_folders import CONTEXT, TinyLlama, random_adapter, write_onnx_folder, write_peft_folder

from cotune.cli.offline_judging import judge_offline, target_nats
from cotune.data.batches import EncodedExample
from cotune.data.templates import Example
from cotune.device.offline.runtimes import load_offline_model

TINY = TinyLlama()


def silent(done: int, total: int, note: str = "") -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx_folder(tmp_path_factory.mktemp("offline") / "small", TINY)


def log_probs(ids: list[int], adapter: object = None) -> np.ndarray:
    logits = TINY.logits(ids, adapter).astype(np.float64)  # type: ignore[arg-type]
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))


def test_nats_of_targets_are_those_of_the_model(folder: Path) -> None:
    ids = [5, 9, 30, 7, 11]
    model = load_offline_model(folder)
    nats = target_nats(model, [EncodedExample(np.array(ids), 2), EncodedExample(np.array(ids[:2]), 1)])
    expected = [-log_probs(ids)[place - 1, ids[place]] for place in (2, 3, 4)]
    np.testing.assert_allclose(nats, [*expected, -log_probs(ids)[0, ids[1]]], atol=1e-4)


def test_texts_longer_than_a_piece_are_read_to_their_end(tmp_path: Path, folder: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 40, CONTEXT).tolist()
    found = target_nats(load_offline_model(folder), [EncodedExample(np.array(ids), CONTEXT - 2)])
    expected = [-log_probs(ids)[place - 1, ids[place]] for place in (CONTEXT - 2, CONTEXT - 1)]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_scores_with_an_adapter_and_label_words(tmp_path: Path, folder: Path) -> None:
    examples = [Example("w5 w9", " w30"), Example("w7", " w11")]
    plain = judge_offline(folder, examples, max_new_tokens=3, labels=("w30", "w11"), advance=silent)
    right = 0
    for prompt, own, other in (([5, 9], 30, 11), ([7], 11, 30)):
        last = log_probs(prompt)[-1]
        right += bool(last[own] > last[other])
    assert plain.num_texts == 2 and plain.label_accuracy == right / 2
    assert plain.rouge_l is not None and plain.perplexity is not None
    weights = random_adapter()
    adapter = write_peft_folder(tmp_path / "lora", weights)
    adapted = judge_offline(folder, examples, max_new_tokens=3, adapter=adapter, advance=silent)
    assert adapted.nats_per_token != plain.nats_per_token
