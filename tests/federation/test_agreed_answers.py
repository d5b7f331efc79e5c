"""Two models answer together: the larger product of probabilities, worked token by token, whatever their tokenizers."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from co_tuning import KINDS, model_folder

from cotune.data.batches import split_tokens
from cotune.data.templates import Example
from cotune.errors import InputError
from cotune.federation import agreed_answers
from cotune.federation.agreed_answers import answer_together
from cotune.federation.causal_model import CausalModel
from cotune.federation.greedy_texts import GreedyText
from cotune.federation.tuned_model import TunedModel
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone

PROMPTS = ["the cat?", "the", "hello world", "far cat?", "the theory", "two hats"]


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TunedModel]:
    root = tmp_path_factory.mktemp("agreed")
    return {
        family: TunedModel(CausalModel(str(model_folder(root / family, family, KINDS[family], seed=seed))))
        for family, seed in (("gpt2", 4), ("llama", 7), ("mamba2", 5))
    }


def log_likelihood(own: TunedModel, prompt: str, answer: str) -> float:
    """Of an answer and its end behind the prompt's own tokens, one after the other."""
    reader, total = own.model.reader, 0.0
    ids, answer_ids = split_tokens(reader.tokenizer, Example(prompt, answer))
    with own.loaded() as model, torch.no_grad():
        for token in [*answer_ids, reader.end_id]:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            total += float(logits.double().log_softmax(0)[token])
            ids = [*ids, token]
    return total


def written_as(monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[str]]) -> None:
    """Models that write what is said here, and judge as they do."""

    def write(model: torch.nn.Module, reader: object, prompts: list[str], **options: object) -> list[GreedyText]:
        family = type(model).__name__.lower()
        (own,) = (texts for name, texts in answers.items() if family.startswith(name))
        return [GreedyText(one, 0.0) for one in own[: len(prompts)]]

    monkeypatch.setattr(agreed_answers, "write_greedily", write)


