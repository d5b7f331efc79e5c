"""Ours on the scene of a comparison: bytes of real messages, the naive merge, partial participation, both channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from co_tuning_scene import STEPS, has_learnt, run, scene_on

from cotune.errors import InputError
from cotune.federation.algorithm import Update
from cotune.federation.arrays import add
from cotune.federation.comparison.co_tuned import CoTuned, FactorMerge
from cotune.federation.comparison.scene import CLOUD, PROXY
from cotune.federation.coplms import CloudSettings, CoPlms
from cotune.federation.lora_factors import layer_names, split_layers
from cotune.federation.robust.mean import Mean


def test_the_naive_merge_is_the_mean_of_each_factor() -> None:
    rng = np.random.default_rng(0)
    shapes = {"m.q.lora_A.default.weight": (2, 5), "m.q.lora_B.default.weight": (4, 2)}
    start, *changes = (
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(3)
    )
    inner = CoPlms(bits=32, fold_above=0.0)
    naive, state = FactorMerge(inner), inner.start(start)
    updates = [Update(device=str(number), arrays=one) for number, one in enumerate(changes)]
    found = naive.adapter(naive.merge(state, 1, updates, Mean()))
    mean = add(start, {name: (changes[0][name] + changes[1][name]) / 2 for name in shapes})
    exact = inner.adapter(inner.merge(state, 1, updates, Mean()))
    product = {
        name: split_layers(one, 1.0)["m.q"].product()
        for name, one in (("naive", found), ("by hand", mean), ("exact", exact))
    }
    assert np.allclose(product["naive"], product["by hand"], atol=1e-5)
    assert not np.allclose(product["exact"], product["by hand"], atol=1e-2)
    assert layer_names(sorted(found)).keys() == {"m.q"}


def test_half_of_the_devices_take_part_and_one_tells_likelihoods(models: Path, tmp_path: Path) -> None:
    scene = scene_on(models, tmp_path / "half")
    ran = run(CoTuned(options=CoPlms(private_rank=0), num_per_round=1), scene)
    assert len(ran.account.up) == 1 and set(ran.account.downloads) == set(scene.sites)
    (asked,) = ran.account.up
    assert [name for name in scene.sites if has_learnt(ran.parties[0][name], ran.parties[1][name])] == [asked]
    cloud = CloudSettings(model="the scene's", public="the scene's")
    options = CoPlms(private_rank=0, channels={"gpt2": "likelihoods"}, cloud=cloud)
    both = run(CoTuned(options=options), replace(scene, folder=tmp_path / "both"))
    assert set(both.account.downloads) == {"llama"} and both.account.up["gpt2"] < both.account.up["llama"] / 3
    assert has_learnt(both.parties[0][CLOUD], both.parties[1][CLOUD])
    assert has_learnt(both.parties[0][PROXY], both.parties[1][PROXY])


def test_all_devices_take_the_same_steps(models: Path, tmp_path: Path) -> None:
    scene = scene_on(models, tmp_path)
    sites = scene.sites | {"gpt2": replace(scene.sites["gpt2"], steps=replace(STEPS, num_steps=9))}
    with pytest.raises(InputError, match="sites differ in their steps"):
        run(CoTuned(), replace(scene, sites=sites))
