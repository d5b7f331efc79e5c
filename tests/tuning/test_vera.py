from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cotune.errors import InputError
from cotune.models.adapters import linear_targets
from cotune.models.backbone import Backbone
from cotune.tuning.vera import Vera


def test_it_has_two_vectors_a_layer_and_saves_the_shared_matrices(tmp_path: Path, backbone: Backbone) -> None:
    adapter = Vera(rank=5).fresh(backbone, (), seed=0)
    assert {name.rpartition(".vera_lambda_")[2] for name in adapter.params} == {"b.default", "d.default"}
    d = [tensor for name, tensor in adapter.params.items() if "lambda_d" in name]
    num_layers = sum(
        name.rpartition(".")[2] in linear_targets(backbone.model) for name, _ in backbone.model.named_modules()
    )
    assert len(d) == num_layers and all(tensor.shape == (5,) and bool((tensor == 0.1).all()) for tensor in d)
    assert not any(bool(tensor.any()) for name, tensor in adapter.params.items() if "lambda_b" in name)
    adapter.save(tmp_path, backbone.model)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {"base_model.vera_A", "base_model.vera_B"} <= saved.keys()


def test_the_update_is_the_papers(backbone: Backbone) -> None:
    """W x + b * (B (d * (A x))) with the shared matrices cut to the layer."""
    fresh = Vera(rank=5).fresh(backbone, (), seed=0)
    adapter = fresh.trained({name: tensor + 0.3 for name, tensor in fresh.params.items()})
    name = next(iter(adapter.params)).split(".vera_lambda")[0].removeprefix("base_model.model.")
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = backbone.model.get_submodule(name)(x)
        with adapter.attach(backbone.model):
            layer = backbone.model.get_submodule(name)
            a, b = layer.vera_A["default"][:, :16], layer.vera_B["default"][: base.shape[-1]]
            update = 0.3 * (((x @ a.T) * 0.4) @ b.T)
            torch.testing.assert_close(layer(x), base + update, atol=1e-5, rtol=1e-5)


def test_the_seed_decides(backbone: Backbone) -> None:
    def matrix(seed: int) -> torch.Tensor:
        with Vera(rank=3).fresh(backbone, (), seed=seed).attach(backbone.model) as model:
            return model.base_model.vera_A["default"].clone()

    assert torch.equal(matrix(1), matrix(1)) and not torch.equal(matrix(1), matrix(2))


def test_an_impossible_rank_is_refused() -> None:
    with pytest.raises(InputError, match="rank is 0"):
        Vera(rank=0)
