"""bitsandbytes is an extra: without it, only the refusals are tested."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch.func import functional_call
from transformers import PreTrainedModel

from cotune.data.batches import EncodedExample, pad_batch
from cotune.errors import InputError
from cotune.models import Backbone
from cotune.models.adapter_folder import load_adapter
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.low_bit import dequantised, is_low_bit, low_bit_placement, original_weights
from cotune.models.packed_folder import packed_files
from cotune.models.packed_weights import PackedWeight
from cotune.models.peft_adapter import PeftAdapter
from cotune.models.selected import SelectedParameters, all_names
from cotune.tuning.answer_loss import answer_nats
from cotune.tuning.ia3 import Ia3
from cotune.tuning.loop import LoopConfig
from cotune.tuning.lora import Lora
from cotune.tuning.lora_init import initial_lora
from cotune.tuning.soft_prompt import SoftPrompt
from cotune.tuning.tune import TuneConfig, tune

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes, the extra lowbit, is not installed"
)
EXAMPLES = [EncodedExample(np.arange(3 + i, 15 + i), 4) for i in range(6)]


@pytest.fixture
def folder(tmp_path: Path, make_model: Callable[..., PreTrainedModel], tokenizer_json: bytes) -> Path:
    # Layers that are whole blocks of 64 numbers.
    model = make_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes(tokenizer_json)
    return tmp_path / "model"


def test_other_bits_and_a_missing_library_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="base bits are 3, expected 4 or 8"):
        low_bit_placement(3, dtype="float32", device="cpu")
    with pytest.raises(InputError, match="dtype is 'int4'"):
        low_bit_placement(4, dtype="int4", device="cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs bitsandbytes; install cotune\[lowbit\]"):
        low_bit_placement(4, dtype="float32", device="cpu")


def test_the_whole_weights_are_read_from_the_folder(folder: Path) -> None:
    whole = Backbone.from_pretrained(str(folder))
    assert not is_low_bit(whole.model)
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    found = dict(original_weights(str(folder), names))
    assert all(torch.equal(found[name], whole.model.get_parameter(name)) for name in names)
    with pytest.raises(InputError, match="cannot be read"):
        list(original_weights(str(folder), ["nothing.weight"]))


@needs_bitsandbytes
@pytest.mark.parametrize(("bits", "error"), [(4, 0.2), (8, 0.02)])
def test_a_low_bit_model_is_small_and_close(folder: Path, bits: int, error: float) -> None:
    whole, low = Backbone.from_pretrained(str(folder)), Backbone.from_pretrained(str(folder), base_bits=bits)
    assert is_low_bit(low.model)
    assert low.spec.num_parameters == whole.spec.num_parameters
    assert low.spec.backbone_digest == whole.spec.backbone_digest
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer = low.model.get_submodule(f"model.layers.0.{name}")
        weight = whole.model.get_parameter(f"model.layers.0.{name}.weight")
        stored = layer.weight.numel() * layer.weight.element_size()
        assert stored * 32 == weight.numel() * 4 * bits
        assert float((dequantised(layer) - weight).norm() / weight.norm()) < error
    tokens = torch.arange(3, 15)[None]
    ours, theirs = (backbone.forward_states(tokens).hidden for backbone in (low, whole))
    assert float((ours - theirs).norm() / theirs.norm()) < 3 * error


@needs_bitsandbytes
def test_gradients_flow_through_four_bits_also_after_an_evaluation(folder: Path) -> None:
    """Against a whole model with the same rounded weights. bitsandbytes' own fast kernel has no backward pass."""
    low, same = Backbone.from_pretrained(str(folder), base_bits=4), Backbone.from_pretrained(str(folder))
    with torch.no_grad():
        for name, parameter in same.model.named_parameters():
            layer = low.model.get_submodule(name.rpartition(".")[0])
            if hasattr(layer.weight, "quant_state"):
                parameter.copy_(dequantised(layer))
    adapter = LoraAdapter.fresh(same.model, LoraShape(rank=2))
    params = {n: t + 0.05 for n, t in adapter.params.items()}

    def gradients(backbone: Backbone) -> tuple[torch.Tensor, ...]:
        with LoraAdapter(shape=adapter.shape, params=params).attach(backbone.model) as model:
            leaves = {n: t.clone().requires_grad_() for n, t in params.items()}
            with torch.no_grad():
                functional_call(model, leaves, kwargs={"input_ids": torch.arange(3, 9)[None]})
            nats = answer_nats(model, model.get_output_embeddings(), leaves, pad_batch(EXAMPLES, 0))
            return torch.autograd.grad(nats.mean(), list(leaves.values()))

    for ours, theirs in zip(gradients(low), gradients(same), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("what", [Lora(), Lora(init="loftq"), Lora(shape=LoraShape(use_dora=True)), SoftPrompt()])
def test_adapters_are_tuned_on_it_and_saved(tmp_path: Path, folder: Path, bits: int, what: Lora | SoftPrompt) -> None:
    low = Backbone.from_pretrained(str(folder), base_bits=bits)
    before = {n: t.clone() for n, t in low.model.state_dict().items() if isinstance(t, torch.Tensor)}
    if bits == 8 and isinstance(what, Lora) and what.shape.use_dora:
        with pytest.raises(InputError, match="DoRA of peft does not compute on 8-bit weights"):
            what.fresh(low, EXAMPLES, seed=0)
        return
    config = TuneConfig(
        what=SoftPrompt(num_virtual_tokens=4) if isinstance(what, SoftPrompt) else what,
        loop=LoopConfig(epochs=4, learning_rate=0.02),
    )
    result = tune(low, EXAMPLES, config, heldout=EXAMPLES)
    start, end = (result.curve[i].heldout_loss for i in (0, result.best_epoch))
    assert start is not None and end is not None and end < start - 0.05
    now = low.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    result.adapter.save(tmp_path / "adapter", low.model)
    # It fits the whole model as well.
    load_adapter(tmp_path / "adapter", low.model)
    load_adapter(tmp_path / "adapter", Backbone.from_pretrained(str(folder)).model)
    with pytest.raises(InputError, match=r"low-bit|cannot be merged"):
        result.adapter.merge(low.model)


@needs_bitsandbytes
def test_loftq_makes_up_for_a_part_of_the_rounding(folder: Path) -> None:
    low = Backbone.from_pretrained(str(folder), base_bits=4)
    adapter = initial_lora(low, LoraShape(rank=8), "loftq", (), seed=0)
    name = "model.layers.0.mlp.up_proj"
    ((_, weight),) = original_weights(str(folder), [f"{name}.weight"])
    lost = weight - dequantised(low.model.get_submodule(name)).float()
    a, b = (adapter.params[f"base_model.model.{name}.lora_{x}.default.weight"] for x in "AB")
    # LoftQ, algorithm 1 with one step: what is left are the singular values behind the eighth.
    expected = torch.linalg.svdvals(lost)[8:].square().sum().sqrt()
    assert float((lost - 2.0 * b @ a).norm()) == pytest.approx(float(expected), rel=1e-3)


@needs_bitsandbytes
def test_what_needs_whole_weights_is_refused(folder: Path) -> None:
    low = Backbone.from_pretrained(str(folder), base_bits=4)
    with pytest.raises(InputError, match="stored in few bits"):
        SelectedParameters.of(low.model, all_names(low.model))
    with pytest.raises(InputError, match="cannot take a IA3 adapter out of a low-bit model"):
        Ia3().fresh(low, EXAMPLES, seed=0)
    with pytest.raises(InputError, match="init pissa reads whole weights"):
        initial_lora(low, LoraShape(), "pissa", (), seed=0)
    with pytest.raises(InputError, match="expected one of them"):
        Backbone.from_pretrained(str(folder), base_bits=4, device_map="auto")
    assert isinstance(SoftPrompt(num_virtual_tokens=2).fresh(low, EXAMPLES, seed=0), PeftAdapter)


NF4_LEVELS = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)


