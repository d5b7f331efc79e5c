"""The merge of the adapters is the product's: the mean of factors, or of products, of what the devices learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from co_tuning_scene import run, scene_on

from cotune.federation.comparison.federated_lora import FederatedLora
from cotune.federation.comparison.scene import CLOUD, Account, Scene, learn_at
from cotune.federation.flexlora import FlexLora
from cotune.federation.lora_factors import split_layers


def alone(scene: Scene, name: str) -> dict[str, np.ndarray]:
    """What a device's adapter is after the round, without any server."""
    proxy = scene.fresh(scene.proxy)
    texts = proxy.read(scene.sites[name].examples, max_tokens=scene.max_tokens)
    return dict(learn_at(scene, Account(), name, 1, proxy, texts, steps=scene.proxy_steps(name)).adapter)


def test_factors_and_products_are_averaged(models: Path, tmp_path: Path) -> None:
    scene = scene_on(models, tmp_path)
    own = [alone(scene, name) for name in scene.sites]
    merged = run(FederatedLora(), scene).parties[-1]
    for name, array in merged["gpt2"].adapter.items():
        assert np.allclose(array, (own[0][name] + own[1][name]) / 2, atol=1e-6)
    assert merged["gpt2"] is merged["llama"] and merged["gpt2"].model == scene.proxy
    flexible = run(FederatedLora(algorithm=FlexLora()), scene).parties[-1]["llama"].adapter
    trained = [split_layers(one, 1.0) for one in own]
    for layer, factors in split_layers(flexible, 1.0).items():
        mean = sum(one[layer].product() for one in trained) / 2
        u, s, vt = np.linalg.svd(mean)
        assert np.allclose(factors.product(), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)


def test_a_device_of_lower_rank_gets_and_sends_less(models: Path, tmp_path: Path) -> None:
    ran = run(FederatedLora(algorithm=FlexLora(ranks={"gpt2": 1})), scene_on(models, tmp_path))
    for counted in (ran.account.up, ran.account.down):
        assert counted["gpt2"] < 0.75 * counted["llama"]
    assert ran.account.downloads["gpt2"] == ran.parties[0]["gpt2"].model.size_bytes
    assert CLOUD not in ran.account.flops


def test_coded_it_sends_less_and_learns_nearly_the_same(models: Path, tmp_path: Path) -> None:
    scene = scene_on(models, tmp_path)
    plain, coded = (run(FederatedLora(bits=bits), scene) for bits in (32, 8))
    for side in ("up", "down"):
        for name in scene.sites:
            assert getattr(coded.account, side)[name] < 0.6 * getattr(plain.account, side)[name]
    start = scene.fresh(scene.proxy).adapter
    theirs = coded.parties[-1]["llama"].adapter
    moved = sum(float(((one - start[name]) ** 2).sum()) for name, one in plain.parties[-1]["llama"].adapter.items())
    apart = sum(float(((one - theirs[name]) ** 2).sum()) for name, one in plain.parties[-1]["llama"].adapter.items())
    assert 0 < apart < 0.05 * moved
