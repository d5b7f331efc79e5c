"""AWQ against NumPy and by hand; scales move between layers and leave what a block computes alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressible import correlated_layer, tiny_model
from rounding import Matrix, nearest
from torch import Tensor, nn
from transformers import PreTrainedModel

from cotune.compression import awq
from cotune.compression.awq import Awq, InputStatistics, channel_scales
from cotune.compression.calibration import LayerProgress, LayerStatistics, reconstruction_error
from cotune.compression.grid import Grid
from cotune.compression.round_to_nearest import round_to_nearest
from cotune.errors import InputError

IDS = np.random.default_rng(0).integers(0, 50, (5, 12))


def uneven_model() -> PreTrainedModel:
    """Some channels are much larger than others, as in real models."""
    model = tiny_model(num_hidden_layers=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.copy_(torch.randn(len(parameter), generator=generator).exp())
    return model


def inputs_of(model: PreTrainedModel, name: str) -> Matrix:
    """What a layer of the whole model reads, (rows, in)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(torch.from_numpy(IDS))
    handle.remove()
    return seen[0].flatten(0, 1).double().numpy()


def searched(weights: list[Matrix], inputs: Matrix, bits: int, size: int, num_alphas: int) -> Matrix:
    """Equations 4 and 5 of the paper with the inputs themselves."""
    errors: dict[int, tuple[float, Matrix]] = {}
    for step in range(num_alphas):
        scales = np.abs(inputs).mean(axis=0) ** (step / num_alphas)
        scales = scales / np.sqrt(scales.max() * scales.min())
        error = sum(
            float(np.square((inputs / scales) @ nearest(weight * scales, bits, size)[1].T - inputs @ weight.T).sum())
            for weight in weights
        )
        errors[step] = (error, scales)
    return min(errors.values(), key=lambda found: found[0])[1]


