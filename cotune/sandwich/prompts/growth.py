"""A pool that grows: a language model reads failures and writes new prompts, a race says who stays.

After GEPA (arXiv 2507.19457): the prompt that leads is shown with requests that it was answered badly under, and a
better one is asked for, once for each new prompt, with other failures each time. Whoever is in the pool then races on
one draw of training examples (`cotune.sandwich.prompts.race`), and as many as there may be are left.

The model that reflects is the cloud itself, another one, or the edge (`cotune.sandwich.prompts.reflection`); whatever
is sent for it goes through a door with the run's budget, cache, ledger and log. It reads redacted requests and the
cloud's answers, redacted once more; which answers were wanted is shown where the user says so, since targets stay here
otherwise. A prompt that it writes and in which a detector finds something, or a placeholder stands, is thrown away.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cotune.errors import BudgetError, InputError
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.pipeline import Pipeline
from cotune.sandwich.prompts.pool import MAX_PROMPTS, PromptPool
from cotune.sandwich.prompts.race import RaceConfig, race
from cotune.sandwich.prompts.reflection import Reflect
from cotune.sandwich.redact import RedactedJson
from cotune.sandwich.text_problem import FitExample, TextProblem

_TASK = (
    "An instruction stands below, and requests that were answered badly under it. Write a better instruction: one that "
    "would have led to better answers, and that also fits other requests of this kind. Words in angle brackets stand "
    "for things that were left out; do not use them. Write the instruction alone, in at most 60 words."
)
_FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """How a pool grows; how often is `SolveConfig.grow_every`."""

    num_new: int = 2
    """Prompts that are asked for each time, one by one."""
    max_prompts: int | None = None
    """That are left after each race; None: as many as there were to begin with. The leader stays in any case."""
    num_failures: int = 3
    """Requests that are shown for each new prompt, at most."""
    num_examples: int = 8
    """Training examples of the race, among which the failures are looked for; at most as many as there are."""
    shows_targets: bool = False
    """Whether the answers that were wanted are shown too, redacted: then targets leave the device, but to the edge."""
    max_tokens: int = 128
    """Of an answer of the model that reflects; the edge has a limit of its own."""
    max_chars: int = 1000
    """Of each text that it is shown, and of a prompt that it writes."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        for name in ("num_new", "num_failures", "max_tokens", "max_chars"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_examples < 2:
            raise InputError(f"num_examples is {self.num_examples}, expected at least 2, since a race compares means")
        if self.max_prompts is not None and not 1 <= self.max_prompts <= MAX_PROMPTS - 2:
            raise InputError(f"max_prompts is {self.max_prompts}, expected 1 to {MAX_PROMPTS - 2}")


@dataclass(frozen=True)
class Growth:
    """One time that a pool was to grow.

    Attributes:
        leader: the prompt whose failures were read.
        num_written: prompts that came and could be used.
        joined, left: that are in the pool since, and that are not any more.
        ended_by_budget: there was no room for it, so the pool stayed, and will.
    """

    leader: str
    num_written: int = 0
    joined: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    ended_by_budget: bool = False


