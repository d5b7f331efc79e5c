"""Tune the edge before the cloud: by rewrites that the cloud answered better than the request as it is, then by pairs.

    accepted: the best rewrite of a request whose loss is smaller than that of the request by a margin
    x <- descent on -log p(u | r) of the accepted ones; then the same again, drawn at the new x

No gradient comes through a cloud that takes text, so that the cloud scores and the edge learns from what scored well
(expert iteration, the first half of what Matryoshka Pilot, arXiv 2410.20749, does; the second half, DPO on pairs, is in
`cotune.sandwich.rewriter_preferences`). A request costs G + 1 questions in a round, fewer where rewrites repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cotune.errors import InputError
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.bilevel.step_rules import AdamRule, clipped
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.pipeline import Pipeline
from cotune.sandwich.rewrite_trials import DrawConfig, RewriteRound, RewritingEdge, Trial, Trials
from cotune.sandwich.rewriter_preferences import MAX_NORM, PreferenceConfig, PreferredRewriter, prefer_rewrites


@dataclass(frozen=True, kw_only=True)
class RewriterConfig:
    """How a rewriter is tuned."""

    num_rounds: int = 2
    """Of drawing, asking, learning."""
    draw: DrawConfig = field(default_factory=DrawConfig)
    """How rewrites are drawn."""
    margin: float = 0.0
    """By how much a rewrite's loss must be smaller than the request's own, of 1."""
    num_steps: int = 10
    """Of descent in a round, each on all rewrites accepted so far."""
    x_rate: float = 1e-2
    """Of Adam."""
    max_share: float = 0.5
    """Of the budget's calls, tokens and dollars that may be spent when another request is begun; 1 for all of it. Where
    pairs follow, supervised rounds have of it their share of all rounds."""
    preferences: PreferenceConfig | None = None
    """Of the pairs learnt from afterwards; None: from none, since they ask more of the cloud."""

    def __post_init__(self) -> None:
        for name in ("num_rounds", "num_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.x_rate < np.inf:
            raise InputError(f"x_rate is {self.x_rate}, expected a positive number")
        if not 0 <= self.margin < 1:
            raise InputError(f"margin is {self.margin}, expected a share of 0 or more and below 1")
        if not 0 < self.max_share <= 1:
            raise InputError(f"max_share is {self.max_share}, expected a share above 0 and at most 1")

    @property
    def supervised_share(self) -> float:
        """Of the budget, for the supervised rounds."""
        following = self.preferences.num_rounds if self.preferences else 0
        return self.max_share * self.num_rounds / (self.num_rounds + following)

    def most_calls(self, num_examples: int, max_questions: int) -> int:
        """Requests that tuning may send at most, failed attempts aside; mostly far fewer, and no more than its share.

        Args:
            num_examples: to draw from.
            max_questions: of one rewrite.

        Example:
            >>> RewriterConfig(num_rounds=1, draw=DrawConfig(num_samples=2, num_batch_examples=3)).most_calls(9, 1)
            9
        """
        size, pairs = min(self.draw.num_batch_examples, num_examples), self.preferences
        one_round = size * (1 + self.draw.num_samples * max_questions)
        looks = size * (1 + 2 * max_questions) if pairs else 0
        return one_round * (self.num_rounds + (pairs.num_rounds if pairs else 0)) + looks


@dataclass(frozen=True)
class TunedRewriter:
    """A tuned rewriter.

    Attributes:
        x: its numbers; those to begin with where nothing was accepted and no pair learnt from.
        rounds: the supervised ones, in order; the last one is left out where the budget ended in its first request.
        ended_by_budget: whether there was no room for all of them, in the budget or in the tuning's share of it.
        preferences: what came of the pairs; None where none were asked for or the budget ended before.
    """

    x: Vector = field(repr=False)
    rounds: tuple[RewriteRound, ...]
    ended_by_budget: bool
    preferences: PreferredRewriter | None = None

    def to_json(self) -> dict[str, Any]:
        """All but x."""
        return {
            "rounds": [asdict(each) for each in self.rounds],
            "ended_by_budget": self.ended_by_budget,
            "preferences": self.preferences.to_json() if self.preferences else None,
        }

    def to_text(self) -> str:
        """A line or two for people."""
        asked, better = sum(each.num_requests for each in self.rounds), sum(each.num_accepted for each in self.rounds)
        rewrites = sum(each.num_rewrites for each in self.rounds)
        ended = "; then its share of the budget was spent" if self.ended_by_budget else ""
        supervised = f"rewriter    {better} of {asked} requests had a better one among {rewrites} rewrites{ended}"
        return "\n".join([supervised, *([self.preferences.to_text()] if self.preferences else [])])


def tune_rewriter(
    edge: RewritingEdge,
    pipeline: Pipeline,
    x: Vector,
    examples: Sequence[PrivateExample],
    metric: Callable[[str, Sequence[str]], float],
    template: str,
    config: RewriterConfig,
    *,
    key: bytes,
) -> TunedRewriter:
    """Tune; the pipeline's prompt and merger stay as they are.

    Args:
        edge: draws and learns.
        pipeline: through whose gate the cloud is asked, with its budget; its own rewriter is not used.
        x: numbers of the edge to begin with.
        examples: to learn from; nothing that is certified on.
        metric: of final texts; a loss is 1 less it.
        template: what the edge reads, with {request}: `edge_adapter.REWRITE_TEMPLATE`.
        config: how.
        key: secret; the same one gives the same placeholders, and so the same requests, again.

    Raises:
        RedactionError, WireError: a detector or the cloud failed; what was paid for is in the cache.
    """
    trials, rule = Trials(edge, pipeline, examples, metric, template, config.draw, key=key), AdamRule()
    accepted, rounds, tried = list[tuple[str, str]](), list[RewriteRound](), list[Trial]()
    ended = False
    for number in range(config.num_rounds):
        drawn, ended = trials.draw(x, number, share=config.supervised_share)
        tried += drawn
        if drawn:
            rounds.append(RewriteRound.of(drawn, config.margin))
            best = [(each.request.read, each.best(config.margin)) for each in drawn]
            accepted += [(read, one.text) for read, one in best if one is not None]
        for step in range(config.num_steps if accepted else 0):
            weights = np.full(len(accepted), 1 / len(accepted))
            _, slope = edge.gradient_after(x, accepted, weights, number * config.num_steps + step)
            x = rule.step(x, clipped(slope, MAX_NORM), config.x_rate)
        if ended:
            break
    preferred = None
    if config.preferences is not None:
        preferred = prefer_rewrites(
            edge,
            trials,
            x,
            tried,
            config.preferences,
            first_round=config.num_rounds,
            margin=config.margin,
            share=config.max_share,
        )
    return TunedRewriter(preferred.x if preferred else x, tuple(rounds), ended, preferred)
