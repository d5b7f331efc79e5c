"""A prompt of a few places, each filled from a list of words or phrases: logits, followed by the score function.

    g = 1/(S - 1) sum_s (l_s - mean l) grad log p(prompt_s)        d log softmax(theta)_j = e_j - p

The loss of each of S drawn prompts is compared with the mean of all (leave-one-out, written out). The logits are those
of a softmax at each place; the form of BDPL (arXiv 2201.08531), +1/p for the word that was drawn and -1/p for all
others, is not used: its direction is worse where p is peaked, and its length has no bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cotune.errors import InputError
from cotune.sandwich.account import Account
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.prompts.variable import PromptLosses

_FEW = 2


class CategoricalPrompt:
    """Words by place.

    Args:
        places: for each place of the prompt the words or phrases that may stand there; an empty one leaves it out.
        num_samples: S, prompts in one estimate.
        response_steps, response_rate: of the descent that stands for the best response.
        seed: of the draws.

    Raises:
        InputError: a place without a choice, or too few samples to compare.

    Example:
        >>> prompt = CategoricalPrompt([["Answer", "Reply"], ["briefly.", "in detail."]])
        >>> prompt.best(np.array([0.0, 1.0, 2.0, 0.0]))
        'Reply briefly.'
    """

    def __init__(
        self,
        places: Sequence[Sequence[str]],
        *,
        num_samples: int = 20,
        response_steps: int = 5,
        response_rate: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not places or not all(len(words) >= 1 for words in places):
            raise InputError("a place of the prompt has no word, expected at least one choice for each")
        if num_samples < _FEW:
            raise InputError(f"num_samples is {num_samples}, expected at least {_FEW} to compare them")
        if response_steps < 1 or not response_rate > 0:
            raise InputError("response_steps and response_rate are those of a descent, expected 1 and above 0 at least")
        self._places = [tuple(words) for words in places]
        self._bounds = np.cumsum([0, *map(len, self._places)]).tolist()
        self._num_samples, self._seed = num_samples, seed
        self._response_steps, self._response_rate = response_steps, response_rate

    def start(self) -> Vector:
        """All words alike."""
        return np.zeros(self._bounds[-1])

    def mixture(self, y: Vector, step: int) -> list[tuple[str, float]]:
        """The likeliest prompt, which is the one that would be shipped."""
        return [(self.best(y), 1.0)]

    def slope(self, y: Vector, losses: PromptLosses, step: int) -> Vector:
        """The score function's estimate of the slope of the expected loss, from S prompts."""
        weights = self._weights(y)
        generator = np.random.default_rng((self._seed, step))
        draws = [[int(generator.choice(len(p), p=p)) for p in weights] for _ in range(self._num_samples)]
        prompts = [self._text(draw) for draw in draws]
        distinct = list(dict.fromkeys(prompts))
        by_prompt = dict(zip(distinct, losses(distinct).tolist(), strict=True))
        found = np.array([by_prompt[prompt] for prompt in prompts])
        slope = np.zeros_like(y)
        for draw, advantage in zip(draws, found - found.mean(), strict=True):
            for place, word in enumerate(draw):
                start = self._bounds[place]
                slope[start : start + len(weights[place])] -= advantage * weights[place]
                slope[start + word] += advantage
        return slope / (self._num_samples - 1)

    def respond(self, y: Vector, losses: PromptLosses, step: int) -> Vector:
        """Some steps down the slope."""
        for _ in range(self._response_steps):
            y = y - self._response_rate * self.slope(y, losses, step)
        return y

    def best(self, y: Vector) -> str:
        """The likeliest word at each place."""
        return self._text([int(np.argmax(p)) for p in self._weights(y)])

    def candidates(self, y: Vector) -> list[str]:
        """The likeliest prompt, and those that differ from it in one place."""
        likeliest = [int(np.argmax(p)) for p in self._weights(y)]
        found = [self._text(likeliest)]
        for place, words in enumerate(self._places):
            for word in range(len(words)):
                found.append(self._text([*likeliest[:place], word, *likeliest[place + 1 :]]))
        return list(dict.fromkeys(found))

    def count_in(self, account: Account) -> None:
        """No model writes these."""

    def _weights(self, y: Vector) -> list[Vector]:
        parts = [y[start:end] for start, end in zip(self._bounds, self._bounds[1:], strict=False)]
        raised = [np.exp(part - part.max()) for part in parts]
        return [np.asarray(part / part.sum()) for part in raised]

    def _text(self, draw: Sequence[int]) -> str:
        return " ".join(filter(None, (words[word] for words, word in zip(self._places, draw, strict=True))))
