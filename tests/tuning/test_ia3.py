from __future__ import annotations

import peft
import pytest
import torch

from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.tuning.ia3 import Ia3


def test_the_scales_are_on_keys_values_and_feed_forward_and_start_at_one(backbone: Backbone) -> None:
    adapter = Ia3().fresh(backbone, (), seed=0)
    assert all(bool((tensor == 1).all()) for tensor in adapter.params.values())
    places = {name.split(".ia3_l")[0].rpartition(".")[2] for name in adapter.params}
    is_llama = backbone.spec.architecture.startswith("Llama")
    assert places == ({"k_proj", "v_proj", "down_proj"} if is_llama else {"c_attn", "c_proj"})
    # Llama: a key and a value of 8 and a feed-forward of 24. GPT-2: query, key and value of 16, and 64.
    assert adapter.num_parameters == 2 * ((8 + 8 + 24) if is_llama else (48 + 64))


def test_a_scale_multiplies_what_the_layer_puts_out(backbone: Backbone) -> None:
    adapter = Ia3().fresh(backbone, (), seed=0)
    name = next(iter(adapter.params))
    layer = name.split(".ia3_l")[0].removeprefix("base_model.model.")
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = backbone.model.get_submodule(layer)(x)
        scaled = adapter.trained({**adapter.params, name: adapter.params[name] * 3})
        with scaled.attach(backbone.model):
            torch.testing.assert_close(backbone.model.get_submodule(layer)(x), 3 * before)


def test_an_architecture_that_peft_does_not_know_is_refused(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = peft.utils.constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    monkeypatch.delitem(known, backbone.model.config.model_type)
    with pytest.raises(InputError, match=r"IA3 adapter cannot be put into this .*: .*target_modules"):
        Ia3().fresh(backbone, (), seed=0)
