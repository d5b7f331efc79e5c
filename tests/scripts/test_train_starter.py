"""The training script in miniature, and the model that ships."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from cotune.data import encode_example, format_answer, format_request, generate_exchanges
from cotune.data.templates import Example

ROOT = Path(__file__).parents[2]
STARTER = ROOT / "cotune" / "models" / "starter"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_starter", ROOT / "scripts" / "train_starter.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_starter"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(STARTER)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(STARTER / "tokenizer.json"))


def answer_greedily(model: LlamaForCausalLM, tokenizer: Tokenizer, request: str) -> str:
    input_ids = torch.tensor([tokenizer.encode(format_request(request)).ids])
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=60, do_sample=False)
    return tokenizer.decode(output[0, input_ids.shape[1] :].tolist())


def train(script: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    arguments = [
        "--steps",
        "2",
        "--batch",
        "2",
        "--seq",
        "48",
        "--exchanges",
        "300",
        "--held-out",
        "3",
        "--threads",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["train_starter.py", *arguments, "--out", str(out)])
    script.main()


def test_the_script_writes_a_whole_model_and_repeats(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        train(script, monkeypatch, tmp_path / name)
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {path.name for path in STARTER.iterdir()}
    assert "python scripts/train_starter.py --seed 0 --steps 2" in (tmp_path / "first" / "README.md").read_text()
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_requests_weigh_less_than_answers(script: ModuleType, tokenizer: Tokenizer) -> None:
    exchange = generate_exchanges(1, seed=3)[0]
    document = script.encode_document(tokenizer, [exchange])
    example = Example(format_request(exchange.request), format_answer(exchange.answer))
    encoded = encode_example(tokenizer, example, eos_token_id=2, max_length=512)
    assert document.token_ids == encoded.input_ids.tolist()
    first = encoded.first_target
    assert document.weights == [0.0] + [0.2] * (first - 1) + [1.0] * (len(document.token_ids) - first)


def test_the_learning_rate_rises_and_falls(script: ModuleType) -> None:
    rates = [script.learning_rate(step, 1000, 1e-3) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5)
    assert max(rates) == rates[100] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(5e-5, rel=1e-2)


def test_what_ships_is_small_and_whole() -> None:
    assert sum(path.stat().st_size for path in STARTER.iterdir()) <= 8 * 10**6
    config = json.loads((STARTER / "config.json").read_text())
    assert (config["architectures"], config["dtype"], config["vocab_size"]) == (["LlamaForCausalLM"], "float32", 2048)
    with safe_open(STARTER / "model.safetensors", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float16)}
    assert 1e6 < sum(tensor.size for tensor in tensors.values()) < 4e6


def test_the_tokenizer_starts_texts_and_can_encode_any(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in ("<pad>", "<bos>", "<eos>")] == [0, 1, 2]
    for text in ("Hello!", "naïve 東京 🙂\n\ttabs", ""):
        encoded = tokenizer.encode(text)
        assert encoded.ids[0] == 1
        assert tokenizer.decode(encoded.ids) == text
    loaded = AutoTokenizer.from_pretrained(STARTER)
    assert loaded("Hello!")["input_ids"] == tokenizer.encode("Hello!").ids
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 0)


def test_it_predicts_held_out_answers(script: ModuleType, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    loss, accuracy = script.measure_answers(model, tokenizer, generate_exchanges(60, seed=1))
    assert loss < 0.45
    assert accuracy > 0.85


@pytest.mark.parametrize(
    ("request_text", "expected"),
    [
        ("Remind me to water the plants on Friday at nine.", ["water the plants", "on Friday at nine"]),
        ("Set a timer for ten minutes for the soup.", ["ten minutes", "the soup is ready"]),
        ("Write a friendly message to Clara to thank her for fixing my bike.", ["Clara", "fixing my bike"]),
        ("What is a lighthouse?", ["A lighthouse is a tall tower by the sea"]),
    ],
)
def test_it_answers_on_topic_and_ends(
    model: LlamaForCausalLM, tokenizer: Tokenizer, request_text: str, expected: list[str]
) -> None:
    answer = answer_greedily(model, tokenizer, request_text)
    assert all(part in answer for part in expected), answer
    assert answer.startswith(" ") and answer[-1] in ".!?"
