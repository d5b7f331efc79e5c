"""Settings and checks that all runtimes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from offline_folders import CONTEXT, write_onnx_folder

from cotune.device.offline.folder import OfflineFolder
from cotune.device.offline.model import OfflineSettings, check_extension, check_truncation, num_processors
from cotune.errors import InputError


def test_settings_are_resolved(tmp_path: Path) -> None:
    description = OfflineFolder.open(write_onnx_folder(tmp_path / "model")).description
    assert OfflineSettings().context_of(description) == CONTEXT
    assert OfflineSettings(context=9).context_of(description) == 9
    with pytest.raises(InputError, match=f"context is {CONTEXT + 1}, expected at most {CONTEXT}, which this model"):
        OfflineSettings(context=CONTEXT + 1).context_of(description)
    assert OfflineSettings().threads == num_processors() >= 1
    assert OfflineSettings(num_threads=3).threads == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 1}, "context is 1, expected at least 2"),
        ({"num_threads": 0}, "num_threads is 0, expected 1 to 1024"),
        ({"num_threads": 1025}, "num_threads is 1025"),
        ({"memory_limit_bytes": 0}, "memory_limit_bytes is 0"),
        ({"num_texts": 0}, "num_texts is 0"),
    ],
)
def test_impossible_settings_are_refused(changes: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        OfflineSettings(**changes)


@pytest.mark.parametrize(
    ("ids", "changes", "words"),
    [
        ([], {}, r"token_ids has shape \(0,\)"),
        ([[1]], {}, r"token_ids has shape \(1, 1\)"),
        ([1, 2], {"num_logits": 3}, "num_logits is 3, expected 1 to 2"),
        ([1, 2], {"num_logits": 0}, "num_logits is 0"),
        (
            [1, 2, 3],
            {"length": 6},
            "the text would have 9 tokens, expected at most 8, the context of the offline model",
        ),
        ([1, -1], {}, "token_ids holds -1, expected ids from 0 to 9"),
        ([1, 10], {}, "token_ids holds 10, expected ids from 0 to 9"),
    ],
)
def test_tokens_that_cannot_follow_are_refused(ids: Any, changes: Any, words: str) -> None:
    options = {"length": 0, "context": 8, "vocab_size": 10, "num_logits": 1, **changes}
    with pytest.raises(InputError, match=words):
        check_extension(ids, **options)


def test_tokens_that_just_fit(tmp_path: Path) -> None:
    ids = check_extension([9, 0], length=6, context=8, vocab_size=10, num_logits=2)
    assert ids.dtype == np.int64 and ids.tolist() == [9, 0]


@pytest.mark.parametrize("to", [-1, 6])
def test_only_what_is_there_can_be_cut(to: int) -> None:
    check_truncation(0, length=5)
    check_truncation(5, length=5)
    with pytest.raises(InputError, match=f"length is {to}, expected 0 to 5"):
        check_truncation(to, length=5)
