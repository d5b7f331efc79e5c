"""From what the stages of tuning gave to a plugin that can be saved and carried to a device."""

from __future__ import annotations

from typing import Any

import numpy as np

from cotune.generation.gate import Gate
from cotune.generation.output_basis import OutputBasis
from cotune.models.side_network import SideNetwork
from cotune.plugin import GateParameters, Plugin


def build_plugin(
    network: SideNetwork,
    gate: Gate | None,
    *,
    family: str,
    backbone_digest: str,
    projections_digest: str,
    tokenizer_digest: str,
    tokenizer_json: bytes,
    output_basis: OutputBasis,
    training: dict[str, Any] | None = None,
) -> Plugin:
    """Bind a tuned side network and its gate to the backbone that they were tuned on.

    Args:
        network: as tuned; its parameters are copied.
        gate: as tuned, with its threshold; None where only ungated modes are meant.
        family: `parallel` or `serial`, as it was tuned.
        backbone_digest, projections_digest, tokenizer_digest: SHA-256, hex, of what it was tuned on.
        tokenizer_json: the bytes of the backbone's `tokenizer.json`.
        output_basis: the shared basis that it was tuned with.
        training: a summary of the tuning, JSON values.

    Raises:
        InputError: a parameter is not finite, or an unknown family.
    """
    return Plugin(
        kind=network.kind,
        config=network.config_dict(),
        tensors=network.to_arrays(),
        gate=None if gate is None else gate_parameters(gate),
        backbone_digest=backbone_digest,
        projections_digest=projections_digest,
        tokenizer_digest=tokenizer_digest,
        family=family,
        training=training or {},
        tokenizer_json=tokenizer_json,
        output_basis=output_basis.to_bytes(),
    )


def gate_parameters(gate: Gate) -> GateParameters:
    """The gate as a plugin keeps it."""
    layer = gate.layer
    return GateParameters(
        weight=gate.weight,
        bias=gate.bias,
        threshold=gate.threshold,
        layer=None if layer is None else layer.weight.astype(np.float32),
        layer_bias=None if layer is None else layer.bias,
    )
