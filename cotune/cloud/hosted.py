"""What a cloud hosts: a frozen backbone, its public parts, and how it describes itself. NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import DecodingBackbone
from cotune.wire.description import CloudDescription
from cotune.wire.features import FeatureSource


class HostedBackbone(DecodingBackbone, FeatureSource, Protocol):
    """A backbone that decodes and teacher-forces; `cotune.models.Backbone` is one."""

    @property
    def prompt_chunk(self) -> int:
        """Prompts are read in pieces that end at multiples of this many tokens."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens in a block of keys and values."""
        ...

    @property
    def rows_are_independent(self) -> bool:
        """Whether sequences in one pass leave each other's features alone to the last bit."""
        ...


class DescribedBackbone(HostedBackbone, Protocol):
    """A backbone that knows its public parts."""

    @property
    def description(self) -> CloudDescription:
        """What devices are told."""
        ...

    @property
    def output_basis(self) -> OutputBasis:
        """The shared output basis."""
        ...

    @property
    def tokenizer_json(self) -> bytes:
        """The bytes of its tokenizer."""
        ...


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

    @classmethod
    def of(cls, backbone: DescribedBackbone) -> Self:
        """Host a backbone as it describes itself."""
        return cls(
            backbone=backbone,
            description=backbone.description,
            output_basis=backbone.output_basis,
            tokenizer_json=backbone.tokenizer_json,
        )
