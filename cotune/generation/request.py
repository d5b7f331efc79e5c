"""What one generation is asked to do, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.generation.modes import Mode, mode_named
from cotune.generation.sampling import Sampling

SCHEDULES = ("blocking", "gated", "optimistic", "drafted", "auto")
# Those in which the device sends no drafts: what can be compared without texts to draft from.
PLAIN_SCHEDULES = SCHEDULES[:3]
# Those in which it does.
DRAFTED_SCHEDULES = SCHEDULES[3:]
ANSWERS = ("token", "correction")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One generation. The token ids that come of it depend on nothing else but the weights.

    Attributes:
        prompt_ids: int64 (prompt,), at least one token.
        mode: what the output is, a name of `MODES`.
        max_new_tokens: stop after this many tokens.
        sampling: greedy or sampled.
        stop_token_ids: a token of these ends the text and is kept as its last token.
        stop_strings: the text ends before the first of these; tokens after it are dropped.
    """

    prompt_ids: NDArray[np.int64]
    mode: str = "integration"
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        mode_named(self.mode)
        if self.prompt_ids.ndim != 1 or len(self.prompt_ids) == 0:
            raise InputError("prompt_ids is empty, expected at least one token; give a prompt")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")
        if "" in self.stop_strings:
            raise InputError("a stop string is empty, expected at least one character")

    @property
    def combination(self) -> Mode:
        return mode_named(self.mode)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One token and who decided it.

    Attributes:
        token_id: the token.
        base_token_id: what the cloud alone would have said here.
        consulted: the device was asked (sigma = 1).
        late: its answer did not come before the deadline, so that this is the cloud's own token.
        local: the device decided it by its offline model, while the cloud was out of reach.
    """

    token_id: int
    base_token_id: int
    consulted: bool
    late: bool = False
    local: bool = False

    @property
    def changed(self) -> bool:
        """The device's token is not the one that the cloud alone would have said."""
        return self.token_id != self.base_token_id

    @property
    def source(self) -> Literal["cloud", "device", "local"]:
        """`device` where the plugin brought the token about, `local` where an offline model did, else `cloud`."""
        return "local" if self.local else "device" if self.changed else "cloud"
