from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cotune.data.batches import EncodedExample, pad_batch
from cotune.errors import InputError
from cotune.models.adapter_folder import load_adapter
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone
from cotune.models.peft_adapter import PeftAdapter
from cotune.models.residual_lora import ResidualLora
from cotune.tuning import lora_init
from cotune.tuning.answer_loss import answer_nats
from cotune.tuning.loop import LoopConfig
from cotune.tuning.lora import Lora
from cotune.tuning.lora_init import INITS, initial_lora
from cotune.tuning.prompted_nats import prompted_nats
from cotune.tuning.tune import TuneConfig, tune

SHAPE = LoraShape(rank=4)
ON_WHOLE_WEIGHTS = [name for name in INITS if name != "loftq"]


def is_possible(name: str, backbone: Backbone) -> bool:
    return not (name == "olora" and backbone.spec.architecture.startswith("GPT2"))


def parts(params: dict[str, torch.Tensor], letter: str) -> list[torch.Tensor]:
    return [tensor for name, tensor in params.items() if f".lora_{letter}." in name]


@pytest.mark.parametrize("name", ON_WHOLE_WEIGHTS)
def test_it_starts_as_the_base_model_and_leaves_it_alone(
    backbone: Backbone, examples: list[EncodedExample], name: str
) -> None:
    model = backbone.model
    own = {n: (id(p), p.data_ptr(), p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    inside = {n: (id(m), set(m.__dict__), m.training, len(m._forward_hooks)) for n, m in model.named_modules()}
    random_state = torch.get_rng_state()
    batch = pad_batch(examples, 0)
    base = answer_nats(model, model.get_output_embeddings(), dict(model.named_parameters()), batch)
    if not is_possible(name, backbone):
        with pytest.raises(InputError, match="as GPT-2 has them"):
            initial_lora(backbone, SHAPE, name, examples, seed=0)
    else:
        adapter = initial_lora(backbone, SHAPE, name, examples, seed=0)
        with adapter.attach(model) as wrapped:
            nats = answer_nats(wrapped, wrapped.get_output_embeddings(), adapter.params, batch)
        torch.testing.assert_close(nats, base, atol=1e-4, rtol=1e-4)
        again = initial_lora(backbone, SHAPE, name, examples, seed=0)
        assert all(torch.equal(adapter.params[n], again.params[n]) for n in adapter.params)
        assert isinstance(adapter, ResidualLora) == INITS[name].moves_weights
    for n, p in model.named_parameters():
        assert (id(p), p.data_ptr(), p.requires_grad) == own[n][:3] and torch.equal(p, own[n][3]), n
        assert p.grad is None
    for n, m in model.named_modules():
        assert (id(m), set(m.__dict__), m.training, len(m._forward_hooks)) == inside[n]
    assert torch.equal(torch.get_rng_state(), random_state)


# Of GPT-2, whose weights are transposed, one that moves none and one that does; the test above has all.
@pytest.mark.parametrize(
    ("backbone", "name"),
    [*(("llama", name) for name in ON_WHOLE_WEIGHTS), ("gpt2", "orthonormal"), ("gpt2", "pissa")],
    indirect=["backbone"],
)
def test_what_is_trained_from_it_is_an_ordinary_adapter_of_the_base(
    tmp_path: Path, backbone: Backbone, examples: list[EncodedExample], name: str
) -> None:
    before = {n: tensor.clone() for n, tensor in backbone.model.state_dict().items()}
    loop = LoopConfig(epochs=2, learning_rate=0.02)
    config = TuneConfig(what=Lora(shape=SHAPE, init=name), loop=loop, num_batch_sequences=4)
    result = tune(backbone, examples, config, heldout=examples)
    start, end = (result.curve[i].heldout_loss for i in (0, result.best_epoch))
    assert start is not None and end is not None and end < start - 0.05
    result.adapter.save(tmp_path / "adapter", backbone.model)
    loaded = load_adapter(tmp_path / "adapter", backbone.model)
    with loaded.attach(backbone.model) as model:
        assert prompted_nats(model, examples).mean() == pytest.approx(end, abs=2e-4)
    with result.adapter.merge(backbone.model).attach(backbone.model) as model:
        assert prompted_nats(model, examples).mean() == pytest.approx(end, abs=2e-4)
    assert all(torch.equal(tensor, before[n]) for n, tensor in backbone.model.state_dict().items())


def test_pissa_takes_the_largest_singular_values_out(backbone: Backbone) -> None:
    """PiSSA, equations 2 to 4, for each adapted layer: s B0 A0 is the best approximation of rank r."""
    lora = initial_lora(backbone, SHAPE, "pissa", (), seed=0)
    assert isinstance(lora, ResidualLora)
    weights = dict(backbone.model.named_parameters())
    is_transposed = backbone.spec.architecture.startswith("GPT2")
    for name, residual in lora.residual.params.items():
        values = torch.linalg.svdvals(weights[name])
        torch.testing.assert_close(torch.linalg.svdvals(residual)[: len(values) - 4], values[4:], atol=1e-4, rtol=1e-3)
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (lora.start[f"{prefix}.lora_{x}.default.weight"] for x in "AB")
        moved = SHAPE.scale * b @ a
        torch.testing.assert_close(
            residual + (moved.T if is_transposed else moved), weights[name], atol=1e-5, rtol=1e-4
        )


def test_orthonormal_rows(backbone: Backbone) -> None:
    lora = initial_lora(backbone, SHAPE, "orthonormal", (), seed=0)
    for a in parts(lora.params, "A"):
        torch.testing.assert_close(a @ a.T, torch.eye(4), atol=1e-5, rtol=1e-5)
    assert not any(bool(b.any()) for b in parts(lora.params, "B"))
    other = initial_lora(backbone, SHAPE, "orthonormal", (), seed=1)
    assert not torch.equal(parts(other.params, "A")[0], parts(lora.params, "A")[0])


def test_eva_finds_the_directions_of_the_activations(backbone: Backbone) -> None:
    """A's rows are the largest principal components of what enters the layer; here of one batch, by hand."""
    example = EncodedExample(torch.randint(3, 40, (30,), generator=torch.Generator().manual_seed(0)).numpy(), 3)
    layer = "model.layers.1.mlp.down_proj" if hasattr(backbone.model, "model") else "transformer.h.1.mlp.c_proj"
    seen: list[torch.Tensor] = []
    handle = backbone.model.get_submodule(layer).register_forward_hook(lambda m, args, out: seen.append(args[0][0]))
    with torch.no_grad():
        backbone.model(input_ids=torch.from_numpy(example.input_ids)[None])
    handle.remove()
    expected = torch.linalg.svd(seen[0] - seen[0].mean(dim=0), full_matrices=False)[2][:4]
    lora = initial_lora(backbone, SHAPE, "eva", [example], seed=0)
    a = lora.params[f"base_model.model.{layer}.lora_A.default.weight"]
    # The same vectors up to their signs.
    torch.testing.assert_close((a @ expected.T).abs(), torch.eye(4), atol=0.02, rtol=0)


def test_eva_that_finds_nothing_ends(
    backbone: Backbone, examples: list[EncodedExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_init, "MAX_EVA_PASSES", 1)
    with pytest.raises(InputError, match="no stable directions in 1 passes"):
        initial_lora(backbone, SHAPE, "eva", examples, seed=0)
    short = [EncodedExample(examples[0].input_ids[:3], 1)]
    with pytest.raises(InputError, match="at least 4 tokens in each batch"):
        initial_lora(backbone, SHAPE, "eva", short, seed=0)


def test_mica_trains_a_alone(backbone: Backbone, examples: list[EncodedExample]) -> None:
    adapter = initial_lora(backbone, SHAPE, "mica", (), seed=0)
    assert isinstance(adapter, PeftAdapter)
    assert adapter.params and not parts(adapter.params, "B")
    full = LoraAdapter.fresh(backbone.model, SHAPE)
    assert adapter.num_parameters == sum(tensor.numel() for tensor in parts(full.params, "A"))


def test_what_cannot_be_is_refused(backbone: Backbone, examples: list[EncodedExample]) -> None:
    with pytest.raises(InputError, match="init is 'magic', expected one of default"):
        initial_lora(backbone, SHAPE, "magic", examples, seed=0)
    for name in ("eva", "corda", "lora_ga"):
        with pytest.raises(InputError, match=f"init {name} looks at training texts"):
            initial_lora(backbone, SHAPE, name, (), seed=0)
    for name in ("pissa", "mica"):
        with pytest.raises(InputError, match="does not go with DoRA"):
            initial_lora(backbone, replace(SHAPE, use_dora=True), name, examples, seed=0)
    for name, rank in (("pissa", 17), ("eva", 17), ("lora_ga", 9)):
        with pytest.raises(InputError, match=rf"rank is {rank}, expected at most .* for init {name}"):
            initial_lora(backbone, LoraShape(rank=rank), name, examples, seed=0)
    with pytest.raises(InputError, match="it has whole weights"):
        initial_lora(backbone, SHAPE, "loftq", examples, seed=0)
    with pytest.raises(InputError, match="LoRA rank to be even"):
        initial_lora(backbone, LoraShape(rank=3), "orthogonal", examples, seed=0)


def test_a_failure_in_the_middle_leaves_the_model_as_it_was(backbone: Backbone, examples: list[EncodedExample]) -> None:
    norm = next(module for module in backbone.model.modules() if "norm" in type(module).__name__.lower())
    handle = norm.register_forward_hook(lambda module, args, output: output * float("nan"))
    before = {n: (p.data_ptr(), p.requires_grad) for n, p in backbone.model.named_parameters()}
    hooks = {n: (len(m._forward_hooks), set(m.__dict__)) for n, m in backbone.model.named_modules()}
    try:
        with pytest.raises(InputError, match="init corda failed"):
            initial_lora(backbone, SHAPE, "corda", examples, seed=0)
        assert {n: (len(m._forward_hooks), set(m.__dict__)) for n, m in backbone.model.named_modules()} == hooks
    finally:
        handle.remove()
    assert {n: (p.data_ptr(), p.requires_grad) for n, p in backbone.model.named_parameters()} == before
