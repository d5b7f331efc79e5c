"""A narrower residual stream: rotation, slice and norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressible import VOCAB, tiny_model
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from cotune.compression.hidden_size import HiddenSize, fold_norms, principal_axes, slice_hidden
from cotune.errors import InputError

Ids = NDArray[np.int64]


@pytest.fixture
def input_ids() -> Ids:
    return np.random.default_rng(0).integers(0, VOCAB, (5, 9))


def scaled_model(architecture: str = "llama", **changes: Any) -> PreTrainedModel:
    """With norms that scale every channel in its own way, and biases where there are some."""
    model, generator = tiny_model(architecture, **changes), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(generator=generator)
    return model


def logits(model: PreTrainedModel, ids: Ids) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.from_numpy(ids)).logits
    return out


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {}),
    ],
)
def test_rotation_alone_leaves_the_logits(architecture: str, changes: dict[str, Any], input_ids: Ids) -> None:
    model = scaled_model(architecture, **changes)
    before, weight = logits(model, input_ids), model.model.layers[0].mlp.up_proj.weight.clone()
    slice_hidden(model, input_ids, 32, batch_size=2)
    torch.testing.assert_close(logits(model, input_ids), before, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(model.model.layers[0].mlp.up_proj.weight, weight, atol=0.1)
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    norms = [parameter for name, parameter in model.named_parameters() if name.endswith("layernorm.weight")]
    assert len(norms) == 6 and all(torch.allclose(norm, torch.ones(32)) for norm in norms)


def test_folding_alone_leaves_the_logits(input_ids: Ids) -> None:
    model = scaled_model(tie_word_embeddings=True)
    before, embedding = logits(model, input_ids), model.model.embed_tokens.weight.clone()
    fold_norms(model)
    torch.testing.assert_close(logits(model, input_ids), before, rtol=1e-4, atol=2e-4)
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_a_stream_of_few_dimensions_loses_nothing(input_ids: Ids) -> None:
    """All that is written lies in 12 of 32 dimensions: what is cut off is zero, and the norms must be mended."""
    model = scaled_model()
    basis = torch.linalg.qr(torch.randn(32, 12, generator=torch.Generator().manual_seed(2))).Q
    inside = basis @ basis.T
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ inside * 0.01)
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(inside @ writer.weight)
        # The first norm sees numbers whose squares are about as large as eps.
        assert float(model.model.embed_tokens.weight.square().mean()) < 1e-4
        for norm in (module for name, module in model.named_modules() if name.endswith("norm")):
            norm.variance_epsilon = 1e-5
        model.config.rms_norm_eps = 1e-5
    before = logits(model, input_ids)
    slice_hidden(model, input_ids, 12)
    torch.testing.assert_close(logits(model, input_ids), before, rtol=1e-3, atol=1e-3)
    config = model.config
    assert (config.hidden_size, config.head_dim, config.num_attention_heads) == (12, 8, 4)
    assert config.rms_norm_eps == pytest.approx(1e-5 * 32 / 12)
    assert model.model.norm.variance_epsilon == config.rms_norm_eps
    assert model.model.embed_tokens.embedding_dim == model.lm_head.in_features == 12


def test_a_head_keeps_its_dimension_where_the_config_did_not_say_it(input_ids: Ids) -> None:
    model = tiny_model("qwen2", head_dim=None)
    slice_hidden(model, input_ids, 16)
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config.to_dict()))
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again.eval(), input_ids), logits(model, input_ids))


def test_axes_and_norms_by_their_formulas(input_ids: Ids) -> None:
    """Against a model of full width that writes nothing outside the strongest axes, which NumPy finds."""
    model, dense = scaled_model(), scaled_model()
    slice_hidden(model, input_ids, 20)
    fold_norms(dense)
    norms = [norm for layer in dense.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(dense.model.norm)
    seen: dict[nn.Module, Tensor] = {}
    for norm in norms:
        norm.register_forward_hook(lambda norm, _, output: seen.update({norm: output.reshape(-1, 32).double()}))
    logits(dense, input_ids)
    outputs = dict(seen)
    stacked = np.concatenate([outputs[norm].numpy() for norm in norms])
    values, vectors = np.linalg.eigh(stacked.T @ stacked)
    strongest = torch.from_numpy(vectors[:, np.argsort(values)[::-1][:20]].copy())
    inside = strongest @ strongest.T
    with torch.no_grad():
        dense.model.embed_tokens.weight.copy_(dense.model.embed_tokens.weight.double() @ inside)
        for layer in dense.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(inside @ writer.weight.double())
        lost = 1 - (outputs[norms[0]] @ strongest).square().sum() / outputs[norms[0]].square().sum()
        assert 0.01 < float(lost) < 0.9
    torch.testing.assert_close(logits(model, input_ids), logits(dense, input_ids), rtol=1e-3, atol=1e-3)


def test_axes_are_the_same_each_time() -> None:
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).double()
    gram = rows.T @ rows
    axes = principal_axes(gram)
    torch.testing.assert_close(axes.T @ axes, torch.eye(6).double())
    powers = (axes.T @ gram @ axes).diagonal()
    assert powers.tolist() == sorted(powers.tolist(), reverse=True)
    assert bool((axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all())


def test_bad_input_is_one_clear_sentence(input_ids: Ids) -> None:
    model = tiny_model()
    for num in (0, 30, 36):
        with pytest.raises(InputError, match=f"to be {num}, expected a multiple of 4, the number of heads, up to 32"):
            slice_hidden(model, input_ids, num)
    other = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=VOCAB)).eval()
    with pytest.raises(InputError, match="GPT2LMHeadModel cannot be made narrower"):
        slice_hidden(other, input_ids, 4)
    assert other.lm_head.weight is other.transformer.wte.weight
    with pytest.raises(InputError, match="batch_size is 0"):
        slice_hidden(model, input_ids, 16, batch_size=0)
    assert HiddenSize(multiple=6).prune(model, "0.5", input_ids) == {"hidden_size": 12}
    assert model.config.hidden_size == 12
