from __future__ import annotations

import numpy as np
import pytest
import torch
from compressible import VOCAB, tiny_model
from tiny_models import probe_ids, tiny_backbone
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from cotune.compression.fewer_layers import drop_blocks, spread_layers, with_fewer_layers
from cotune.errors import InputError
from cotune.models.anatomy import decoder_layers
from cotune.models.backbone import Backbone


def logits_of(backbone: Backbone) -> torch.Tensor:
    return backbone.target_logits([(probe_ids(backbone, 12), 1)])


def test_the_rest_is_a_model_of_so_many_blocks() -> None:
    model, ids = tiny_model(), torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (5, 9)))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drop_blocks(model, [0, 1])
    fresh = tiny_model(num_hidden_layers=1)
    names = {name: name.replace("layers.0.", "layers.2.") for name in fresh.state_dict()}
    fresh.load_state_dict({name: tensors[old] for name, old in names.items()})
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, fresh(ids).logits)
        # The cache counts blocks by what they think that they are.
        first = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, logits[:, 5:], rtol=1e-4, atol=1e-4)


def test_each_block_keeps_its_kind_of_attention() -> None:
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    drop_blocks(model, [1])
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config.to_dict()))
    again.load_state_dict(model.state_dict())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_other_architectures_lose_blocks_too() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=3, n_head=2, n_positions=16, vocab_size=VOCAB))
    drop_blocks(model, [2])
    assert model.config.n_layer == 2 and [block.attn.layer_idx for block in model.transformer.h] == [0, 1]


@pytest.mark.parametrize("blocks", [[], [0, 1, 2], [3], [-1]])
def test_blocks_that_cannot_go_are_refused(blocks: list[int]) -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="expected some but not all of 0 to 2"):
        drop_blocks(model, blocks)
    assert len(model.model.layers) == 3


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_student_is_the_teacher_without_some_layers(architecture: str) -> None:
    teacher, cut = tiny_backbone(architecture), tiny_backbone(architecture)
    before = torch.get_rng_state()
    everything, student = with_fewer_layers(teacher, (0, 1, 2)), with_fewer_layers(teacher, (0, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(logits_of(everything), logits_of(teacher))
    # The layer in the middle passes the residual stream on as it is.
    decoder_layers(cut.model)[1].register_forward_hook(
        lambda layer, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
    )
    torch.testing.assert_close(logits_of(student), logits_of(cut), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits_of(student), logits_of(teacher), atol=0.1)
    assert (student.spec.num_layers, student.model.config.num_hidden_layers) == (2, 2)
    assert student.spec.tokenizer_digest == teacher.spec.tokenizer_digest
    assert student.spec.eos_token_ids == teacher.spec.eos_token_ids
    assert student.spec.num_parameters < teacher.spec.num_parameters
    generated = student.cursor().extend(np.array([3, 4, 5]))
    torch.testing.assert_close(
        torch.from_numpy(generated.logits), student.model(torch.tensor([[3, 4, 5]])).logits[0, -1], atol=1e-4, rtol=1e-4
    )


def test_nothing_is_shared() -> None:
    teacher = tiny_backbone("llama")
    expected = logits_of(teacher)
    student = with_fewer_layers(teacher, [1])
    # Nor is the student watched by the teacher's backbone beside its own.
    (layer,) = decoder_layers(student.model)
    assert [len(layer._forward_pre_hooks), len(layer._forward_hooks)] == [1, 1]
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(teacher), expected)


@pytest.mark.parametrize("kept", [[], [3], [-1, 0], [1, 0], [1, 1]])
def test_layers_that_are_none_are_refused(kept: list[int]) -> None:
    with pytest.raises(InputError, match=r"kept is .* some of 0 to 2"):
        with_fewer_layers(tiny_backbone("llama"), kept)


def test_layers_are_spread_evenly() -> None:
    assert [spread_layers(6, num) for num in (1, 2, 3, 6)] == [(0,), (0, 5), (0, 2, 5), (0, 1, 2, 3, 4, 5)]
    for num_layers in range(1, 30):
        for num_kept in range(1, num_layers + 1):
            kept = spread_layers(num_layers, num_kept)
            assert len(set(kept)) == num_kept and list(kept) == sorted(kept) and kept[-1] < num_layers
    for num_kept in (0, 7):
        with pytest.raises(InputError, match="expected 1 to 6"):
            spread_layers(6, num_kept)
