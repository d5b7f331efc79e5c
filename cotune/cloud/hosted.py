"""What a cloud hosts: a frozen backbone, its public parts, and how it describes itself. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import DecodingBackbone
from cotune.wire.description import CloudDescription
from cotune.wire.features import FeatureSource


class HostedBackbone(DecodingBackbone, FeatureSource, Protocol):
    """A backbone that decodes and teacher-forces; `cotune.models.Backbone` is one."""


@dataclass(frozen=True, kw_only=True)
class HostedModel:
    """One model as the cloud offers it.

    Attributes:
        backbone: does the forward passes; the cloud calls it from one thread only.
        description: what devices are told.
        output_basis, tokenizer_json: the public parts that devices fetch.
    """

    backbone: HostedBackbone
    description: CloudDescription
    output_basis: OutputBasis
    tokenizer_json: bytes
