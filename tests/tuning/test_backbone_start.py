"""Side networks that start from pieces of the backbone: what is kept, and what the whole of it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.generation.protocols import Correction
from cotune.models.backbone import Backbone
from cotune.models.projections import Projections
from cotune.tuning.backbone_start import ladder_from_backbone, measure_importance
from cotune.tuning.feature_cache import FeatureCache, collect_features
from cotune.tuning.loop import LoopConfig
from cotune.tuning.side import AttentionShape, SideConfig, tune_side
from cotune.tuning.side_evaluation import nats_per_token

HIDDEN, HEADS, KV, HEAD_DIM, FF, VOCAB = 16, 4, 2, 8, 20, 40


def backbone_of(architecture: str, projections: Projections | None = None, **changes: Any) -> Backbone:
    config: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 3,
        "intermediate_size": FF,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **config))
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return Backbone.from_model(model, b"{}", projections=projections)


WHOLE = SideConfig(
    side_width=HEADS * HEAD_DIM, inner_width=FF, attention=AttentionShape(head_dim=HEAD_DIM, num_kv_heads=KV)
)
SMALL = SideConfig(
    side_width=6, inner_width=5, attention=AttentionShape(head_dim=4, num_kv_heads=1), init="backbone", seed=3
)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2"])
def test_with_nothing_pruned_a_block_is_the_backbones_layer(architecture: str, examples: list[EncodedExample]) -> None:
    raw = Projections.identity(tap_layers=(1, 2), hidden_size=32)
    changes: dict[str, Any] = {"sliding_window": None} if architecture == "mistral" else {}
    backbone = backbone_of(architecture, raw, hidden_size=32, **changes)
    for layer in backbone.model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            if part.bias is not None:
                part.bias.data.zero_()
    network = ladder_from_backbone(backbone, examples, WHOLE)
    assert network.config.rope_theta == 500.0
    with torch.no_grad():
        network.ladder.mix_gate.fill_(-100.0)  # h = u_1, the state after the second layer
    ids = torch.arange(3, 12)
    states, _ = backbone.read_states(ids.numpy())
    after = torch.from_numpy(states)[None]  # (1, seq, taps, hidden)
    model = backbone.model.model
    with torch.no_grad():
        positions = torch.arange(len(ids))[None]
        y = after[:, :, 1]
        mask = torch.full((1, 1, len(ids), len(ids)), -torch.inf).triu(1)
        expected = model.layers[1](
            y, attention_mask=mask, position_ids=positions, position_embeddings=model.rotary_emb(y, positions)
        )
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(network.ladder(after, positions), expected, rtol=1e-4, atol=1e-4)


def fisher(backbone: Backbone, examples: list[EncodedExample], name: str) -> torch.Tensor:
    """Squared gradients of each text's mean loss, by autograd on the whole model."""
    total = torch.zeros(())
    weight = dict(backbone.model.named_parameters())[name].requires_grad_()
    for example in examples:
        ids = torch.from_numpy(example.input_ids)[None]
        scores = backbone.model(ids).logits[0].log_softmax(-1)
        wanted = torch.arange(example.first_target, ids.shape[1])
        loss = -scores[wanted - 1, ids[0, wanted]].mean()
        total = total + torch.autograd.grad(loss, weight)[0].double().square()
    weight.requires_grad_(False)
    return total


def test_importance_is_that_of_squared_gradients(examples: list[EncodedExample]) -> None:
    backbone, texts = backbone_of("llama"), examples[:3]
    importance = measure_importance(backbone.model, texts, pad_token_id=0)[1]
    parts = {
        name: fisher(backbone, texts, f"model.layers.1.{place}.{name}_proj.weight")
        for place, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for name in names
    }
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-9)  # noqa: E731
    close(importance.query, parts["q"].sum(1).view(HEADS, HEAD_DIM))
    close(importance.key, parts["k"].sum(1).view(KV, HEAD_DIM))
    close(importance.value, parts["v"].sum(1).view(KV, HEAD_DIM))
    close(importance.output, parts["o"].sum(0).view(HEADS, HEAD_DIM))
    close(importance.inner, torch.stack([parts["gate"].sum(1), parts["up"].sum(1), parts["down"].sum(0)]))
    reads = sum(parts[name].sum(0) for name in ("q", "k", "v", "gate", "up"))
    close(importance.channels, reads + parts["o"].sum(1) + parts["down"].sum(1))
    head = 3  # its keys and values are those of kv head 1
    rows, kv = slice(24, 32), slice(8, 16)
    product = parts["q"][rows].sum() * parts["k"][kv].sum() * parts["v"][kv].sum() * parts["o"][:, rows].sum()
    close(importance.heads[head], product.log())
    assert not any(p.requires_grad or p.grad is not None for p in backbone.model.parameters())


