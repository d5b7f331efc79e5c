"""Text from an offline model: equal to the same loop in NumPy, whatever was asked before, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offline_folders import CONTEXT, END, TinyLlama, random_adapter, write_onnx_folder, write_peft_folder
from toy import VOCAB

from cotune.device.offline.folder import OfflineFolder
from cotune.device.offline.generate import OfflineGeneration, generate_offline
from cotune.device.offline.memory import memory_need
from cotune.device.offline.model import OfflineModel, OfflineSettings
from cotune.device.offline.runtimes import load_offline_model
from cotune.errors import InputError
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling, choose
from cotune.generation.text import TextCodec

TINY = TinyLlama()
PROMPT = np.array([5, 9, 30])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx_folder(tmp_path_factory.mktemp("offline") / "model", TINY)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[OfflineModel]:
    made = load_offline_model(folder, OfflineSettings(num_threads=1))
    yield made
    made.close()


def request(**changes: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompt_ids": PROMPT, "max_new_tokens": 12, **changes})


def expected(made: GenerationRequest, adapter: Any = None) -> list[int]:
    """The loop in NumPy, without ends."""
    tokens = made.prompt_ids.tolist()
    for _ in range(made.max_new_tokens):
        tokens.append(choose(TINY.logits(tokens, adapter)[-1], made.sampling, len(tokens)))
    return tokens[len(made.prompt_ids) :]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, seed=7), Sampling(temperature=1.5, top_p=0.7, seed=8)]
)
def test_the_tokens_are_those_of_the_formula(model: OfflineModel, sampling: Sampling) -> None:
    made = request(sampling=sampling)
    generation = generate_offline(model, made)
    assert generation.token_ids == expected(made)
    assert generation.ending is not None and generation.ending.reason == "length"


def test_the_seed_decides_and_nothing_else(model: OfflineModel) -> None:
    one, two = (request(sampling=Sampling(temperature=1.0, seed=seed), max_new_tokens=20) for seed in (1, 2))
    first = generate_offline(model, one).token_ids
    # Two texts at once, step by step in turns.
    left, right = OfflineGeneration(model, one), OfflineGeneration(model, two)
    while left.ending is None or right.ending is None:
        for generation in (left, right):
            if generation.ending is None:
                generation.advance()
    assert left.token_ids == first != right.token_ids
    left.close()
    right.close()


def test_a_long_prompt_is_read_in_pieces_and_gives_the_same_text(model: OfflineModel) -> None:
    long = np.random.default_rng(0).integers(3, VOCAB, CONTEXT - 4)
    made = request(prompt_ids=long, max_new_tokens=3)
    generation = OfflineGeneration(model, made)
    generation._reader._piece = 16
    calls = [generation.advance() for _ in range(4)]
    assert calls[:3] == [None, None, None] and calls[3] is not None
    assert [calls[3].token_id, *generate_offline(model, made).token_ids[1:]] == expected(made)
    generation.close()


def test_an_adapter_writes_another_text(model: OfflineModel, tmp_path: Path) -> None:
    weights = random_adapter()
    adapter = model.load_adapter(write_peft_folder(tmp_path / "mine", weights))
    found = generate_offline(model, request(), adapter=adapter).token_ids
    assert found == expected(request(), weights) != expected(request())


def test_how_texts_end(model: OfflineModel) -> None:
    whole = expected(request())
    stopped = generate_offline(model, request(stop_token_ids=(whole[4],)))
    place = whole.index(whole[4])
    assert stopped.token_ids == whole[: place + 1]
    assert stopped.ending is not None and stopped.ending.reason == "end_token"
    codec = TextCodec(model.folder.tokenizer_json)
    made = request(stop_strings=(f"w{whole[2]} w{whole[3]}",))
    cut = generate_offline(model, made, detokenize=codec.decode)
    assert cut.token_ids == whole[:4]
    assert cut.ending is not None and cut.ending.num_characters == len(codec.decode(whole[:2])) + 1
    with pytest.raises(InputError, match=r"the text has ended \(stop_string\)"):
        cut.advance()


def test_the_context_cuts_a_text_and_refuses_a_prompt(model: OfflineModel) -> None:
    long = np.full(CONTEXT - 2, 5)
    generation = generate_offline(model, request(prompt_ids=long, max_new_tokens=99))
    assert len(generation.token_ids) == 2 and generation.request.max_new_tokens == 2
    assert generation.ending is not None and generation.ending.reason == "length"
    with pytest.raises(
        InputError, match="the prompt has 64 tokens, expected fewer than 64, the context of the offline"
    ):
        generate_offline(model, request(prompt_ids=np.full(CONTEXT, 5)))


def test_log_probabilities_and_alternatives(model: OfflineModel) -> None:
    generation = OfflineGeneration(model, request(), num_alternatives=3)
    token = generation.advance()
    assert token is not None
    wide = TINY.logits(PROMPT)[-1].astype(np.float64)
    logprobs = wide - np.log(np.exp(wide).sum())
    assert token.logprob == pytest.approx(logprobs[token.token_id], abs=1e-4)
    assert [one for one, _ in token.alternatives] == np.argsort(-logprobs)[:3].tolist()
    assert token.alternatives[0] == (token.token_id, token.logprob)
    generation.close()


def test_the_memory_is_given_back(model: OfflineModel) -> None:
    generation = generate_offline(model, request(stop_token_ids=(END,)))
    with pytest.raises(InputError, match="the text is closed"):
        generation._reader.read([1])


def test_a_model_that_does_not_fit_is_not_loaded(folder: Path) -> None:
    with pytest.raises(InputError, match=r"expected at most 0\.0 MiB, the memory limit"):
        load_offline_model(folder, OfflineSettings(memory_limit_bytes=1000))
    need = memory_need(OfflineFolder.open(folder), OfflineSettings(num_texts=2)).total
    roomy = load_offline_model(folder, OfflineSettings(memory_limit_bytes=need, num_texts=8))
    assert roomy.num_texts == 2
    roomy.close()


def test_tokens_do_not_depend_on_the_number_of_threads(folder: Path, model: OfflineModel) -> None:
    both = load_offline_model(folder, OfflineSettings(num_threads=2))
    made = request(sampling=Sampling(temperature=1.0, seed=3), max_new_tokens=30)
    assert generate_offline(both, made).token_ids == generate_offline(model, made).token_ids
    both.close()