@needs_bitsandbytes
def test_four_bits_are_nf4(folder: Path) -> None:
    """The nearest of QLoRA's 16 levels (arXiv 2305.14314, appendix E), times the largest of a block of 64."""
    whole, low = Backbone.from_pretrained(str(folder)), Backbone.from_pretrained(str(folder), base_bits=4)
    name = "model.layers.1.mlp.down_proj"
    blocks = whole.model.get_parameter(f"{name}.weight").detach().reshape(-1, 64, 1)
    levels = torch.tensor(NF4_LEVELS)
    largest = blocks.abs().amax(1, keepdim=True)
    expected = levels[(blocks / largest - levels).abs().argmin(-1)] * largest[..., 0]
    found = dequantised(low.model.get_submodule(name)).reshape(-1, 64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@needs_bitsandbytes
def test_a_quantised_folder_can_be_the_base_of_low_bits(folder: Path, tmp_path: Path) -> None:
    """Its weights are rounded again, from the numbers that they stand for."""
    name = "model.layers.0.mlp.up_proj"
    model = Backbone.from_pretrained(str(folder)).model
    rng = np.random.default_rng(0)
    weight = PackedWeight(
        codes=rng.integers(0, 8, (128, 64), np.uint8),
        scales=np.full((128, 1), 2.0**-6, np.float32),
        zeros=np.full((128, 1), 4, np.uint8),
        bits=3,
        group_size=64,
    )
    rest = {key: tensor for key, tensor in model.state_dict().items() if key != f"{name}.weight"}
    shutil.copytree(folder, tmp_path / "packed")
    for file, data in packed_files({f"{name}.weight": weight}, method="rtn", whole=save(rest)).items():
        (tmp_path / "packed" / file).write_bytes(data)
    low = Backbone.from_pretrained(str(tmp_path / "packed"), base_bits=4)
    values = dequantised(low.model.get_submodule(name))
    numbers = torch.from_numpy(weight.dequantised())
    assert 0 < float((values - numbers).norm() / numbers.norm()) < 0.2
    whole = dict(original_weights(str(tmp_path / "packed"), [f"{name}.weight"]))
    assert torch.equal(whole[f"{name}.weight"], numbers)
