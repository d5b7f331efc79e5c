"""What an export writes of each weight: rounded as asked, or a quantised folder's own codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from llama_folders import save_llama
from transformers import PreTrainedModel

from cotune.compression import written_weights
from cotune.compression.grid import Grid
from cotune.compression.llama_folder import LlamaFolder
from cotune.compression.round_to_nearest import round_to_nearest
from cotune.compression.written_weights import Rounding, WrittenWeights
from cotune.models.packed_folder import packed_files
from cotune.models.packed_weights import PackedWeight

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def quantise_some(folder: Path, model: PreTrainedModel, bits: int) -> PackedWeight:
    packed = round_to_nearest(model.get_parameter(f"{UP}.weight"), Grid(bits=bits))
    whole = {name: tensor for name, tensor in model.state_dict().items() if name != f"{UP}.weight"}
    model.save_pretrained(folder, state_dict=whole)
    files = packed_files({f"{UP}.weight": packed}, method="rtn", whole=(folder / "model.safetensors").read_bytes())
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return packed


@pytest.mark.parametrize(
    ("rounding", "linear", "embedding"),
    [
        (Rounding(), 4, 4),
        (Rounding(bits=8), 8, 8),
        (Rounding(bits=32), 32, 32),
        (Rounding(bits=4, embedding_bits=8), 4, 8),
        (Rounding(embedding_bits=32), 4, 32),
    ],
)
def test_bits_of_a_whole_folder(rounding: Rounding, linear: int, embedding: int, tmp_path: Path) -> None:
    save_llama(tmp_path)
    written = WrittenWeights(LlamaFolder(tmp_path), rounding)
    assert [written.bits_of(name) for name in (UP, DOWN)] == [linear, linear]
    assert [written.bits_of(name) for name in ("model.embed_tokens", "lm_head")] == [embedding, embedding]
    weight = written.weight(UP)
    assert (weight.bits if isinstance(weight, PackedWeight) else 32) == linear


@pytest.mark.parametrize(
    ("bits", "rounding", "linear", "embedding"),
    [
        (3, Rounding(), 32, 4),
        (8, Rounding(), 32, 8),
        (4, Rounding(bits=8), 8, 4),
        (4, Rounding(embedding_bits=8), 32, 8),
    ],
)
def test_bits_of_a_quantised_folder(bits: int, rounding: Rounding, linear: int, embedding: int, tmp_path: Path) -> None:
    """What it left whole stays whole unless bits are asked for; the embedding gets those of the codes, at least 4."""
    packed = quantise_some(tmp_path, save_llama(tmp_path), bits)
    written = WrittenWeights(LlamaFolder(tmp_path), rounding)
    names = (UP, DOWN, "model.embed_tokens", "lm_head")
    assert [written.bits_of(name) for name in names] == [bits, linear, embedding, embedding]
    own = written.weight(UP)
    assert isinstance(own, PackedWeight)
    np.testing.assert_array_equal(own.codes, packed.codes)
    np.testing.assert_array_equal(written.dequantised(UP), packed.dequantised())


def test_rounding_piece_by_piece_is_rounding_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_llama(tmp_path)
    monkeypatch.setattr(written_weights, "_ROWS_AT_A_TIME", 7)
    rounding = Rounding(bits=4, group_size=32, is_symmetric=False)
    found = WrittenWeights(LlamaFolder(tmp_path), rounding).weight(DOWN)
    expected = round_to_nearest(model.get_parameter(f"{DOWN}.weight"), Grid(bits=4))
    assert isinstance(found, PackedWeight)
    for name in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_vectors_stay_whole(tmp_path: Path) -> None:
    model = save_llama(tmp_path)
    written = WrittenWeights(LlamaFolder(tmp_path), Rounding())
    found = written.vector("model.norm.weight")
    assert found is not None
    assert torch.equal(torch.from_numpy(found), model.model.norm.weight)
    assert written.vector(f"{UP}.bias") is None