class PoolGrowth:
    """Grows the pool of a problem; a `Grow` for `solve`.

    Args:
        pipeline: whose redactor looks at what is shown and at what is written.
        problem: with a `PromptPool`, which is replaced by a grown one.
        examples: that the search sees.
        config: how.
        reflect: asks the model that reads failures.
        key: secret of the run; the same one gives the same requests again.

    Raises:
        InputError: the problem's prompt is no pool.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        problem: TextProblem,
        examples: Sequence[FitExample],
        config: GrowthConfig,
        *,
        reflect: Reflect,
        key: bytes,
    ) -> None:
        self._pipeline, self._problem, self._config, self._key = pipeline, problem, config, key
        self._examples, self._reflect = examples, reflect
        self._max_prompts = config.max_prompts or len(self._pool.prompts)
        self.growths: list[Growth] = []

    @property
    def _pool(self) -> PromptPool:
        if not isinstance(self._problem.variable, PromptPool):
            raise InputError(
                "a pool shall grow and the prompt variable is none, expected a PromptPool; leave growth out"
            )
        return self._problem.variable

    def __call__(self, x: Vector, y: Vector, keep: Sequence[int]) -> list[int | None] | None:
        """Grow; see `cotune.sandwich.bilevel.solve.Grow`. Where the budget ends, the pool stays as it is from then on.

        Raises:
            RedactionError, WireError: a cloud or a detector failed.
        """
        if self.growths and self.growths[-1].ended_by_budget:
            return None
        prompts = self._pool.prompts
        leader = self._pool.best(y)
        try:
            drawn = self._draw()
            written = self._write(leader, self._failures(x, leader, drawn))
            stay = self._race(x, [*prompts, *written], drawn) if written else prompts
        except BudgetError:
            self.growths.append(Growth(leader, ended_by_budget=True))
            return None
        kept = {prompts[place] for place in keep}
        left = [prompt for prompt in (*prompts, *written) if prompt in kept or prompt in stay]
        joined = tuple(prompt for prompt in left if prompt not in prompts)
        gone = tuple(prompt for prompt in prompts if prompt not in left)
        self.growths.append(Growth(leader, len(written), joined, gone))
        if not joined and not gone:
            return None
        self._problem.variable = PromptPool(left)
        return [prompts.index(prompt) if prompt in prompts else None for prompt in left]

    def _draw(self) -> list[FitExample]:
        generator = np.random.default_rng((self._config.seed, len(self.growths)))
        size = min(self._config.num_examples, len(self._examples))
        return [self._examples[index] for index in generator.choice(len(self._examples), size, replace=False)]

    def _failures(self, x: Vector, leader: str, drawn: Sequence[FitExample]) -> list[FitExample]:
        """Those that are not answered perfectly, the worst first."""
        losses = self._problem.losses(x, [leader], drawn)[0]
        return [drawn[index] for index in np.argsort(-losses, kind="stable") if losses[index] > 0]

    def _write(self, leader: str, failures: Sequence[FitExample]) -> list[str]:
        """New prompts, fewer where some cannot be used; none where nothing fails."""
        written = list[str]()
        for number in range(self._config.num_new if failures else 0):
            # Each with others before: the first of what is shown weighs most.
            start = number * self._config.num_failures % len(failures)
            shown = (list(failures[start:]) + list(failures[:start]))[: self._config.num_failures]
            prompt = prompt_of(self._reflect(self._messages(leader, shown, number)))
            known = (*self._pool.prompts, *written)
            if prompt and prompt not in known and len(prompt) <= self._config.max_chars and self._is_clean(prompt):
                written.append(prompt)
        return written

    def _is_clean(self, prompt: str) -> bool:
        return not self._pipeline.redactor.request().redact(prompt).replacements

    def _messages(self, leader: str, shown: Sequence[FitExample], number: int) -> RedactedJson:
        parts = [f"Instruction: {leader or '(none)'}"]
        for example in shown:
            question = "\n".join(each.value[0]["content"] for each in example.prepared.questions)
            answer = "\n".join(each.text for each in self._problem.table.answers(leader, example))
            parts.append(f"Request: {self._clipped(question)}\nAnswer: {self._clipped(answer)}")
            if self._config.shows_targets:
                parts[-1] += f"\nWanted: {self._clipped(example.target)}"
        turns = [{"role": "system", "content": _TASK}, {"role": "user", "content": "\n\n".join(parts)}]
        # Once more through the redactor: an answer may hold what the cloud made up and a detector takes for private.
        seed = hashlib.blake2b(f"growth {len(self.growths)} {number}".encode(), key=self._key).digest()
        request = self._pipeline.redactor.anew().request(random.Random(seed))
        return request.redact_messages(turns)

    def _clipped(self, text: str) -> str:
        return text[: self._config.max_chars]

    def _race(self, x: Vector, prompts: Sequence[str], drawn: Sequence[FitExample]) -> tuple[str, ...]:
        def losses(them: Sequence[str], part: slice) -> Vector:
            return self._problem.losses(x, them, drawn[part])

        return race(prompts, len(drawn), losses, RaceConfig(num_left=self._max_prompts)).left


def prompt_of(text: str) -> str:
    """The prompt in an answer: what stands between the first fences, else all of it.

    Example:
        >>> prompt_of("Here it is:\\n```\\nBe brief.\\n```")
        'Be brief.'
    """
    fenced = _FENCE.search(text)
    return (fenced[1] if fenced else text).strip().strip('"').strip()
