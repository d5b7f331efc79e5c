"""Texts of all runtimes are measured alike, ratios are formed within a turn, and targets are those of the issue."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import offline_decode
import pytest
import torch
from decode_speed import speeds
from offline_decode import LLAMA, ONNX, TORCH, main, ratios, targets_of
from tiny_models import tiny_backbone
from torch_text import TorchText
from transformers import AutoConfig

TOKENS = [5, 9, 30, 4, 17, 8]


def test_a_text_in_pytorch_is_the_model() -> None:
    model = tiny_backbone("llama").model
    text = TorchText(model)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    np.testing.assert_allclose(text.extend(TOKENS[:4], num_logits=2), expected[2:4], atol=1e-4)
    text.extend([1, 2])
    text.truncate(4)
    np.testing.assert_allclose(text.extend(TOKENS[4:])[0], expected[-1], atol=1e-4)
    assert text.length == 6
    text.truncate(0)
    np.testing.assert_allclose(text.extend(TOKENS)[0], expected[-1], atol=1e-4)


def test_the_first_run_warms_up_and_does_not_count() -> None:
    read: list[int] = []

    class Text:
        def truncate(self, length: int) -> None:
            assert length == 0

        def extend(self, token_ids: list[int]) -> np.ndarray:
            read.append(len(token_ids))
            return np.array([[0.0, 1.0]])

    found = speeds(Text(), TOKENS, num_tokens=3, runs=2)  # type: ignore[arg-type]
    assert read == [6, 1, 1, 1] * 3
    assert (found["prefill"].num, found["decode"].num, found["decode_cpu_ms"].num) == (2, 6, 2)


def test_ratios_are_formed_within_a_turn() -> None:
    times = [(4.0, 1.0, 1.5), (20.0, 4.0, 8.0), (9.0, 3.0, 2.0)]
    turns = [
        {
            name: {"decode_ms": ms, "prefill_ms": 1.0, "decode_cpu_ms": 1.0}
            for name, ms in zip((TORCH, ONNX, LLAMA), one, strict=True)
        }
        for one in times
    ]
    assert ratios(turns, "decode_ms", TORCH).median == 4.0
    assert [(target.measured, target.limit, target.verdict) for target in targets_of(turns)] == [
        (4.0, 4.0, "PASS"),
        (1.5, 1.0, "PASS"),
    ]
    for turn in turns:
        del turn[LLAMA]
        turn[TORCH]["decode_ms"] *= 0.9
    assert [(target.what, target.verdict) for target in targets_of(turns)] == [
        ("decode speed over torch bfloat16's", "MISS")
    ]


def test_the_command_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tiny = AutoConfig.for_model("llama", vocab_size=2048, max_position_embeddings=64, **sizes)
    monkeypatch.setattr(offline_decode, "named_config", lambda name: tiny)
    out, num_threads = tmp_path / "found.json", torch.get_num_threads()
    options = ["--work", str(tmp_path / "work"), "--out", str(out), "--turns", "2", "--tokens", "3"]
    try:
        main([*options, "--prompt", "8", "--context", "64"])
    finally:
        torch.set_num_threads(num_threads)
    record = json.loads(out.read_text())
    runtimes = record["results"]["runtimes"]
    assert {TORCH, ONNX} <= runtimes.keys() and len(record["results"]["turns"]) == 2
    assert runtimes[ONNX]["decode_ratio"]["median"] == 1.0
    assert all(found["prefill_ms"]["median"] > 0 < found["decode_ms"]["median"] for found in runtimes.values())
    assert "decode speed over torch bfloat16's" in capsys.readouterr().out
