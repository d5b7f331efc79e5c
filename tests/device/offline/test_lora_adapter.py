"""A peft folder in NumPy: the factors and their scale, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cotune.device.offline.folder import ModuleShape
from cotune.device.offline.lora_adapter import MAX_WEIGHT_BYTES, LoraAdapter
from cotune.errors import InputError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SHAPES = {Q: ModuleShape(in_dim=4, out_dim=6), V: ModuleShape(in_dim=4, out_dim=2)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "use_rslora": False, "bias": "none", "modules_to_save": None}


def tensors(rank: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        f"base_model.model.{name}.lora_{factor}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, one in SHAPES.items()
        for factor, shape in (("A", (rank, one.in_dim)), ("B", (one.out_dim, rank)))
    }


def write(folder: Path, content: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors() if content is None else content, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def test_the_product_of_the_factors_is_that_of_the_formula(tmp_path: Path) -> None:
    adapter = LoraAdapter.read(write(tmp_path / "mine"), SHAPES)
    assert adapter.name == "mine" and set(adapter.modules) == {Q, V}
    x = np.arange(4, dtype=np.float32)
    a, b = (tensors()[f"base_model.model.{Q}.lora_{factor}.weight"] for factor in "AB")
    factors = adapter.modules[Q]
    assert factors.a.flags.c_contiguous and factors.b.flags.c_contiguous
    np.testing.assert_allclose(x @ factors.a @ factors.b, 8 / 2 * (b @ (a @ x)), rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "factors"),
    [
        ({"use_rslora": True}, {Q: 8 / 2**0.5, V: 8 / 2**0.5}),
        ({"alpha_pattern": {"q_proj": 2}}, {Q: 1.0, V: 4.0}),
        ({"alpha_pattern": {"layers.1.self_attn.v_proj": 1, Q: 3}}, {Q: 1.5, V: 0.5}),
        ({"alpha_pattern": {f"^{Q}": 6, "^v_proj": 100}}, {Q: 3.0, V: 4.0}),
    ],
)
def test_the_scale_of_each_module(tmp_path: Path, config: Any, factors: dict[str, float]) -> None:
    adapter = LoraAdapter.read(write(tmp_path, **config), SHAPES)
    for name, factor in factors.items():
        b = tensors()[f"base_model.model.{name}.lora_B.weight"]
        np.testing.assert_allclose(adapter.modules[name].b, b.T * factor, rtol=1e-6)


def test_filled_it_is_the_same_with_one_rank_everywhere(tmp_path: Path) -> None:
    content = {name: tensor for name, tensor in tensors(3).items() if V not in name}
    adapter = LoraAdapter.read(write(tmp_path, content), SHAPES)
    wide = adapter.filled({**SHAPES, "other": ModuleShape(in_dim=2, out_dim=2)})
    assert {name: factors.a.shape for name, factors in wide.modules.items()} == {Q: (4, 3), V: (4, 3), "other": (2, 3)}
    np.testing.assert_array_equal(wide.modules[Q].a @ wide.modules[Q].b, adapter.modules[Q].a @ adapter.modules[Q].b)
    assert not wide.modules[V].b.any() and not wide.modules["other"].a.any()


def bfloat16_file(content: dict[str, Any]) -> bytes:
    """A safetensors file by hand, as NumPy has no bfloat16: the upper half of a float32."""
    header, data = {}, b""
    for name, tensor in content.items():
        upper = (tensor.view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(upper)]}
        data += upper
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def test_half_precision_is_read_as_it_is(tmp_path: Path) -> None:
    whole = {name: np.round(tensor * 4) / 4 for name, tensor in tensors().items()}
    expected = LoraAdapter.read(write(tmp_path / "f32", whole), SHAPES)
    half = LoraAdapter.read(write(tmp_path / "f16", {n: t.astype(np.float16) for n, t in whole.items()}), SHAPES)
    (write(tmp_path / "bf16") / "adapter_model.safetensors").write_bytes(bfloat16_file(whole))
    brain = LoraAdapter.read(tmp_path / "bf16", SHAPES)
    for name, factors in expected.modules.items():
        for other in (half, brain):
            np.testing.assert_array_equal(other.modules[name].a, factors.a)
            np.testing.assert_array_equal(other.modules[name].b, factors.b)


def changed(name: str, tensor: Any) -> dict[str, Any]:
    content = {**tensors(), f"base_model.model.{name}": tensor}
    return {key: value for key, value in content.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "has no factors in adapter_model.safetensors"),
        (
            changed(f"{Q}.lora_A.weight", np.zeros((2, 5), np.float32)),
            r"lora_A \(2, 5\) and lora_B \(6, 2\) for .*q_proj",
        ),
        (changed(f"{Q}.lora_B.weight", np.zeros((6, 3), np.float32)), r"expected \(rank, 4\) and \(6, rank\)"),
        (changed(f"{Q}.lora_B.weight", None), "has only lora_A of .*q_proj, expected lora_A and lora_B"),
        (changed("lm_head.lora_A.weight", np.zeros((2, 4), np.float32)), "changes 'lm_head', which this offline model"),
        (changed(f"{Q}.lora_magnitude_vector", np.zeros(4, np.float32)), "lora_magnitude_vector', expected factors"),
        (changed(f"{Q}.lora_A.weight", np.zeros(4, np.float32)), "lora_A.weight', expected factors"),
        (changed(f"{Q}.lora_A.weight", np.zeros((2, 4), np.int64)), "is I64, expected F32, F16 or BF16"),
        (changed(f"{Q}.lora_A.weight", np.full((2, 4), np.inf, np.float32)), "holds nan or inf for .*q_proj"),
    ],
)
def test_tensors_that_do_not_fit_are_told(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        LoraAdapter.read(write(tmp_path, content), SHAPES)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "of kind 'IA3', expected LORA"),
        ({"use_dora": True}, "sets use_dora, which an offline model cannot take"),
        ({"bias": "all"}, "sets bias"),
        ({"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "sets init_lora_weights 'pissa_niter_4'"),
        ({"lora_alpha": "much"}, "lora_alpha 'much'"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"alpha_pattern": {"(a+)+$": 1}}, r"alpha_pattern '\(a\+\)\+\$', expected plain names"),
        ({"alpha_pattern": [1]}, r"alpha_pattern \[1\], expected finite numbers"),
    ],
)
def test_more_than_plain_lora_is_refused(tmp_path: Path, config: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        LoraAdapter.read(write(tmp_path, **config), SHAPES)


def test_missing_damaged_and_huge_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match="is no safetensors file"):
        LoraAdapter.read(folder, SHAPES)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.truncate(MAX_WEIGHT_BYTES + 1)
    with pytest.raises(InputError, match=f"has {MAX_WEIGHT_BYTES + 1} bytes, expected at most"):
        LoraAdapter.read(folder, SHAPES)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing"):
        LoraAdapter.read(folder, SHAPES)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"adapter_config\.json is no JSON"):
        LoraAdapter.read(folder, SHAPES)
    with pytest.raises(InputError, match=r"adapter_config\.json is missing, expected a LoRA adapter as peft"):
        LoraAdapter.read(tmp_path / "nowhere", SHAPES)


def test_a_model_without_modules_takes_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which takes no adapters"):
        LoraAdapter.read(write(tmp_path), {})
