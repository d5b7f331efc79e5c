"""How much a question is one of a device's own: by this, its own model and a shared one are weighed.

Out of its domain a small model is as sure of itself as within, so what it says of its answers cannot tell; the question
can. With x the words of a prompt, alone and in pairs, tf-idf weighted and of length 1, logistic regression gives

    p(own | x) = 1 / (1 + exp(-(w x + b))),    min over w, b of  |w|^2 / 2 + C sum_i v_i loss_i,

where the weights v make both kinds of prompts equally likely beforehand, and C is the one that cross-validation finds.
So where prompts of both kinds are alike, everything is near 1/2. To weigh experts by the chance that a text is of their
domain is from DEMix (Gururangan et al. 2022, arXiv 2108.05036), which asks the language models for it; ours have learnt
answers alone, and say nothing of questions.

It is learnt where it is asked for, and neither kept nor sent: of some hundred prompts in a third of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from cotune.errors import InputError

MAX_FOLDS = 5
STRENGTHS = tuple(10.0 ** (power / 2) for power in range(-2, 9))
"""Of the fit to the prompts, C."""
# A word, or a single character that is none; of what is written without spaces each character is a word.
_WORD = r"(?:(?![\u0e00-\u0fff\u3040-\u30ff\u3400-\u9fff])\w)+|\S"


class OwnDomain:
    """Tells prompts of a device's domain from others, see `OwnDomain.of`."""

    def __init__(self, classifier: Any) -> None:
        self._classifier = classifier

    @classmethod
    def of(cls, own: Sequence[str], others: Sequence[str]) -> Self:
        """Learn what tells them apart.

        Args:
            own: prompts of the device, such as those that its model has learnt.
            others: prompts of anybody, such as the server's public texts and questions; some may be like the own ones.

        Raises:
            InputError: there are not two of each with a word in them.

        Example:
            >>> domain = OwnDomain.of(["Is the oven hot?", "Is the pan hot?"], ["2 + 2 =", "3 + 4 ="])
            >>> ours, theirs = domain.chances(["Is the kettle hot?", "2 + 4 ="])
            >>> ours > 0.5 > theirs
            True
        """
        # A second, which whoever weighs nothing need not wait.
        from sklearn.metrics import log_loss
        from sklearn.model_selection import StratifiedKFold, cross_val_predict

        kinds = {name: [one for one in prompts if one.strip()] for name, prompts in (("own", own), ("others", others))}
        for name, prompts in kinds.items():
            if len(prompts) < 2:
                raise InputError(
                    f"{name} has {len(prompts)} prompts with words in them, expected at least 2; give more, or weigh "
                    "both models alike"
                )
        prompts = [*kinds["own"], *kinds["others"]]
        is_own = np.repeat([True, False], [len(one) for one in kinds.values()])
        alike = np.where(is_own, 1 / is_own.sum(), 1 / (~is_own).sum())
        folds = StratifiedKFold(min(MAX_FOLDS, *map(len, kinds.values())))

        def loss(strength: float) -> float:
            told = cross_val_predict(_classifier(strength), prompts, is_own, cv=folds, method="predict_proba")
            return float(log_loss(is_own, told, sample_weight=alike))

        return cls(_classifier(min(STRENGTHS, key=loss)).fit(prompts, is_own))

    def chances(self, prompts: Sequence[str]) -> list[float]:
        """p(own | prompt) of each, between 0 and 1."""
        if not prompts:
            return []
        return [float(one) for one in self._classifier.predict_proba(prompts)[:, 1]]


def _classifier(strength: float) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(token_pattern=_WORD, ngram_range=(1, 2))
    return make_pipeline(words, LogisticRegression(C=strength, class_weight="balanced", max_iter=1000))
