"""Two methods at once know nothing of each other, and cost what both cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from co_tuning_scene import run, scene_on

from cotune.federation.arrays import digest
from cotune.federation.comparison.beside import Beside
from cotune.federation.comparison.federated_lora import FederatedLora
from cotune.federation.comparison.scene import CLOUD, PROXY
from cotune.federation.comparison.standalone import Standalone


def test_each_learns_what_it_learns_alone(models: Path, tmp_path: Path) -> None:
    scene = scene_on(models, tmp_path, num_rounds=2)
    shared = FederatedLora(bits=5)
    both, fedavg, alone = (
        run(method, replace(scene, folder=tmp_path / str(number)))
        for number, method in enumerate((Beside(shared=shared), shared, Standalone()))
    )
    assert len(both.parties) == 3
    for mine, of_proxy, of_devices in zip(both.parties, fedavg.parties, alone.parties, strict=True):
        assert mine.keys() == {*scene.sites, CLOUD, PROXY}
        assert digest(mine[PROXY].adapter) == digest(of_proxy["gpt2"].adapter)
        assert digest(mine[CLOUD].adapter) == digest(of_devices[CLOUD].adapter)
        for name in scene.sites:
            assert all(mine[name].weights[key].equal(one) for key, one in of_devices[name].weights.items())
    for name in scene.sites:
        sums = fedavg.account.flops[name] + alone.account.flops[name]
        assert both.account.flops[name] == pytest.approx(sums) and both.account.up[name] == fedavg.account.up[name]
    assert both.account.downloads == fedavg.account.downloads