def test_a_block_s_first_group_is_scaled_and_rounded_as_in_the_paper() -> None:
    model, whole = uneven_model(), uneven_model()
    packed = Awq(max_clip=0, num_alphas=5).quantise_linears(model, IDS, Grid(bits=3, group_size=None))
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    weights = [whole.get_submodule(name).weight.detach().double().numpy() for name in names]
    scales = searched(weights, inputs_of(whole, names[0]), 3, 32, num_alphas=5)
    assert scales.std() > 0.1, "round-to-nearest was best, so nothing is tested"
    norm, before = (each.model.layers[0].input_layernorm.weight.detach().numpy() for each in (model, whole))
    np.testing.assert_allclose(norm, before / scales, rtol=1e-5)
    for name, weight in zip(names, weights, strict=True):
        scaled = (weight * scales).astype(np.float32).astype(np.float64)
        values = nearest(scaled, 3, 32)[1]
        np.testing.assert_allclose(packed[name].dequantised(), values, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(model.get_submodule(name).weight.detach().numpy(), packed[name].dequantised())


def test_scales_by_hand() -> None:
    """Mean sizes 1 and 16 to the power 1/2 are 1 and 4; their product is made 1."""
    assert channel_scales(torch.tensor([1.0, 16.0]).double(), 0.5).tolist() == [0.5, 2.0]
    assert channel_scales(torch.tensor([1.0, 16.0]).double(), 0.0).tolist() == [1.0, 1.0]
    # A channel that is never read is scaled down no further than to 1e-4 of the largest.
    scales = channel_scales(torch.tensor([0.0, 1.0]).double(), 0.5)
    assert float(scales[1] / scales[0]) == pytest.approx(1e4)


def test_a_search_by_hand() -> None:
    """(1.5, 0.625, 7) is rounded with steps of 1 to (2, 1, 7).

    Channel two is read 16 times as large as the others. With alpha = 1/2 it becomes 2.5 beside 1.5 and 7, in other
    words four times as fine: it is rounded to 2 or 0.5, which loses 0.125 in place of 0.375.
    """
    inputs = torch.diag(torch.tensor([1.0, 16.0, 1.0]))
    statistics = LayerStatistics.of_inputs(inputs)
    of_group = InputStatistics(gram=statistics.gram, mean_size=torch.tensor([1.0, 16.0, 1.0]).double())
    weight = torch.tensor([[1.5, 0.625, 7.0]])
    grid = Grid(bits=3, group_size=None)
    scales = Awq(num_alphas=2).search([weight], of_group, grid)
    np.testing.assert_allclose((scales / scales[0]).numpy(), [1, 4, 1])
    # One value of alpha is round-to-nearest.
    assert Awq(num_alphas=1).search([weight], of_group, grid).tolist() == [1.0, 1.0, 1.0]


def test_a_search_never_loses_more_than_rounding() -> None:
    for seed in range(4):
        weight, statistics = correlated_layer(seed, num_inputs=48)
        sizes = (statistics.squared_norms / statistics.num_rows).sqrt()
        grid = Grid(bits=3, group_size=32)
        scales = Awq().search([weight], InputStatistics(gram=statistics.gram, mean_size=sizes), grid)
        ours = grid.rounded(weight.double() * scales) / scales
        rounded = reconstruction_error(weight, grid.rounded(weight), statistics.gram)
        assert reconstruction_error(weight, ours, statistics.gram) <= rounded
        assert scales.std() > 0


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_clipping_is_the_best_range_of_each_group(is_symmetric: bool) -> None:
    weight, statistics = correlated_layer(3, num_outputs=4, num_inputs=40)
    grid = Grid(bits=3, group_size=32, is_symmetric=is_symmetric)
    packed = Awq().quantise_layer(weight, statistics, grid)
    for row in range(4):
        for columns in (slice(0, 32), slice(32, 40)):
            own = weight[row : row + 1, columns].double()
            gram = statistics.gram[columns, columns]
            alone = Grid(bits=3, group_size=None, is_symmetric=is_symmetric)
            losses = []
            for cut in (0.05 * step for step in range(11)):
                scales, zeros = alone.fit(own, shrink=1 - cut)
                lost = own - scales * (alone.codes(own, scales, zeros) - zeros)
                losses.append(float(lost @ gram @ lost.T))
            lost = own - torch.from_numpy(packed.dequantised())[row : row + 1, columns]
            assert float(lost @ gram @ lost.T) == pytest.approx(min(losses), rel=1e-6)
            assert min(losses) <= losses[0]
    whole = Awq(max_clip=0).quantise_layer(weight, statistics, grid)
    np.testing.assert_array_equal(whole.codes, round_to_nearest(weight, grid).codes)
    assert not np.array_equal(packed.scales, whole.scales)
    unclipped = Awq().quantise_layer(weight, statistics, grid, clips=False)
    np.testing.assert_array_equal(unclipped.codes, whole.codes)


INPUT, UP, VALUE = "input_layernorm", "mlp.up_proj", "self_attn.v_proj"
AFTER = "post_attention_layernorm"


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("llama", {}, {INPUT: "qkv", AFTER: "gate_up", UP: "down"}),
        ("llama", {"num_key_value_heads": 4}, {INPUT: "qkv", AFTER: "gate_up", UP: "down", VALUE: "o"}),
        ("qwen2", {}, {INPUT: "qkv", AFTER: "gate_up", UP: "down"}),
        ("qwen3", {}, {INPUT: "qkv", AFTER: "gate_up", UP: "down"}),
        # Their norms multiply with 1 + weight, and so stay.
        ("gemma", {}, {UP: "down"}),
        ("gemma2", {}, {UP: "down"}),
    ],
)
def test_scales_move_where_that_leaves_the_output_alone(
    architecture: str, changes: dict[str, int], expected: dict[str, str]
) -> None:
    model, whole = tiny_model(architecture, **changes), tiny_model(architecture, **changes)
    block = next(awq.walk_blocks(model, IDS))
    names = {module: name for name, module in block.module.named_modules()}
    found = {}
    for group in awq._groups(block, awq._observe(block)):
        readers = [name.rpartition(".")[2].removesuffix("_proj") for name in group.readers]
        found[names[group.before]] = "".join(readers) if len(readers) > 2 else "_".join(readers)
        generator = torch.Generator().manual_seed(1)
        group.move(torch.rand(group.weights()[0].shape[1], generator=generator).double() + 0.5)
    assert found == expected
    with torch.no_grad():
        ours, theirs = (each(torch.from_numpy(IDS)).logits for each in (model, whole))
    for name in expected:
        parameters = (each.get_parameter(f"model.layers.0.{name}.weight") for each in (model, whole))
        assert not torch.allclose(*parameters, rtol=0.1)
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 1e-4


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_moving_scales_leaves_the_output_alone(dtype: torch.dtype, close: float) -> None:
    model, whole = (tiny_model(dtype=dtype, num_key_value_heads=4, attention_bias=True) for _ in range(2))
    with torch.no_grad():
        for each in (model, whole):
            for name, parameter in each.named_parameters():
                if name.endswith("bias"):
                    parameter.copy_(torch.linspace(-1, 1, len(parameter)))
        block = next(awq.walk_blocks(model, IDS))
        for group in awq._groups(block, awq._observe(block)):
            generator = torch.Generator().manual_seed(1)
            group.move(torch.rand(group.weights()[0].shape[1], generator=generator).double() + 0.5)
        ours, theirs = (each(torch.from_numpy(IDS)).logits.float() for each in (model, whole))
    assert not torch.equal(model.model.layers[0].self_attn.v_proj.bias, whole.model.layers[0].self_attn.v_proj.bias)
    assert float((ours - theirs).norm() / theirs.norm()) < close


