"""Tune the edge before the cloud further, by pairs of rewrites of one request, of which one came to more (DPO).

    score(u) = final loss of u + leak_weight * leak(u)
    pairs    two rewrites of one request whose scores are at least `min_gap` apart, the smaller one preferred
    x <- descent on the mean of -log sigmoid(beta [(log p_x(w) - log p_0(w)) - (log p_x(l) - log p_0(l))])

p_0 is the edge as supervised tuning left it. With an adapter that is a few numbers in another place: log p_0 of a pair
is computed once, before any step on it, and kept, so that no second model is in memory. The pairs are of the rewrites
of all supervised rounds, which cost nothing more, and of further rounds, drawn at the x of then (iterative DPO, as
Matryoshka Pilot, arXiv 2410.20749, trains its controller). What was thrown away since a marked unit would have been
sent is the worse half of a pair without ever being sent.

What is used afterwards is what the edge writes greedily. So that is asked for a few requests before and after: pairs
that did more harm than good there are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from cotune.errors import BudgetError, InputError
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.bilevel.step_rules import AdamRule, clipped
from cotune.sandwich.rewrite_trials import AskedRequest, Preference, RewriteRound, RewritingEdge, Trial, Trials

MAX_NORM = 10.0
"""Of a slope; longer ones are shortened to it."""


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """How a rewriter learns from pairs."""

    num_rounds: int = 1
    """Of drawing, asking, learning, after the supervised ones."""
    beta: float = 0.1
    """How strongly the supervised rewriter holds; 0.1 is what the paper of DPO takes for most of its studies."""
    leak_weight: float = 1.0
    """Of the share of a request's marked units that a rewrite would send; a loss is at most 1."""
    min_gap: float = 0.05
    """By how much the scores of a pair must differ; smaller gaps are mostly noise of the metric."""
    num_steps: int = 10
    """Of descent in a round, each on all pairs so far."""
    x_rate: float = 5e-4
    """Of Adam; much less than the supervised one: long steps tell pairs apart by making both texts unlikely."""

    def __post_init__(self) -> None:
        for name in ("num_rounds", "num_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("beta", "min_gap", "x_rate"):
            if not 0 < getattr(self, name) < np.inf:
                raise InputError(f"{name} is {getattr(self, name)}, expected a positive number")
        if not 0 <= self.leak_weight < np.inf:
            raise InputError(f"leak_weight is {self.leak_weight}, expected 0 or more")


@dataclass(frozen=True)
class RewriterLook:
    """What rewrites are worth that the edge writes greedily; an empty one leaves the request as it is.

    Attributes:
        num_requests: that were rewritten, of those that are learnt from.
        num_accepted: whose rewrite was answered better than the request as it is, by more than the margin.
        num_leaks: whose rewrite was not sent, since a marked unit would have been.
        loss, leak: means; those of the request where there is no rewrite, a loss of 1 where it was not sent.
    """

    num_requests: int
    num_accepted: int
    num_leaks: int
    loss: float
    leak: float


@dataclass(frozen=True)
class PreferredRewriter:
    """What came of learning from pairs.

    Attributes:
        x: the edge's numbers; those of the supervised rewriter where the pairs are not kept.
        num_pairs: that were learnt from.
        loss: their mean at the end; log 2 at the reference.
        share_right: of the pairs of which the better text gained on the worse one.
        rounds: that drew rewrites for pairs.
        before, after: what rewrites of the same requests were worth; after is None where nothing was learnt or the
            budget ended before.
        is_kept: the pairs did no harm: loss plus weighted leak is not larger after than before.
        ended_by_budget: there was no room for all of it.
    """

    x: Vector = field(repr=False)
    num_pairs: int
    loss: float | None
    share_right: float | None
    rounds: tuple[RewriteRound, ...]
    before: RewriterLook
    after: RewriterLook | None
    is_kept: bool
    ended_by_budget: bool

    def to_json(self) -> dict[str, Any]:
        """All but x."""
        fields = {name: value for name, value in vars(self).items() if name != "x"}
        looks = {name: None if fields[name] is None else asdict(fields[name]) for name in ("before", "after")}
        return {**fields, **looks, "rounds": [asdict(each) for each in self.rounds]}

    def to_text(self) -> str:
        """A line for people."""
        if not self.num_pairs or self.loss is None or self.share_right is None:
            return "preferences no two rewrites of a request were far enough apart, so nothing was learnt from pairs"
        before, after = self.before, self.after
        learnt = (
            f"preferences {self.num_pairs} pairs, loss {np.log(2):.3f} -> {self.loss:.3f}, "
            f"{self.share_right:.0%} told apart"
        )
        if after is None:
            return f"{learnt}; the budget ended before they were judged, so they are not kept"
        judged = (
            f"accepted {before.num_accepted} -> {after.num_accepted} of {after.num_requests}, "
            f"loss of rewrites {before.loss:.3f} -> {after.loss:.3f}"
        )
        return f"{learnt}; {judged}; {'kept' if self.is_kept else 'worse, so not kept'}"


def prefer_rewrites(
    edge: RewritingEdge,
    trials: Trials,
    x: Vector,
    tried: Sequence[Trial],
    config: PreferenceConfig,
    *,
    first_round: int,
    margin: float,
    share: float,
) -> PreferredRewriter | None:
    """Learn from pairs, beginning at a supervised rewriter.

    Args:
        edge: writes and learns.
        trials: asks.
        x: of the supervised rewriter: the reference.
        tried: of its rounds.
        config: how.
        first_round: the number of the first round; later ones count on.
        margin: of accepted rewrites.
        share: of the budget, see `Trials.draw`. The last look may go beyond it, since what came before would be lost.

    Returns:
        None where the budget ended before there was a first look.

    Raises:
        RedactionError, WireError: a detector or the cloud failed; what was paid for is in the cache.
    """
    try:
        judged = [
            trials.ask(index, f"look {index}", share=share)
            for index in trials.choose(trials.generator(first_round + config.num_rounds))
        ]
        before = _look(edge, trials, x, judged, margin)
    except BudgetError:
        return None
    learner = _Learner(edge, x, config)
    learner.add(tried)
    rounds, ended = list[RewriteRound](), False
    for number in range(first_round, first_round + config.num_rounds):
        drawn, ended = trials.draw(learner.x, number, share=share)
        if drawn:
            rounds.append(RewriteRound.of(drawn, margin))
            learner.add(drawn)
        learner.descend()
        if ended:
            break
    loss, share_right = learner.told_apart() if learner.pairs else (None, None)
    after, is_kept = None, False
    if learner.pairs:
        try:
            after = _look(edge, trials, learner.x, judged, margin)
            is_kept = _score(after, config) <= _score(before, config)
        except BudgetError:
            ended = True
    return PreferredRewriter(
        x=learner.x if is_kept else x,
        num_pairs=len(learner.pairs),
        loss=loss,
        share_right=share_right,
        rounds=tuple(rounds),
        before=before,
        after=after,
        is_kept=is_kept,
        ended_by_budget=ended,
    )


def preferences_of(trial: Trial, *, leak_weight: float, min_gap: float) -> list[Preference]:
    """All pairs of a request's rewrites whose scores are at least so far apart.

    Example:
        >>> good, leaking = Rewrite("Town?", 0.0, 0.0, is_sent=True), Rewrite("Ann?", 1.0, 1.0, is_sent=False)
        >>> request = AskedRequest(PrivateExample("Ann's?", "Rome"), b"", "Ask:", Rewrite("?", 1.0, 0.0, is_sent=True))
        >>> preferences_of(Trial(request, (leaking, good)), leak_weight=1.0, min_gap=0.05)
        [Preference(read='Ask:', better='Town?', worse='Ann?')]
    """
    found = []
    for one, other in combinations(trial.rewrites, 2):
        gap = other.score(leak_weight) - one.score(leak_weight)
        if abs(gap) >= min_gap:
            better, worse = (one, other) if gap > 0 else (other, one)
            found.append(Preference(trial.request.read, better.text, worse.text))
    return found


class _Learner:
    """Pairs, what the reference thinks of them, and x on its way from there."""

    def __init__(self, edge: RewritingEdge, x: Vector, config: PreferenceConfig) -> None:
        self._edge, self._start, self._config = edge, x, config
        self._rule, self._num_steps = AdamRule(), 0
        self._reference = np.zeros((0, 2))
        self.x, self.pairs = x, list[Preference]()

    def add(self, trials: Sequence[Trial]) -> None:
        """Pairs of more trials, read once at the reference."""
        weight, gap = self._config.leak_weight, self._config.min_gap
        new = [pair for each in trials for pair in preferences_of(each, leak_weight=weight, min_gap=gap)]
        if new:
            texts = [(each.read, text) for each in new for text in (each.better, each.worse)]
            found = self._edge.log_probs_after(self._start, texts).reshape(-1, 2)
            self.pairs += new
            self._reference = np.concatenate([self._reference, found])

    def descend(self) -> None:
        """A round's steps."""
        beta, rate = self._config.beta, self._config.x_rate
        for _ in range(self._config.num_steps if self.pairs else 0):
            _, slope = self._edge.preference_gradient(self.x, self.pairs, self._reference, self._num_steps, beta=beta)
            self.x = self._rule.step(self.x, clipped(slope, MAX_NORM), rate)
            self._num_steps += 1

    def told_apart(self) -> tuple[float, float]:
        """The mean loss at x, and the share of pairs below that of the reference, log 2."""
        losses = self._edge.preference_losses(self.x, self.pairs, self._reference, beta=self._config.beta)
        return float(losses.mean()), float((losses < np.log(2)).mean())


def _look(
    edge: RewritingEdge, trials: Trials, x: Vector, requests: Sequence[AskedRequest], margin: float
) -> RewriterLook:
    written = edge.write_after(x, [each.read for each in requests])
    tried = [trials.try_texts(request, [text]) for request, text in zip(requests, written, strict=True)]
    used = [each.rewrites[0] if each.rewrites else each.request.plain for each in tried]
    return RewriterLook(
        num_requests=len(tried),
        num_accepted=sum(each.best(margin) is not None for each in tried),
        num_leaks=sum(not each.is_sent for each in used),
        loss=float(np.mean([each.loss for each in used])),
        leak=float(np.mean([each.leak for each in used])),
    )


def _score(look: RewriterLook, config: PreferenceConfig) -> float:
    return look.loss + config.leak_weight * look.leak
