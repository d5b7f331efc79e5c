from __future__ import annotations

from pathlib import Path

import pytest

from cotune.errors import InputError
from cotune.models import Backbone
from cotune.models.adapter_folder import load_adapter
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.bottleneck import BottleneckAdapter
from cotune.models.peft_adapter import PeftAdapter
from cotune.models.selected import SelectedParameters, bias_and_norm_names


def test_each_kind_is_told_by_its_file(tmp_path: Path, llama: Backbone) -> None:
    model = llama.model
    LoraAdapter.fresh(model, LoraShape(rank=2)).save(tmp_path / "peft", model)
    BottleneckAdapter.fresh(model, 2).save(tmp_path / "bottleneck", model)
    SelectedParameters.of(model, bias_and_norm_names(model)).save(tmp_path / "selected", model)
    kinds = {"peft": PeftAdapter, "bottleneck": BottleneckAdapter, "selected": SelectedParameters}
    for name, kind in kinds.items():
        assert isinstance(load_adapter(tmp_path / name, model), kind)


def test_nothing_and_too_much_are_refused(tmp_path: Path, llama: Backbone) -> None:
    with pytest.raises(InputError, match=r"holds no adapter, expected one of adapter_config\.json, bottleneck"):
        load_adapter(tmp_path / "nowhere", llama.model)
    BottleneckAdapter.fresh(llama.model, 2).save(tmp_path, llama.model)
    LoraAdapter.fresh(llama.model, LoraShape(rank=2)).save(tmp_path, llama.model)
    with pytest.raises(InputError, match=r"adapter_config\.json and bottleneck\.safetensors, expected one"):
        load_adapter(tmp_path, llama.model)
