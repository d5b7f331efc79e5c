"""How a party learns: its adapter or all of its weights, the frozen part staying; and what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from co_tuning_scene import STEPS, scene_on

from cotune.federation.arrays import digest
from cotune.federation.comparison.party import Party, target_logits, teach
from cotune.federation.flora import fresh_adapter


def test_what_learns_is_the_adapter_or_the_weights_and_what_is_frozen_counts(models: Path, tmp_path: Path) -> None:
    scene = scene_on(models, tmp_path, ("llama",))
    own, proxy = Party(scene.sites["llama"].small), scene.fresh(scene.proxy)
    held: list[int] = []
    texts = own.read(scene.public, max_tokens=64)
    after = teach(own, texts, STEPS, seed=1, hold=held.append)
    with own.loaded() as model:
        parameters = {name: one.clone() for name, one in model.named_parameters()}
        before, targets = target_logits(model, texts[0], 0)
    assert after.weights.keys() == parameters.keys() and not after.adapter
    # Weights, gradients and two moments of AdamW.
    assert (
        4 * sum(one.nbytes for one in parameters.values()) <= held[0] < 4.2 * sum(p.nbytes for p in parameters.values())
    )
    with after.loaded() as model:
        better, _ = target_logits(model, texts[0], 0)
    losses = [torch.nn.functional.cross_entropy(one, targets) for one in (before, better)]
    assert losses[1] < losses[0]

    read = proxy.read(scene.public, max_tokens=64)
    private = {name: one + 0.1 for name, one in fresh_adapter(proxy.adapter, 1, 3).items()}
    beside = replace(proxy, frozen=private)
    alone, together = teach(proxy, read, STEPS, seed=1), teach(beside, read, STEPS, seed=1)
    assert not alone.weights and digest(together.frozen) == digest(private)
    assert digest(alone.adapter) != digest(proxy.adapter) and digest(alone.adapter) != digest(together.adapter)
    said = []
    for party in (proxy, beside):
        with party.loaded() as model:
            said.append(target_logits(model, read[0], 0)[0])
    assert not np.allclose(said[0], said[1])