def test_the_answer_with_the_larger_product_is_given(
    writers: dict[str, TunedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {
        "gpt2": [" the mats", " hats", " seven", " the hat", " cat", " dog"],
        "llama": [" other dog", " hats", " hat", " far", " mats sat", " world"],
        "mamba2": [" sat", " no", " cat", " the far dog", " hats", " hello"],
    }
    written_as(monkeypatch, answers)
    found = answer_together(writers, PROMPTS, max_new_tokens=4, max_tokens=48)
    takers = set()
    for number, (prompt, one) in enumerate(zip(PROMPTS, found, strict=True)):
        said = {name: texts[number] for name, texts in answers.items()}
        told = {
            text: {name: log_likelihood(own, prompt, text) for name, own in writers.items()} for text in said.values()
        }
        best = max(told, key=lambda text: sum(told[text].values()))
        assert one.text == best and one.log_likelihoods == pytest.approx(told[best], rel=1e-3)
        assert one.written == said and said[one.by] == best
        takers.add(one.by)
        assert one.by == next(name for name, text in said.items() if text == best)
    assert len(takers) > 1, "or nothing was chosen"


def test_who_counts_more_has_the_say(writers: dict[str, TunedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    two = {name: writers[name] for name in ("gpt2", "llama")}
    answers = {"gpt2": [" the mats", " hats", " seven"], "llama": [" other dog", " far", " hat"]}
    written_as(monkeypatch, answers)
    ask = partial(answer_together, two, PROMPTS[:3], max_new_tokens=4, max_tokens=48)
    alike = ask()
    assert ask(weights=[{"gpt2": 0.5, "llama": 0.5}] * 3) == [
        replace(one, weights={"gpt2": 0.5, "llama": 0.5}) for one in alike
    ], "only the ratio counts"
    says = [{"gpt2": 1.0, "llama": 0.0}, {"gpt2": 0.0, "llama": 1.0}, {"gpt2": 0.25, "llama": 0.75}]
    found = ask(weights=says)
    for number, (one, prompt, weights) in enumerate(zip(found, PROMPTS, says, strict=False)):
        told = {
            text: sum(weights[name] * log_likelihood(own, prompt, text) for name, own in two.items())
            for text in (texts[number] for texts in answers.values())
        }
        assert one.text == max(told, key=told.__getitem__) and one.weights == weights
    with pytest.raises(InputError, match="weights are of 2 prompts, expected 3"):
        ask(weights=says[:2])
    for wrong in ({"gpt2": 1.0}, {"gpt2": 1.0, "llama": -1.0}, {"gpt2": 1.0, "llama": math.nan}):
        with pytest.raises(InputError, match=r"weights\[2\] is .*0 or more for each of gpt2, llama"):
            ask(weights=[*says[:2], wrong])


def test_what_nobody_finds_words_for_is_left_to_who_does(
    writers: dict[str, TunedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    two = {name: writers[name] for name in ("gpt2", "llama")}
    written_as(monkeypatch, {"gpt2": ["", " "], "llama": [" hats", ""]})
    said, unsaid = answer_together(two, PROMPTS[:2], max_new_tokens=4, max_tokens=48)
    assert (said.text, said.by, set(said.log_likelihoods)) == (" hats", "llama", {"gpt2", "llama"})
    assert (unsaid.text, unsaid.by, unsaid.log_likelihoods) == ("", "gpt2", {})


def test_models_really_write_alone_as_together_and_long_prompts_lose_their_start(
    writers: dict[str, TunedModel],
) -> None:
    told: list[tuple[int, int, str]] = []
    prompts = [*PROMPTS, "the far cat sat on the other mats and " * 8 + "two hats"]
    both = answer_together(writers, prompts, max_new_tokens=3, max_tokens=24, advance=lambda *args: told.append(args))
    for name, own in writers.items():
        alone = answer_together({name: own}, prompts, max_new_tokens=3, max_tokens=24)
        assert [one.text if one.text.strip() else "" for one in alone] == [
            one.written[name] if one.written[name].strip() else "" for one in both
        ]
    assert any(one.text for one in both) and all(math.isfinite(v) for one in both for v in one.log_likelihoods.values())
    assert [done for done, _, _ in told] == [1, 2, 3, 4, 5, 6] and {total for _, total, _ in told} == {6}
    assert answer_together(writers, [], max_new_tokens=3, max_tokens=24) == []


def test_an_adapter_speaks_and_the_model_is_as_before(writers: dict[str, TunedModel], tmp_path: Path) -> None:
    own = writers["llama"]
    backbone = Backbone.from_pretrained(own.model.name)
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=2, alpha=4.0), seed=1)
    learnt = {name: torch.ones_like(one) if "lora_B" in name else one for name, one in fresh.params.items()}
    LoraAdapter(shape=fresh.shape, params=learnt).save(tmp_path / "adapter", backbone.model)
    tuned = TunedModel(own.model, tmp_path / "adapter")
    ids = torch.tensor([own.model.reader.tokenizer.encode("the cat").ids])
    with own.loaded() as model, torch.no_grad():
        before = model(input_ids=ids).logits
    with tuned.loaded() as model, torch.no_grad():
        after = model(input_ids=ids).logits
    with fresh.trained(learnt).attach(backbone.model), torch.no_grad():
        wanted = backbone.model(input_ids=ids).logits
    assert not torch.allclose(before, after) and torch.allclose(after, wanted, atol=1e-5)


def test_who_has_no_room_for_an_answer_says_so(writers: dict[str, TunedModel]) -> None:
    with pytest.raises(InputError, match="max_new_tokens is 23 and gpt2 reads 24 tokens"):
        answer_together(writers, PROMPTS, max_new_tokens=23, max_tokens=24)
    with pytest.raises(InputError, match="no writer"):
        answer_together({}, PROMPTS, max_new_tokens=2, max_tokens=24)
