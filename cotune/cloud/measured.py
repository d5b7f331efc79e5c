"""What a stream measures of itself while it runs: times, and how often its guesses hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from cotune.generation.controller import Outlook

# How fast the running estimates follow: the last ten or so count.
_SMOOTHING = 0.1


@dataclass
class Average:
    """A mean of the first values, and a moving one once there are many."""

    value: float
    num_values: int = 0

    def add(self, value: float) -> None:
        self.num_values += 1
        self.value += max(_SMOOTHING, 1.0 / self.num_values) * (value - self.value)


def share_of(first_guess: float) -> Average:
    """A share that is guessed before there are values; the guess counts as two of these."""
    return Average(first_guess, 2)


@dataclass(kw_only=True)
class Measured:
    """Running estimates of times in seconds and of shares.

    Attributes:
        round_trip_s, step_s: a question to the device and its answer; a pass. 0 for not known yet.
        disagree: tokens that the device changed.
        draft_kept: drafted tokens that were right, where all before them were.
        agreed_kept, drafted_alone, base_alone: where draft and base token were the same, how often they were right;
            where they differed, how often the draft's was and how often the base token.
        branch_kept: waits at which one of the branches had the right token.
    """

    round_trip_s: Average = field(default_factory=lambda: Average(0.0))
    step_s: Average = field(default_factory=lambda: Average(0.0))
    disagree: Average = field(default_factory=lambda: share_of(0.3))
    draft_kept: Average = field(default_factory=lambda: share_of(0.0))
    agreed_kept: Average = field(default_factory=lambda: share_of(0.9))
    drafted_alone: Average = field(default_factory=lambda: share_of(0.4))
    base_alone: Average = field(default_factory=lambda: share_of(0.3))
    branch_kept: Average = field(default_factory=lambda: share_of(0.6))

    @property
    def outlook(self) -> Outlook | None:
        """What follows for running ahead; None as long as too little was measured."""
        if not self.round_trip_s.value or not self.step_s.value:
            return None
        return Outlook(
            step_s=self.step_s.value,
            round_trip_s=self.round_trip_s.value,
            disagree=self.disagree.value,
            draft_kept=self.draft_kept.value,
        )

    def chance(self, *, drafted: int | None, base: int, assumed: int) -> float:
        """How likely an assumed token is right, where all before it are.

        Args:
            drafted, base: what the device's draft and the backbone said; None without a draft.
            assumed: the one of them that the cloud went on with.
        """
        if drafted is None:
            return 1.0 - self.disagree.value
        if drafted == base:
            return self.agreed_kept.value
        return self.drafted_alone.value if assumed == drafted else self.base_alone.value

    def add_token(self, token: int, *, drafted: int | None, base: int) -> None:
        """A token that the device was asked about is decided."""
        self.disagree.add(token != base)
        if drafted is not None:
            self.draft_kept.add(token == drafted)
        if drafted == base:
            self.agreed_kept.add(token == base)
        elif drafted is not None:
            self.drafted_alone.add(token == drafted)
            self.base_alone.add(token == base)
