"""GPTQ against llm-compressor's, in an environment that has it.

It asks for older versions of transformers and huggingface_hub than this project runs on, so it is no dependency and no
part of CI. Make an environment with `pip install llmcompressor datasets` and this package, or put what it lacks beside
this one's packages, and run this file:

    pip install --no-deps --target beside llmcompressor==0.14.0.1 compressed-tensors==0.19.0 auto-round==0.15.1 loguru
    PYTHONPATH=beside python -m pytest -n 0 tests/optional/test_llm_compressor.py

So it passed with transformers 5.23. The shares of equal codes were 0.985 to 1 at 4 bits and 0.928 to 0.984 at 8, where
our float16 scales count for more; without the order by activation, or rounded to nearest, they are 0.67 to 0.85.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from compressible import VOCAB, tiny_model
from tiny_models import tokenizer_json
from transformers import AutoModelForCausalLM

from cotune.compression.gptq import Gptq
from cotune.compression.grid import Grid

pytest.importorskip("llmcompressor", reason="llm-compressor is not installed; it needs an older transformers")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

GROUP_SIZE = 32


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("bits", "least"), [(8, 0.9), (4, 0.97)])
def test_the_first_block_has_the_same_codes_but_for_rounding(bits: int, least: float, tmp_path: Path) -> None:
    """Activation order with scales of the weights as they were, which is its default; its scales stay float32.

    Later blocks read what the first one puts out, where one code that fell otherwise changes all that follow.
    """
    ids = torch.randint(0, VOCAB, (8, 16), generator=torch.Generator().manual_seed(0))
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    _quantise(theirs, ids, bits)
    packed = Gptq(orders_by_activation=True).quantise_linears(
        tiny_model(), ids.numpy(), Grid(bits=bits, group_size=GROUP_SIZE, is_symmetric=True)
    )
    for name in (name for name in packed if name.startswith("model.layers.0.") and "down_proj" not in name):
        ours = torch.from_numpy(packed[name].dequantised())
        step = torch.from_numpy(packed[name].scales).repeat_interleave(packed[name].group_size, dim=1)
        same = ((ours - theirs.get_submodule(name).weight.detach()).abs() < 0.2 * step).float().mean()
        assert float(same) > least, name


def _quantise(model: torch.nn.Module, ids: torch.Tensor, bits: int) -> None:
    try:
        modifiers = importlib.import_module("llmcompressor.modifiers.gptq")
    except ModuleNotFoundError:
        modifiers = importlib.import_module("llmcompressor.modifiers.quantization")
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE}
    recipe = modifiers.GPTQModifier(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head", "re:.*down_proj"],  # 48 inputs are no whole groups
        dampening_frac=0.01,
        actorder="static",
    )
    texts = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    importlib.import_module("llmcompressor").oneshot(
        model=model, dataset=texts, recipe=recipe, num_calibration_samples=len(ids), max_seq_length=ids.shape[1]
    )
