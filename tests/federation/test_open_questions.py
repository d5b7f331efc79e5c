"""Which questions are asked, which answers are believed, and how questions travel."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from co_tuning import model_folder
from hypothesis import given
from hypothesis import strategies as st

from cotune.data.templates import Example
from cotune.errors import InputError
from cotune.federation import open_questions
from cotune.federation.causal_model import CausalModel
from cotune.federation.greedy_texts import write_greedily
from cotune.federation.open_questions import QUESTIONS, Answering, from_arrays, to_arrays

ASKED = ["the cat?", "far?", "hello world?"]


def test_an_answer_is_believed_from_its_mean_probability_on(tmp_path: Path) -> None:
    """The head is made to say one token, then the end, with probabilities that are known."""
    own = CausalModel(str(model_folder(tmp_path / "m", "llama", "byte_level")))
    word, end = own.reader.tokenizer.encode(" cat", add_special_tokens=False).ids[0], own.reader.end_id
    with own.loaded() as model:
        num_tokens = model.get_output_embeddings().weight.shape[0]
        others = math.log(num_tokens - 1)

        def say(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            ends = kwargs["input_ids"][:, -1] == word
            # Of a row, p(word) = 0.9 and then p(end) = 0.4; all other tokens have the rest alike.
            model.wanted = [(end, math.log(0.4 / 0.6)) if one else (word, math.log(9.0)) for one in ends.tolist()]

        def head(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            told = torch.zeros_like(output)
            for row, (token, odds) in enumerate(model.wanted):
                told[row, :, token] = odds + others
            return told

        model.register_forward_pre_hook(say, with_kwargs=True)
        model.get_output_embeddings().register_forward_hook(head)
        text = own.reader.table.pieces[word]
        assert text is not None
        for sure_above, num in ((0.0, 3), (0.59, 3), (0.61, 0)):  # sqrt(0.9 * 0.4) = 0.6
            found = Answering(sure_above=sure_above).answered(model, own.reader, ASKED, max_tokens=64)
            assert found == [Example(one, text.decode()) for one in ASKED][:num]
        # The end does not fit any more: what was written counts alone.
        cut = Answering(sure_above=0.89, max_new_tokens=1).answered(model, own.reader, ASKED, max_tokens=64)
        assert len(cut) == 3
        # The longest question has no room for an answer of 16 tokens.
        lengths = [len(own.reader.tokenizer.encode(one).ids) for one in ASKED]
        short = Answering(sure_above=0.0).answered(model, own.reader, ASKED, max_tokens=max(lengths) + 15)
        assert [one.prompt for one in short] == [
            one for one, num in zip(ASKED, lengths, strict=True) if num < max(lengths)
        ]


def test_what_is_no_text_or_nothing_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = CausalModel(str(model_folder(tmp_path / "m", "llama", "byte_level")))
    with own.loaded() as model:
        (real,) = write_greedily(model, own.reader, ["the cat?"], max_new_tokens=2)
        for text, is_one in ((" fine", True), ("  \n", False), ("", False), (" \ufffd", False)):
            made = type(real)(text, -0.01)
            monkeypatch.setattr(open_questions, "write_greedily", lambda *args, own=made, **options: [own])
            assert (
                Answering().answered(model, own.reader, ["the cat?"], max_tokens=64)
                == [Example("the cat?", text)] * is_one
            )


def test_a_round_asks_some_and_other_rounds_ask_others() -> None:
    questions = [f"{number}?" for number in range(20)]
    own = Answering(per_round=5)
    drawn = [own.chosen(questions, seed=seed) for seed in range(20)]
    assert all(len(set(one)) == 5 and one == sorted(one, key=questions.index) for one in drawn)
    assert drawn[3] == own.chosen(questions, seed=3)
    assert {one for each in drawn for one in each} == set(questions)
    assert own.chosen(questions[:2], seed=0) == questions[:2] and own.chosen([], seed=0) == []


@given(questions=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=5))
def test_questions_travel_whole(questions: list[str]) -> None:
    arrays = to_arrays(questions)
    assert from_arrays(arrays) == questions
    assert bool(arrays) == bool(questions)


@pytest.mark.parametrize("written", [b"{}", b'[""]', b"[3]", b"[", b"\xff"])
def test_what_is_no_list_of_questions_is_refused(written: bytes) -> None:
    with pytest.raises(InputError, match="the questions are "):
        from_arrays({QUESTIONS: np.frombuffer(written, np.uint8)})


def test_settings_and_too_many_questions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, words in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"per_round": 0}, "per_round is 0"),
        ({"sure_above": 1.5}, "sure_above is 1.5"),
        ({"share": -0.5}, "share is -0.5"),
    ):
        with pytest.raises(InputError, match=words):
            Answering(**options)  # type: ignore[arg-type]
    monkeypatch.setattr(open_questions, "MAX_QUESTION_BYTES", 10)
    with pytest.raises(InputError, match="the questions have 13 bytes, at most 10"):
        to_arrays(["a longer?"])
