"""What a cloud tells every device about the model it hosts: the JSON object in its Welcome frame."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from cotune.errors import FrameError, MismatchError


@dataclass(frozen=True, kw_only=True)
class CloudDescription:
    """A hosted model, as a device needs to know it.

    Attributes:
        model: its name, for people.
        backbone_digest, tokenizer_digest, projections_digest: SHA-256, hex; a plugin is bound to all three.
        basis_digest: SHA-256, hex, of the output basis as this cloud computed it; device and cloud must have the same.
        vocab_size: rows of the output embedding.
        hidden_size: length of the hidden state that the gate reads.
        num_taps, tap_dim: shape of one position's taps.
        basis_dim: length of a correction.
        max_context: tokens that prompt and answer may have together.
        stop_token_ids: tokens that end a text.
    """

    model: str
    backbone_digest: str
    tokenizer_digest: str
    projections_digest: str
    basis_digest: str
    vocab_size: int
    hidden_size: int
    num_taps: int
    tap_dim: int
    basis_dim: int
    max_context: int
    stop_token_ids: tuple[int, ...]

    def to_info(self) -> dict[str, object]:
        """As JSON holds it."""
        return {**asdict(self), "stop_token_ids": list(self.stop_token_ids)}

    @classmethod
    def from_info(cls, info: dict[str, object]) -> CloudDescription:
        """From a Welcome frame's JSON; every field must be there and of its type.

        Raises:
            FrameError: a field is missing or of another type or size.
        """
        values: dict[str, object] = {}
        for field in fields(cls):
            value = info.get(field.name)
            if field.type == "str":
                ok = isinstance(value, str) and len(value) <= 512
            elif field.type == "int":
                ok = type(value) is int and 0 < value < 2**31
            else:
                ok = isinstance(value, list) and len(value) <= 64 and all(type(v) is int for v in value)
            if not ok:
                raise FrameError(
                    f"the cloud's welcome has {field.name} = {value!r:.80}, expected {field.type}; "
                    "is the cloud of the same cotune version?"
                )
            values[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)  # type: ignore[arg-type]

    def check_digests(self, *, backbone: str, tokenizer: str, projections: str, basis: str) -> None:
        """Make sure that a plugin was tuned on this very model.

        Raises:
            MismatchError: a digest differs.
        """
        for name, ours, theirs in (
            ("backbone", backbone, self.backbone_digest),
            ("tokenizer", tokenizer, self.tokenizer_digest),
            ("projections", projections, self.projections_digest),
            ("output basis", basis, self.basis_digest),
        ):
            if ours != theirs:
                raise MismatchError(
                    f"the plugin was tuned on {name} {ours[:12]} but the cloud hosts {self.model} "
                    f"with {name} {theirs[:12]}; use the cloud that it was tuned on, or tune a plugin for this one"
                )

    def check_same(self, other: CloudDescription) -> None:
        """After a reconnect: make sure that the cloud hosts what it hosted before.

        Raises:
            MismatchError: it hosts something else.
        """
        if self != other:
            raise MismatchError(
                f"the cloud hosted {self.model} ({self.backbone_digest[:12]}) before the connection broke and hosts "
                f"{other.model} ({other.backbone_digest[:12]}) now; start the generation anew"
            )