def test_the_kept_pieces_are_the_most_important_ones(examples: list[EncodedExample]) -> None:
    backbone = backbone_of("llama")
    network = ladder_from_backbone(backbone, examples, SMALL)
    importance = measure_importance(backbone.model, examples, pad_token_id=0)
    layer, own, rungs = backbone.model.model.layers[1], importance[1], network.ladder
    channels = sum(one.channels for one in importance).topk(6).indices.sort().values  # type: ignore[union-attr]
    # side_width 6 and head_dim 4 make one head.
    head = int(own.heads.argmax())
    pairs = torch.tensor([0, 2, 4, 6])
    q = layer.self_attn.q_proj.weight.view(HEADS, HEAD_DIM, HIDDEN)[head]
    torch.testing.assert_close(rungs.query_weight[1], q[pairs][:, channels] * (16 / 6) ** 0.5)
    dims = (own.value[head // 2] * own.output[head]).topk(4).indices.sort().values
    o = layer.self_attn.o_proj.weight.view(HIDDEN, HEADS, HEAD_DIM)[:, head]
    states = np.concatenate([backbone.read_states(example.input_ids)[0] for example in examples])
    size = float(np.sqrt((states[:, 2].astype(np.float64) ** 2).mean(axis=1)).mean())
    torch.testing.assert_close(rungs.output_weight[1], o[channels][:, dims] * (32 / 4) ** 0.5 / size)
    inner = own.inner.prod(0).topk(5).indices.sort().values
    torch.testing.assert_close(rungs.up_weight[1], layer.mlp.up_proj.weight[inner][:, channels] * (16 / 6) ** 0.5)
    torch.testing.assert_close(rungs.down_weight[1], layer.mlp.down_proj.weight[channels][:, inner] * 2 / size)
    torch.testing.assert_close(rungs.ff_norm[1], layer.post_attention_layernorm.weight[channels])
    # C has orthonormal rows, but for rounding: its pseudo-inverse is its transpose.
    transposed = torch.from_numpy(backbone.projections.taps[2].T[channels.numpy()])
    torch.testing.assert_close(rungs.mix_weight[2], transposed, atol=2e-3, rtol=0)
    assert not rungs.mix_bias.any() and not network.head_weight.any() and not network.head_bias.any()
    # Positions turn as in the backbone: its wavelengths 500^(-2j/8) for j = 0 and 2.
    assert network.config.rope_theta ** (-2 * 1 / 4) == pytest.approx(500.0 ** (-2 * 2 / 8))


def test_keys_of_several_heads_are_their_mean(examples: list[EncodedExample]) -> None:
    backbone = backbone_of("llama", num_key_value_heads=HEADS)
    config = replace(SMALL, side_width=8, attention=AttentionShape(head_dim=4, num_kv_heads=1))
    network = ladder_from_backbone(backbone, examples, config)
    importance = measure_importance(backbone.model, examples, pad_token_id=0)
    heads = importance[0].heads.topk(2).indices
    channels = sum(one.channels for one in importance).topk(8).indices.sort().values  # type: ignore[union-attr]
    k = backbone.model.model.layers[0].self_attn.k_proj.weight.view(HEADS, HEAD_DIM, HIDDEN)[heads].mean(0)
    expected = k[torch.tensor([0, 2, 4, 6])][:, channels] * 2**0.5
    torch.testing.assert_close(network.ladder.key_weight[0], expected)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("family", ["parallel", "serial"])
def test_it_starts_as_the_base_model_and_learns(
    tmp_path: Any, examples: list[EncodedExample], architecture: str, family: str
) -> None:
    backbone = backbone_of(architecture)
    config = replace(SMALL, family=family, loop=LoopConfig(epochs=8, learning_rate=0.02), num_batch_positions=30)
    network = ladder_from_backbone(backbone, examples, config)
    cache = FeatureCache(tmp_path, backbone_digest="b", projections_digest="p")
    features = collect_features(cache, backbone, examples, VOCAB, prompt_window=config.prompt_window)
    basis = backbone.output_basis
    base = float((features.log_normalizer - features.target_logits).mean())
    start = np.log(VOCAB) if family == "serial" else base
    assert nats_per_token(features, network, basis, family) == pytest.approx(start, abs=1e-4)
    assert not basis.delta(Correction(codes=np.zeros(basis.dim, np.int8), scale=np.float16(0))).any()
    trained = tune_side(features, basis, config, network=network).network
    assert nats_per_token(features, trained, basis, family) < start - 0.3


def test_features_alone_are_refused(draw_world: Callable[..., Any], output_basis: Any) -> None:
    with pytest.raises(InputError, match="ladder_from_backbone"):
        tune_side(draw_world(60, 1).features(8), output_basis, SMALL)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"side_width": 17}, "side_width is 17, expected at most 16"),
        ({"inner_width": 21}, "inner_width is 21, expected at most 20"),
        ({"side_width": 16, "attention": AttentionShape(head_dim=2)}, "side_width // head_dim is 8"),
        ({"attention": AttentionShape(head_dim=6)}, "head_dim is 6, expected a divisor of the backbone's, 8"),
    ],
)
def test_shapes_that_the_backbone_cannot_fill_are_refused(
    examples: list[EncodedExample], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        ladder_from_backbone(backbone_of("llama"), examples, replace(SMALL, **changes))


def test_other_refusals(backbone: Backbone, examples: list[EncodedExample]) -> None:
    with pytest.raises(InputError, match="no examples"):
        ladder_from_backbone(backbone_of("llama"), [], SMALL)
    with pytest.raises(InputError, match="without attention"):
        SideConfig(init="backbone")
    with pytest.raises(InputError, match="init is 'zeros'"):
        SideConfig(init="zeros")
    if backbone.spec.architecture == "GPT2LMHeadModel":
        with pytest.raises(InputError, match="cannot start from GPT2LMHeadModel"):
            ladder_from_backbone(backbone, examples, SMALL)
    with pytest.raises(InputError, match="cannot start from Gemma2ForCausalLM"):
        ladder_from_backbone(backbone_of("gemma2"), examples, SMALL)
