"""A plugin for the toy model, with a tokenizer of its words: enough for a whole device."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from toy import BASIS, TAP_DIM, TAPS, VOCAB, toy_basis, toy_gate, toy_model

from cotune.plugin import GateParameters, Plugin

SIDE, INNER = 5, 6


def words_json() -> bytes:
    """A tokenizer of words w0 .. w96, as many as the toy model knows."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode()


def toy_plugin(**changes: Any) -> Plugin:
    """A random tap ladder for the toy model."""
    rng = np.random.default_rng(3)
    shapes = {
        "ladder.mix_weight": (TAPS, SIDE, TAP_DIM),
        "ladder.mix_bias": (TAPS, SIDE),
        "ladder.up_weight": (TAPS - 1, INNER, SIDE),
        "ladder.up_bias": (TAPS - 1, INNER),
        "ladder.down_weight": (TAPS - 1, SIDE, INNER),
        "ladder.down_bias": (TAPS - 1, SIDE),
        "norm_weight": (SIDE,),
        "head_weight": (BASIS, SIDE),
        "head_bias": (BASIS,),
    }
    gate, description = toy_gate(), toy_model().description
    fields: dict[str, Any] = {
        "kind": "tap_ladder",
        "config": {
            "num_taps": TAPS,
            "tap_dim": TAP_DIM,
            "basis_dim": BASIS,
            "side_width": SIDE,
            "inner_width": INNER,
        },
        "tensors": {name: (0.6 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()},
        "gate": GateParameters(weight=gate.weight, bias=gate.bias, threshold=gate.threshold),
        "backbone_digest": description.backbone_digest,
        "projections_digest": description.projections_digest,
        "tokenizer_digest": description.tokenizer_digest,
        "tokenizer_json": words_json(),
        "output_basis": toy_basis().to_bytes(),
        "training": {"prompt_format": "w1 {prompt} w4"},
    }
    return Plugin(**{**fields, **changes})
