"""What `cotune tune` was asked for, in one place: it is written into the run's config and handed to the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotune.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cotune.data.batches import EncodedExample
    from cotune.tuning.loop import EpochRecord
    from cotune.tuning.privacy_account import PrivacyAccount

Tell = Callable[[str, int, int, str], None]
"""Hears of progress: stage, done, total, a note."""
Summary = dict[str, Any]
"""What is printed at the end."""


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """The arguments of the command, by their names there; None where the method's own default holds."""

    model: str
    data: str
    method: str
    out: Path
    run: Path
    merged: Path | None
    resume: bool
    epochs: int | None
    learning_rate: float | None
    batch_size: int
    estimator: str
    zo_eps: float | None
    directions: int | None
    zo_rule: str | None
    sparse_share: float | None
    sparse_by: str | None
    objective: str
    labels: tuple[str, ...] | None
    forward_mode: bool
    dp_epsilon: float | None
    dp_delta: float | None
    dp_clip: float | None
    gradient_checkpointing: bool
    base_bits: int | None
    rank: int | None
    alpha: float | None
    init: str | None
    width: int | None
    virtual_tokens: int | None
    memory_budget_bytes: int | None
    family: str
    side: str
    side_width: int
    side_init: str
    heldout_share: float
    max_length: int | None
    template: str | None
    limit: int | None
    share: float | None
    split: str | None
    dtype: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a run went.

    Attributes:
        summary: its own part of what is printed.
        curve: losses by epoch.
        best_epoch: whose parameters were saved.
        texts: that were trained on.
    """

    summary: Summary
    curve: list[EpochRecord]
    best_epoch: int
    texts: Sequence[EncodedExample]


def text_room(settings: TuneSettings, context: int, num_virtual_tokens: int = 0) -> int:
    """The most tokens of a text: what was asked for, or what the model reads beside a prompt of virtual tokens.

    Raises:
        InputError: a prompt that leaves no room for a text, or a length beyond what the model reads.
    """
    room = context - num_virtual_tokens
    if room < 2:
        raise InputError(
            f"--virtual-tokens is {num_virtual_tokens}, expected at most {context - 2}: the model reads {context} "
            "tokens, and a text has at least 2"
        )
    if settings.max_length is not None and settings.max_length > room:
        beside = f" beside {num_virtual_tokens} virtual ones" if num_virtual_tokens else ""
        raise InputError(
            f"--max-length is {settings.max_length}, expected at most {room}, the tokens that the model reads{beside}"
        )
    return room if settings.max_length is None else settings.max_length


def spent(account: PrivacyAccount) -> Summary:
    """What a private run says of itself."""
    from cotune.tuning.privacy_account import ASSUMPTIONS

    return {"privacy": account.summary(), "privacy_assumptions": list(ASSUMPTIONS)}
