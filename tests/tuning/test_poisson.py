from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.tuning.poisson import NOISE, SAMPLING, PoissonBatches, SecretSeed, WholeBatches


def batches(num_texts: int, rate: float, *, seed: int = 1, part: int = 3) -> PoissonBatches[list[int]]:
    return PoissonBatches(
        num_texts, sample_rate=rate, num_part_texts=part, secret=SecretSeed(seed), take=lambda chosen: chosen.tolist()
    )


def test_every_text_is_drawn_with_the_stated_rate_and_by_itself() -> None:
    num_texts, rate, num_steps = 40, 0.15, 4000
    drawn = np.zeros((num_steps, num_texts))
    source = batches(num_texts, rate)
    for step in range(num_steps):
        drawn[step, source.draw(step)] = 1
    # Five standard errors of a share; of a correlation of independent draws.
    assert np.abs(drawn.mean(axis=0) - rate).max() < 5 * np.sqrt(rate * (1 - rate) / num_steps)
    correlations = np.corrcoef(drawn.T)[~np.eye(num_texts, dtype=bool)]
    assert np.abs(correlations).max() < 5 / np.sqrt(num_steps)
    # Sizes are binomial, not fixed.
    sizes = drawn.sum(axis=1)
    assert abs(sizes.var() - num_texts * rate * (1 - rate)) < 0.1 * num_texts * rate
    successive = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    assert abs(successive) < 5 / np.sqrt(drawn.size)


def test_a_batch_comes_in_parts_that_fit_and_may_be_empty() -> None:
    source = batches(10, 0.5)
    for batch, step in zip(source.epoch(3), range(6, 8), strict=True):
        assert [text for part in batch.parts for text in part] == source.draw(step).tolist()
        assert all(1 <= len(part) <= 3 for part in batch.parts)
    empty = batches(2, 0.01)
    assert len(empty) == 100
    assert sum(not batch.parts for batch in empty.epoch(0)) > 80


def test_rate_one_takes_all_texts_always() -> None:
    assert batches(5, 1.0).draw(7).tolist() == [0, 1, 2, 3, 4]
    assert len(batches(5, 1.0)) == 1


def test_the_secret_decides_and_is_read_late() -> None:
    source, other = batches(200, 0.1, seed=1), batches(200, 0.1, seed=2)
    assert source.draw(0).tolist() != other.draw(0).tolist()
    assert source.draw(0).tolist() != source.draw(1).tolist()
    secret = SecretSeed(1)
    late: PoissonBatches[NDArray[np.int64]] = PoissonBatches(
        200, sample_rate=0.1, num_part_texts=200, secret=secret, take=lambda chosen: chosen
    )
    secret.load_tensor(SecretSeed(2).to_tensor())
    assert next(iter(late.epoch(0))).parts[0].tolist() == other.draw(0).tolist()


def test_purposes_and_steps_share_no_numbers() -> None:
    secret = SecretSeed(2**128 - 1)
    drawn = [secret.generator(purpose, step).random() for purpose in (SAMPLING, NOISE) for step in range(3)]
    assert len(set(drawn)) == 6
    # The high bits count too.
    assert SecretSeed(1).generator(NOISE, 0).random() != SecretSeed(1 + 2**127).generator(NOISE, 0).random()


def test_a_drawn_secret_is_new_and_does_not_show() -> None:
    first, second = SecretSeed.draw(), SecretSeed.draw()
    assert first.value != second.value
    assert str(first.value) not in repr(first) and repr(first) == "SecretSeed(...)"
    copy = SecretSeed(0)
    copy.load_tensor(first.to_tensor())
    assert copy == first


def test_whole_batches_have_every_text_once() -> None:
    whole = WholeBatches(7, 3, lambda chosen: chosen.tolist())
    assert [batch.parts for batch in whole.epoch(0)] == [([0, 1, 2],), ([3, 4],), ([5, 6],)]
    assert len(whole) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_texts": 0}, "there are no texts"),
        ({"sample_rate": 0.0}, "sample_rate is 0.0"),
        ({"sample_rate": 1.1}, "sample_rate is 1.1"),
        ({"num_part_texts": 0}, "num_part_texts is 0"),
    ],
)
def test_bad_settings(settings: dict[str, float], words: str) -> None:
    given = {"num_texts": 4, "sample_rate": 0.5, "num_part_texts": 2, **settings}
    with pytest.raises(InputError, match=words):
        PoissonBatches(given.pop("num_texts"), secret=SecretSeed(0), take=lambda chosen: chosen, **given)


def test_bad_secrets() -> None:
    with pytest.raises(InputError, match="129 bits"):
        SecretSeed(2**128)
    with pytest.raises(InputError, match="secret seed is damaged"):
        SecretSeed(0).load_tensor(torch.zeros(4, dtype=torch.uint8))
