"""The frozen backbone with its taps, the shared projections, and the side networks that read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.models.anatomy import BackboneSpec
from cotune.models.attention_ladder import AttentionLadder, AttentionLadderConfig
from cotune.models.backbone import Backbone, BackboneCursor, ForwardStates
from cotune.models.projections import Projections
from cotune.models.side_network import SideNetwork, fake_quantise
from cotune.models.spa_ladder import SpaLadder, SpaLadderConfig
from cotune.models.tap_ladder import TapLadder, TapLadderConfig

SIDE_NETWORKS: dict[str, type[SideNetwork]] = {
    TapLadder.kind: TapLadder,
    SpaLadder.kind: SpaLadder,
    AttentionLadder.kind: AttentionLadder,
}


def load_side_network(kind: str, config: Mapping[str, Any], tensors: Mapping[str, NDArray[np.float32]]) -> SideNetwork:
    """A side network in torch from what a plugin holds, to train it on.

    Raises:
        InputError: an unknown kind, or tensors that do not fit the config.
    """
    if kind not in SIDE_NETWORKS:
        raise InputError(f"the side network's kind is {kind!r}, expected one of {', '.join(SIDE_NETWORKS)}")
    return SIDE_NETWORKS[kind].from_arrays(config, tensors)


__all__ = [
    "SIDE_NETWORKS",
    "AttentionLadder",
    "AttentionLadderConfig",
    "Backbone",
    "BackboneCursor",
    "BackboneSpec",
    "ForwardStates",
    "Projections",
    "SideNetwork",
    "SpaLadder",
    "SpaLadderConfig",
    "TapLadder",
    "TapLadderConfig",
    "fake_quantise",
    "load_side_network",
]
