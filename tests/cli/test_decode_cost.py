"""Speeds and memory of a model come from the model: by its own runtime, and without PyTorch where it is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llama_folders import save_llama
from offline_folders import TinyLlama, write_onnx_folder

from cotune.cli.decode_cost import DecodeSettings, Speed, decode_cost, main, measure_decode
from cotune.errors import CotuneError

FEW = DecodeSettings(num_prompt_tokens=8, num_new_tokens=4, num_rounds=2, dtype="float32")


def test_quartiles_by_hand() -> None:
    assert Speed.of(12, [1.0, 2.0, 3.0, 4.0, 6.0]) == Speed(median=4.0, low=3.0, high=6.0)


def test_a_model_in_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_llama(tmp_path / "m")
    arguments = [str(tmp_path / "m"), "--num-prompt-tokens=8", "--num-new-tokens=4", "--num-rounds=2"]
    capsys.readouterr()
    main(arguments)
    found = json.loads(capsys.readouterr().out)
    assert found["runtime"] == "torch" and found["dtype"] == "bfloat16" and found["num_threads"] == 1
    for speed in (found["prefill"], found["decode"]):
        assert 0 < speed["low"] <= speed["median"] <= speed["high"]
    # A context of 64 has no room for a prompt of 64.
    assert decode_cost(tmp_path / "m", DecodeSettings(num_new_tokens=2, num_rounds=2)).prefill.median > 0


def test_an_exported_model_in_a_child(tmp_path: Path) -> None:
    folder = write_onnx_folder(tmp_path / "m", TinyLlama())
    cost = measure_decode(folder, FEW)
    assert cost.runtime == "onnxruntime" and cost.dtype == ""
    assert cost.prefill.median > 0 and cost.decode.low <= cost.decode.median
    assert cost.peak_bytes is None or cost.peak_bytes >= 0
    (folder / "model.onnx").write_bytes(b"other")
    with pytest.raises(CotuneError, match="is damaged or another file"):
        measure_decode(folder, FEW)
