from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cotune.data.batches import EncodedExample, TokenBatch, pad_batch
from cotune.errors import InputError
from cotune.generation.output_basis import OutputBasis
from cotune.generation.side_state import first_position
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone
from cotune.models.bottleneck import BottleneckAdapter
from cotune.models.side_network import SideNetwork
from cotune.tuning.attached import Attachable
from cotune.tuning.example_gradients import AttachedGradients, SideGradients, TextGradients
from cotune.tuning.feature_set import FeatureSet
from cotune.tuning.sequences import SequenceData

pytest.importorskip("opacus", reason="gradients of single texts come from Opacus")


@dataclass(frozen=True)
class Dora:
    """DoRA: its magnitudes are no layer that Opacus knows."""

    params: dict[str, Tensor]

    @contextmanager
    def attach(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=2,
            use_dora=True,
            target_modules=["q_proj", "c_attn"],
            fan_in_fan_out="GPT2" in type(model).__name__,
        )
        wrapped = peft.get_peft_model(model, config)
        try:
            yield wrapped.eval()
        finally:
            wrapped.unload()
            model.requires_grad_(False)


def moved(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Away from the start, where half of LoRA's gradients are zero."""
    generator = torch.Generator().manual_seed(3)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in params.items()}


def by_hand(model: PreTrainedModel, params: dict[str, Tensor], example: EncodedExample) -> dict[str, Tensor]:
    """One text, alone and without padding, from all logits, by ordinary back-propagation."""
    own = {name: model.get_parameter(name) for name in params}
    with torch.no_grad():
        for name, value in params.items():
            own[name].copy_(value)
    ids = torch.from_numpy(example.input_ids)[None]
    labels = ids.clone()
    labels[0, : example.first_target] = -100
    loss = model(input_ids=ids, labels=labels).loss  # transformers' own mean over target tokens
    grads = torch.autograd.grad(loss, list(own.values()))
    return dict(zip(own, grads, strict=True))


def check_against_by_hand(
    model: PreTrainedModel, params: dict[str, Tensor], found: TextGradients, examples: list[EncodedExample]
) -> None:
    for row, example in enumerate(examples):
        for name, expected in by_hand(model, params, example).items():
            torch.testing.assert_close(found.grads[name][row], expected, rtol=1e-3, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("kind", ["lora", "bottleneck", "dora"])
def test_gradients_agree_with_one_text_at_a_time(backbone: Backbone, examples: list[EncodedExample], kind: str) -> None:
    fresh: Attachable
    if kind == "lora":
        fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=2))
    elif kind == "bottleneck":
        fresh = BottleneckAdapter.fresh(backbone.model, 3)
    else:
        with Dora({}).attach(backbone.model) as model:
            fresh = Dora({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    params = moved(dict(fresh.params))
    with fresh.attach(backbone.model) as model:
        source = AttachedGradients(model)
        assert source.uses_hooks == (kind != "dora")
        found = source.gradients(params, pad_batch(examples, 0))
        check_against_by_hand(model, params, found, examples)
        assert len(found.nats) == sum(len(each.input_ids) - 3 for each in examples)
        torch.testing.assert_close(source.nats(params, pad_batch(examples, 0)), found.nats)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_layer_read_past_its_hooks_is_noticed(
    backbone: Backbone, examples: list[EncodedExample], share: float
) -> None:
    """All of it, as gradient checkpointing does, or a part, as where a second module uses the same weight."""
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=2))
    params = moved(fresh.params)
    with fresh.attach(backbone.model) as model:
        layer = next(m for name, m in model.named_modules() if name.endswith("lora_B.default"))
        seen = type(layer)

        def past_hooks(self: torch.nn.Linear, x: Tensor) -> Tensor:
            unseen = torch.nn.functional.linear(x, self.weight)
            return share * unseen + (0 if share == 1.0 else (1 - share) * torch.nn.Module.__call__(self, x))

        layer.__class__ = type("Unhooked", (seen,), {"__call__": past_hooks})
        source = AttachedGradients(model)
        assert not source.uses_hooks  # an unknown layer
        source.uses_hooks = True  # try all the same
        with pytest.MonkeyPatch.context() as patch:
            from opacus.grad_sample import GradSampleModule

            patch.setitem(GradSampleModule.GRAD_SAMPLERS, type(layer), GradSampleModule.GRAD_SAMPLERS[seen])
            found = source.gradients(params, pad_batch(examples, 0))
        assert not source.uses_hooks
        check_against_by_hand(model, params, found, examples)
        layer.__class__ = seen


