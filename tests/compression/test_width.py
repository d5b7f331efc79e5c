"""Residual stream and channels, narrower together."""

from __future__ import annotations

import numpy as np
import torch
from compressible import VOCAB, tiny_model

from cotune.compression.calibration import LayerProgress
from cotune.compression.channels import Channels
from cotune.compression.hidden_size import HiddenSize
from cotune.compression.width import Width


def test_it_is_the_one_and_then_the_other() -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, (4, 9))
    both, one_by_one = tiny_model(), tiny_model()
    parts = HiddenSize(multiple=8), Channels(multiple=8)
    seen: list[LayerProgress] = []
    facts = Width(hidden_size=parts[0], channels=parts[1]).prune(both, 0.25, ids, on_layer=seen.append)
    for part in parts:
        part.prune(one_by_one, 0.25, ids)
    assert facts == {"hidden_size": 24, "intermediate_size": 40} and len(seen) == 3
    with torch.no_grad():
        assert torch.equal(both(torch.from_numpy(ids)).logits, one_by_one(torch.from_numpy(ids)).logits)
