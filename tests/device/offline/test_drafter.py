"""An offline model as a drafter: alone, and in whole texts with a cloud under bad networks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from offline_folders import CONTEXT, END, TinyLlama, write_onnx_folder
from toy import STOP, VOCAB, ToyBackbone, toy_personal
from toy_plugin import words_json
from virtual_network import VirtualRun, Weather, toy_prompt

from cotune.device.offline.drafter import OfflineDrafter, check_same_tokenizer
from cotune.device.offline.model import OfflineModel, OfflineSettings
from cotune.device.offline.runtimes import load_offline_model
from cotune.errors import MismatchError
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest

TINY = TinyLlama()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfflineModel]:
    folder = write_onnx_folder(tmp_path_factory.mktemp("offline") / "model", TINY)
    made = load_offline_model(folder, OfflineSettings(num_threads=1))
    yield made
    made.close()


def greedy(history: list[int], k: int) -> list[int]:
    path = list(history)
    while len(path) < len(history) + k:
        path.append(int(TINY.logits(path)[-1].argmax()))
        if path[-1] == END:
            break
    return path[len(history) :]


def test_drafts_are_greedy_for_histories_that_grow_and_shrink(model: OfflineModel) -> None:
    drafter = OfflineDrafter(model)
    for history in ([5, 9, 30], [5, 9, 30, 7], [5, 9], [5, 9, 31, 32, 33], [80], [5, 9, 31]):
        for k in (4, 1):
            assert drafter.draft(history, k) == greedy(history, k)


def test_a_draft_ends_with_the_text_and_with_the_context(model: OfflineModel) -> None:
    history = list(np.random.default_rng(0).integers(3, VOCAB, CONTEXT - 2))
    drafter = OfflineDrafter(model)
    assert drafter.draft(history, 5) == greedy(history, 2)[:2]
    assert drafter.draft([*history, 5, 6], 5) == []
    assert drafter.draft([*history, 5, 6, 7, 8], 5) == []
    assert drafter.draft(history[:4], 3) == greedy(history[:4], 3)


def test_tokens_that_the_model_does_not_know_are_no_reason_to_fail(model: OfflineModel) -> None:
    drafter = OfflineDrafter(model)
    assert drafter.draft([5, VOCAB], 3) == [] and drafter.draft([], 3) == [] and drafter.draft([-1], 3) == []
    assert drafter.draft([5], 3) == greedy([5], 3)


def test_a_long_prompt_is_read_over_several_calls(model: OfflineModel) -> None:
    drafter = OfflineDrafter(model)
    assert drafter.draft([5], 1) == greedy([5], 1)
    assert drafter._reader is not None
    drafter._reader._piece = 8
    history = [int(token) for token in np.random.default_rng(1).integers(3, VOCAB, 30)]
    assert [drafter.draft(history, 2) for _ in range(4)] == [[], [], [], greedy(history, 2)]


@pytest.mark.parametrize("schedule", ["drafted", "auto"])
def test_the_text_with_a_cloud_is_that_of_the_reference(model: OfflineModel, schedule: str) -> None:
    """Whatever it drafts; with jitter, repeated frames and cuts."""
    request = GenerationRequest(prompt_ids=toy_prompt(1), max_new_tokens=16, stop_token_ids=(STOP,))
    expected = generate(ToyBackbone(), toy_personal(), request).token_ids
    for seed in range(3):
        run = VirtualRun(
            toy_personal(),
            request,
            schedule=schedule,
            answer="correction",
            weather=Weather(jitter_s=0.03, duplicate=0.1, cut=0.02),
            seed=seed,
            drafter=OfflineDrafter(model),
        ).run()
        assert run.device.token_ids == expected
        assert run.device.num_drafts > 0


def test_only_a_model_with_the_clouds_tokenizer_drafts(model: OfflineModel) -> None:
    check_same_tokenizer(model, words_json())
    with pytest.raises(MismatchError, match="expected the same one to draft with; export an offline model"):
        check_same_tokenizer(model, words_json().replace(b"w96", b"w97"))


def test_a_draft_stops_at_an_end_token(model: OfflineModel, tmp_path: Path) -> None:
    ends = greedy([5, 9, 30], 3)[1:2]
    folder = write_onnx_folder(tmp_path / "model", TINY, end_ids=tuple(ends))
    other = load_offline_model(folder, OfflineSettings(num_threads=1))
    assert OfflineDrafter(other).draft([5, 9, 30], 4) == greedy([5, 9, 30], 4)[:2]
    assert len(OfflineDrafter(model).draft([5, 9, 30], 4)) == 4
