"""A plugin for any backbone, without tuning: random, and as strong as asked for."""

from __future__ import annotations

import numpy as np
import torch

from cotune.generation.gate import Gate
from cotune.models.backbone import Backbone
from cotune.models.tap_ladder import TapLadder, TapLadderConfig
from cotune.plugin import Plugin
from cotune.tuning.plugin_folder import build_plugin
from cotune.wire.codec import dequantise


def random_plugin(backbone: Backbone, ratio: float, seed: int = 0) -> Plugin:
    """A random side network whose delta is `ratio` times as large as the base logits, as standard deviations go.

    Its gate fires at about half of the positions.

    Args:
        backbone: what it is for.
        ratio: 0 changes no token; 0.1 few, 1 most.
        seed: of all weights.
    """
    description, generator = backbone.description, torch.Generator().manual_seed(seed)
    shape = TapLadderConfig(
        num_taps=description.num_taps, tap_dim=description.tap_dim, basis_dim=description.basis_dim, side_width=64
    )
    network = TapLadder(shape, generator).eval()
    ids = np.random.default_rng(seed).integers(0, description.vocab_size, 64)
    features = backbone.features(ids, 1, top_k=description.vocab_size)
    taps = torch.from_numpy(dequantise(features.tap_codes, features.tap_scales))
    with torch.no_grad():
        network.head_weight.normal_(generator=generator)
        delta = (network(taps) @ torch.from_numpy(backbone.output_basis.matrix()).T).numpy()
        network.head_weight.mul_(ratio * float(features.top_logits.std(axis=1).mean() / delta.std(axis=1).mean()))
    weight = np.random.default_rng(seed).standard_normal(description.hidden_size).astype(np.float32)
    scores = (features.hidden.astype(np.float32) * weight).sum(axis=1)
    return build_plugin(
        network,
        Gate(weight=weight, threshold=float(np.median(scores))),
        family="parallel",
        backbone_digest=description.backbone_digest,
        projections_digest=description.projections_digest,
        tokenizer_digest=description.tokenizer_digest,
        tokenizer_json=backbone.tokenizer_json,
        output_basis=backbone.output_basis,
    )