def test_a_block_that_scales_would_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its norm's output is read by more than the linear layers."""
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    inner = attention.forward

    def reads_more(hidden_states: Tensor, **arguments: object) -> object:
        output, *rest = inner(hidden_states=hidden_states, **arguments)
        return output + hidden_states, *rest

    monkeypatch.setattr(attention, "forward", reads_more)
    with pytest.raises(InputError, match=r"scales between the layers of model.layers.0 changes its output by a share"):
        Awq().quantise_linears(model, IDS, Grid(bits=3))


def test_skipped_layers_stay_whole_and_progress_is_told() -> None:
    model = tiny_model()
    told: list[LayerProgress] = []
    packed = Awq().quantise_linears(model, IDS, Grid(bits=3), skip=["self_attn.k_proj"], on_layer=told.append)
    assert len(packed) == 18 and not any("k_proj" in name for name in packed)
    assert [progress.name for progress in told] == list(packed)
    assert [progress.index for progress in told] == list(range(18)) and {each.num_layers for each in told} == {18}
    assert all(progress.error is not None and 0 < progress.error < 0.1 for progress in told)
    weight = model.model.layers[0].self_attn.k_proj.weight
    assert len(weight[0].unique()) > 8, "it is whole, though scaled"
    for name, each in packed.items():
        np.testing.assert_array_equal(model.get_submodule(name).weight.detach().numpy(), each.dequantised())


def test_queries_and_keys_are_not_clipped() -> None:
    clipped, whole = (
        settings.quantise_linears(tiny_model(num_hidden_layers=1), IDS, Grid(bits=3))
        for settings in (Awq(num_alphas=3), Awq(num_alphas=3, max_clip=0))
    )
    same = {name.rpartition(".")[2] for name in clipped if np.array_equal(clipped[name].scales, whole[name].scales)}
    assert same == {"q_proj", "k_proj"}


def test_a_norm_is_a_gain_or_not() -> None:
    assert awq._is_gain(nn.LayerNorm(8)) and awq._is_gain(nn.RMSNorm(8))
    norm = nn.RMSNorm(8)
    norm.register_forward_hook(lambda module, arguments, output: output + arguments[0])
    assert not awq._is_gain(norm)
    assert not awq._is_gain(nn.Linear(8, 8))
    assert norm.weight.tolist() == [1.0] * 8


def test_bad_input_is_one_clear_sentence() -> None:
    with pytest.raises(InputError, match="num_alphas is 0, expected at least 1"):
        Awq(num_alphas=0)
    with pytest.raises(InputError, match="max_clip is 1, expected 0 to less than 1"):
        Awq(max_clip=1)
    with pytest.raises(InputError, match="no calibration texts came, which awq learns from"):
        Awq().quantise_linears(tiny_model(), None, Grid())
    with pytest.raises(InputError, match="skip names 'nothing'"):
        Awq().quantise_linears(tiny_model(), IDS, Grid(), skip=["nothing"])
