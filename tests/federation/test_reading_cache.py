"""Readings come back as they were stored, are asked for once, and are never another's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from co_tuning import domain_texts, reader_of
from device_models import device_model

from cotune.distillation.mutual_loss import ChunkReadings, MutualLoss, MutualLossConfig
from cotune.distillation.paired_texts import PairedText, pair_texts
from cotune.errors import InputError
from cotune.federation.mutual_descent import read_chunks
from cotune.federation.reading_cache import ReadingCache

CONFIG = MutualLossConfig(token_weight=0.5, top_k=4, drops_merged=True)


@pytest.fixture(scope="module")
def texts() -> list[PairedText]:
    return pair_texts(domain_texts("law", 4), reader_of("byte_level"), reader_of("unigram"), max_tokens=64)


def read_with(config: MutualLossConfig, texts: list[PairedText], asked: list[int]) -> dict[int, ChunkReadings]:
    loss = MutualLoss(config, reader_of("byte_level").table, reader_of("unigram").table)
    model = device_model("llama", vocab_size=len(reader_of("byte_level").table))
    return dict(zip(asked, read_chunks(model, [texts[number] for number in asked], 0, loss), strict=True))


def test_readings_come_back_and_are_asked_for_once(tmp_path: Path, texts: list[PairedText]) -> None:
    known = read_with(CONFIG, texts, [0, 1, 3])
    asked: list[int] = []

    def read(some: Sequence[PairedText]) -> list[ChunkReadings]:
        numbers = [next(number for number, one in enumerate(texts) if one is text) for text in some]
        asked.extend(numbers)
        return [known[number] for number in numbers]

    cache = ReadingCache(tmp_path, teacher="proxy 1", config=CONFIG)
    assert cache.fill(texts, [3, 1, 3], read) == 2 and sorted(asked) == [1, 3]
    assert cache.fill(texts, [0, 1], read) == 1 and asked[2:] == [0]
    for number, one in known.items():
        found = cache.get(texts[number])
        assert torch.equal(found.log_likelihoods, one.log_likelihoods)
        assert found.next_bytes is not None and one.next_bytes is not None
        assert torch.allclose(found.next_bytes, one.next_bytes, rtol=1e-3, atol=0)
        assert found.top_common is not None and one.top_common is not None
        assert torch.equal(found.top_common.places, one.top_common.places)
        assert torch.equal(found.top_common.log_probs, one.top_common.log_probs)
        assert found.merged is not None and one.merged is not None and torch.equal(found.merged, one.merged)


def test_what_is_read_together_does_not_depend_on_what_is_there(tmp_path: Path, texts: list[PairedText]) -> None:
    known = read_with(CONFIG, texts, [0, 1, 2, 3])
    by_length = sorted(known, key=lambda number: texts[number].alignment.num_bytes)
    groups: list[list[int]] = []

    def read(some: Sequence[PairedText]) -> list[ChunkReadings]:
        groups.append([next(number for number, one in enumerate(texts) if one is text) for text in some])
        return [known[number] for number in groups[-1]]

    cache = ReadingCache(tmp_path, teacher="proxy 1", config=CONFIG)
    assert cache.fill(texts, known, read, at_once=3) == 4 and groups == [by_length[:3], by_length[3:]]
    # As if it had been interrupted behind the first two, it reads all three of that group, and keeps what is there.
    (lost,) = sorted(tmp_path.glob("*.readings"), key=lambda file: file.stat().st_mtime_ns)[2:3]
    contents = {file: file.read_bytes() for file in tmp_path.glob("*.readings")}
    lost.unlink()
    assert cache.fill(texts, known, read, at_once=3) == 1 and groups[2:] == [by_length[:3]]
    assert {file: file.read_bytes() for file in tmp_path.glob("*.readings")} == contents


def test_a_text_that_is_there_twice_is_read_once(tmp_path: Path, texts: list[PairedText]) -> None:
    known, sizes = read_with(CONFIG, texts, [0, 1]), []

    def read(some: Sequence[PairedText]) -> list[ChunkReadings]:
        sizes.append(len(some))
        return [known[texts.index(text)] for text in some]

    cache = ReadingCache(tmp_path, teacher="proxy 1", config=CONFIG)
    twice = [texts[0], texts[1], texts[0]]
    assert cache.fill(twice, [0, 1, 2], read, at_once=3) == 2 and sizes == [2]
    assert torch.equal(cache.get(twice[2]).log_likelihoods, known[0].log_likelihoods)


def test_another_teacher_another_loss_and_another_text_are_not_there(tmp_path: Path, texts: list[PairedText]) -> None:
    known = read_with(CONFIG, texts, [0])
    cache = ReadingCache(tmp_path, teacher="proxy 1", config=CONFIG)
    cache.fill(texts, [0], lambda some: [known[0]])
    for teacher, config, number in (
        ("proxy 2", CONFIG, 0),
        ("proxy 1", MutualLossConfig(), 0),
        ("proxy 1", CONFIG, 1),
    ):
        with pytest.raises(InputError, match="a reading is missing"):
            ReadingCache(tmp_path, teacher=teacher, config=config).get(texts[number])
    # The size that is reserved is never less than what is written.
    (file,) = tmp_path.glob("*.readings")
    assert file.stat().st_size <= cache._num_bytes(texts[0]) < 2 * file.stat().st_size


def test_what_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path, texts: list[PairedText]) -> None:
    cache = ReadingCache(tmp_path, teacher="proxy 1", config=CONFIG, max_bytes=2000)
    with pytest.raises(InputError, match="may take 2,000 bytes"):
        cache.fill(texts, [0, 1], lambda some: pytest.fail("nothing may be read"))