def test_a_tensor_that_two_layers_share_goes_one_by_one(backbone: Backbone) -> None:
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=2))
    with fresh.attach(backbone.model) as model:
        layers = [m for name, m in model.named_modules() if name.endswith("lora_A.default")]
        layers[1].weight = layers[0].weight
        assert not AttachedGradients(model).uses_hooks


def hooks_of(model: PreTrainedModel) -> list[Any]:
    return [hook for m in model.modules() for hooks in (m._forward_hooks, m._backward_hooks) for hook in hooks.values()]


def test_nothing_is_left_on_the_model(backbone: Backbone, examples: list[EncodedExample]) -> None:
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=2))
    with fresh.attach(backbone.model) as model:
        before = hooks_of(model)
        AttachedGradients(model).gradients(fresh.params, pad_batch(examples, 0))
        left: list[Any] = [*model.modules(), *model.parameters()]
        assert not {"activations", "grad_sample", "_forward_counter", "autograd_grad_sample_hooks"} & {
            name for each in left for name in vars(each)
        }
        assert not any(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert hooks_of(model) == before


def test_a_text_without_targets(backbone: Backbone, examples: list[EncodedExample]) -> None:
    batch = pad_batch(examples, 0)
    batch = TokenBatch(batch.input_ids, batch.attention_mask, np.full_like(batch.labels, -100))
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=2))
    with (
        fresh.attach(backbone.model) as model,
        pytest.raises(InputError, match="a text has no target tokens"),
    ):
        AttachedGradients(model).gradients(fresh.params, batch)


def side_texts(network: SideNetwork, backbone: Backbone) -> SequenceData:
    rng = np.random.default_rng(0)
    texts = [(rng.integers(2, 300, length), first) for length, first in ((12, 3), (20, 8), (9, 4), (15, 14))]
    starts = [first_position(first, network.prompt_window) for _, first in texts]
    found = [backbone.features(ids, start, 16) for (ids, _), start in zip(texts, starts, strict=True)]
    features = FeatureSet.for_lengths(
        [len(ids) - first for ids, first in texts],
        found[0],
        leads=[first - start for (_, first), start in zip(texts, starts, strict=True)],
        first_targets=[first for _, first in texts],
    )
    for index, each in enumerate(found):
        features.put(index, each)
    return SequenceData(features, backbone.spec.vocab_size, "parallel")


@pytest.mark.parametrize("make", [tiny_models.untrained_ladder, tiny_models.untrained_attention])
def test_side_gradients_agree_with_one_text_at_a_time(make: Callable[[Backbone], SideNetwork]) -> None:
    tiny = tiny_models.tiny_backbone("llama")
    network = make(tiny)
    torch.nn.init.normal_(network.head_weight, generator=torch.Generator().manual_seed(1))
    data, params = side_texts(network, tiny), dict(network.named_parameters())
    source = SideGradients(network, torch.from_numpy(tiny.output_basis.matrix()))
    found = source.gradients(params, data.take(np.arange(4)))
    nats = []
    for text in range(4):
        # The same loss through `SideTuner`'s own chain, with a gradient, one text alone.
        one = SideGradients.nats.__wrapped__(source, params, data.take(np.array([text])))
        nats.append(one.detach())
        slopes = torch.autograd.grad(one.mean(), list(params.values()))
        for name, slope in zip(params, slopes, strict=True):
            torch.testing.assert_close(found.grads[name][text], slope, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.nats, torch.cat(nats))


def test_side_dropout_is_refused(output_basis: OutputBasis) -> None:
    from cotune.models.tap_ladder import TapLadder, TapLadderConfig

    network = TapLadder(TapLadderConfig(num_taps=2, tap_dim=4, basis_dim=12, dropout=0.1))
    with pytest.raises(InputError, match=r"dropout is 0\.1, expected 0"):
        SideGradients(network, torch.from_numpy(output_basis.matrix()))


def test_without_opacus(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=2))
    with (
        fresh.attach(backbone.model) as model,
        pytest.raises(InputError, match=r"pip install 'cotune\[private\]'"),
    ):
        AttachedGradients(model)
