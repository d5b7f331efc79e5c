"""Alone: a device's model is that of its own steps, whoever else is there; and more steps are more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from co_tuning_scene import run, scene_on

from cotune.federation.comparison.standalone import Standalone


def test_a_device_alone_learns_what_it_learns_beside_others(models: Path, tmp_path: Path) -> None:
    scene = scene_on(models, tmp_path)
    both = run(Standalone(), scene)
    single = run(Standalone(), replace(scene, sites={"llama": scene.sites["llama"]}))
    weights = [ran.parties[-1]["llama"].weights for ran in (both, single)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    sites = {name: replace(site, steps=replace(site.steps, num_steps=4)) for name, site in scene.sites.items()}
    more = run(Standalone(), replace(scene, sites=sites))
    assert 1.5 < more.account.flops["llama"] / both.account.flops["llama"] < 2.5
