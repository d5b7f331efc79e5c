from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_backbone
from tokenizers import Tokenizer

from cotune.data.assistant_text import generate_exchanges
from cotune.data.batches import EncodedExample
from cotune.data.label_words import candidate_texts, encode_labelled
from cotune.data.templates import Example
from cotune.errors import InputError
from cotune.evaluation.label_accuracy import label_accuracy
from cotune.models.backbone import Backbone
from cotune.tuning.adaptations import ADAPTATIONS, AdaptationOptions, adaptation_named
from cotune.tuning.choice_objectives import LabelAccuracy, choice_scores
from cotune.tuning.estimators import ESTIMATORS, Estimator, ForwardGradient, PrivateDescent, estimator_named
from cotune.tuning.loop import LoopConfig
from cotune.tuning.lora import target_nats
from cotune.tuning.personal import encode_examples
from cotune.tuning.private import PrivateConfig, tune_private
from cotune.tuning.private_zeroth_order import tune_private_zeroth_order
from cotune.tuning.sparse_mask import choose_mask
from cotune.tuning.text_objectives import TextScore
from cotune.tuning.tune import TuneConfig, tune
from cotune.tuning.zeroth_order import ZerothOrderConfig


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("llama")


@pytest.fixture(scope="module")
def examples(backbone: Backbone) -> list[EncodedExample]:
    texts = [Example(one.request, " " + one.answer) for one in generate_exchanges(24, seed=1)]
    return encode_examples(backbone.tokenizer_json, texts, backbone.description, 24)


def test_names() -> None:
    assert list(ESTIMATORS) == ["backprop", "zeroth_order", "forward_gradient"]
    with pytest.raises(InputError, match="estimator is 'magic', expected one of backprop"):
        estimator_named("magic")
    with pytest.raises(InputError, match="'backprop', which has no zo_eps"):
        estimator_named("backprop", zo_eps=0.1)
    with pytest.raises(InputError, match="zo_eps is -1"):
        tune_with(estimator_named("zeroth_order", zo_eps=-1.0), tiny_backbone("llama"), [], 1e-3)
    with pytest.raises(InputError, match="'zeroth_order', which has no forward_mode"):
        estimator_named("zeroth_order", forward_mode=True)
    with pytest.raises(InputError, match="rule is 'sgd', expected one of plain, momentum, adam"):
        estimator_named("zeroth_order", rule="sgd")


def tune_with(
    estimator: Estimator,
    backbone: Backbone,
    examples: list[EncodedExample],
    learning_rate: float,
    what: str = "lora",
) -> list[float | None]:
    config = TuneConfig(
        what=adaptation_named(what, AdaptationOptions()),
        loop=LoopConfig(epochs=4, learning_rate=learning_rate),
    )
    result = tune(backbone, examples, config, estimator=estimator, heldout=examples)
    assert (result.account is not None) == isinstance(estimator, PrivateDescent)
    return [record.heldout_loss for record in result.curve]


@pytest.mark.parametrize(
    ("estimator", "learning_rate"),
    [
        (estimator_named("backprop"), 1e-2),
        (estimator_named("zeroth_order", num_directions=4), 3e-3),
        (estimator_named("zeroth_order", num_directions=4, rule="momentum"), 3e-3),
        (estimator_named("zeroth_order", num_directions=4, rule="adam"), 3e-3),
        (estimator_named("zeroth_order", num_directions=4, sparse_share=0.1), 1e-2),
        # So many that four batches open the gate.
        (estimator_named("forward_gradient", num_directions=16), 0.3),
        (estimator_named("forward_gradient", num_directions=16, forward_mode=True, sparse_share=0.5), 0.3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_estimator_lowers_the_loss(
    backbone: Backbone, examples: list[EncodedExample], estimator: Estimator, learning_rate: float
) -> None:
    # A prompt's many directions cost the least.
    what = "soft_prompt" if isinstance(estimator, ForwardGradient) else "lora"
    losses = tune_with(estimator, backbone, examples[:4], learning_rate, what)
    best = min(loss for loss in losses if loss is not None)
    assert losses[0] is not None and best < losses[0]


SIZES: dict[str, AdaptationOptions] = {
    "vera": AdaptationOptions(rank=8),
    "blocks": AdaptationOptions(memory_budget_bytes=200_000),
    **dict.fromkeys(("soft_prompt", "p_tuning", "prefix"), AdaptationOptions(num_virtual_tokens=3)),
}


class Noised:
    """DP-SGD or DP-ZO with a given noise, which needs no search for it."""

    learning_rate, epochs = None, 1

    def __init__(self, zeroth_order: bool) -> None:
        self._zeroth_order = zeroth_order

    def __call__(self, backbone, fresh, examples, config, **others):  # type: ignore[no-untyped-def]
        private = PrivateConfig(noise_multiplier=1.0, num_batch_texts=2, loop=config.loop, secret_seed=1)
        if self._zeroth_order:
            return tune_private_zeroth_order(backbone, fresh, examples, ZerothOrderConfig(), private, **others)
        return tune_private(backbone, fresh, examples, private, **others)


@pytest.mark.parametrize("how", ["zeroth_order", "private", "private zeroth_order"])
@pytest.mark.parametrize("name", list(ADAPTATIONS))
def test_every_method_goes_with_what_looks_at_it_in_another_way(
    backbone: Backbone, examples: list[EncodedExample], name: str, how: str
) -> None:
    """All of the listed parameters change, none of the model's do; `test_adaptations.py` has back-propagation."""
    if how == "private":
        pytest.importorskip("opacus", reason="needs cotune[private]")
    short = [EncodedExample(each.input_ids[:10], 6) for each in examples[:2]]
    before = {key: tensor.clone() for key, tensor in backbone.model.state_dict().items()}
    what = adaptation_named(name, SIZES.get(name, AdaptationOptions()))
    fresh = what.fresh(backbone, short, seed=0)
    estimator: Estimator = estimator_named(how) if how == "zeroth_order" else Noised(how != "private")
    config = TuneConfig(what=what, loop=LoopConfig(epochs=1, learning_rate=0.01), num_batch_sequences=2)
    tuned = tune(backbone, short, config, estimator=estimator).adapter.params
    assert tuned.keys() == fresh.params.keys()
    assert not any(torch.equal(tuned[key], fresh.params[key]) for key in tuned)
    now = backbone.model.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[key], before[key]) for key in before)


def test_a_private_run_says_what_it_spent(backbone: Backbone, examples: list[EncodedExample], tmp_path: Path) -> None:
    pytest.importorskip("opacus", reason="needs cotune[private]")
    config = TuneConfig(
        what=adaptation_named("lora", AdaptationOptions(rank=2)), loop=LoopConfig(epochs=1, learning_rate=1e-3)
    )
    # So much that the slow accountant is not asked.
    result = tune(backbone, examples, config, estimator=PrivateDescent(epsilon=60.0), run_dir=tmp_path)
    assert result.account is not None and 50 < result.account.epsilon <= 60.0


def test_a_score_is_raised_without_a_gradient(backbone: Backbone) -> None:
    """A score that likes short texts, which no likelihood would teach."""
    texts = [Example(one.request, " " + one.answer) for one in generate_exchanges(4, seed=1)]
    examples = encode_examples(backbone.tokenizer_json, texts, backbone.description, 12)
    short = TextScore(name="short", metric=lambda text, references: 1 / (1 + len(text)))
    losses = tune_with(estimator_named("zeroth_order", num_directions=4, score=short), backbone, examples, 3e-2)
    assert losses[0] is not None and min(loss for loss in losses if loss is not None) < losses[0] - 0.01 < 1


@pytest.mark.parametrize(("what", "zo_eps"), [("lora", 0.03), ("soft_prompt", 0.1)])
def test_accuracy_is_raised_without_a_gradient(backbone: Backbone, what: str, zo_eps: float) -> None:
    """Words that the model finds second best become its answers."""
    words, tokenizer = ("a", "b", "c", "d"), Tokenizer.from_str(backbone.tokenizer_json.decode())
    texts = [Example(f"Where is {thing}?", " a") for thing in ("box", "my cat", "the room", "lunch", "it", "Tom")]
    asked = [encode_labelled(tokenizer, text, words, eos_token_id=2, max_length=24) for text in texts]
    errors, collate = LabelAccuracy(words=words).prepare(backbone, asked)
    params = dict(backbone.model.named_parameters())
    with torch.no_grad():
        ranked = choice_scores(backbone.model, params, collate(asked)).argsort(1, descending=True).tolist()
        # Judged one text at a time, and all in a batch.
        candidates = [one for text in asked for one in candidate_texts(text)]
        accuracy = label_accuracy(asked, target_nats(backbone, candidates))
        assert accuracy == pytest.approx(1 - errors(backbone.model, params, collate(asked)).mean)
    examples = [replace(text, label=order[1]) for text, order in zip(asked, ranked, strict=True)]
    config = TuneConfig(what=adaptation_named(what, AdaptationOptions()), loop=LoopConfig(epochs=4, learning_rate=3e-2))
    estimator = estimator_named("zeroth_order", num_directions=4, zo_eps=zo_eps, score=LabelAccuracy(words=words))
    losses = [r.heldout_loss for r in tune(backbone, examples, config, estimator=estimator, heldout=examples).curve]
    assert losses[0] is not None and min(loss for loss in losses if loss is not None) < losses[0]
    with pytest.raises(InputError, match="a text has 4 choices, expected 3, one for each label word"):
        LabelAccuracy(words=("a", "b", "c")).prepare(backbone, examples)


def test_a_mask_leaves_all_other_numbers_alone(backbone: Backbone, examples: list[EncodedExample]) -> None:
    what = adaptation_named("bias", AdaptationOptions())
    fresh = what.fresh(backbone, examples, seed=0)
    mask = choose_mask(backbone, fresh, examples, 0.05, "gradient")
    config = TuneConfig(what=what, loop=LoopConfig(epochs=1, learning_rate=1e-2))
    estimator = estimator_named("zeroth_order", sparse_share=0.05)
    tuned = estimator(backbone, fresh, examples, config, heldout=(), run_dir=None, resume=False, progress=None).params
    changed = {name: (tuned[name] != before).nonzero()[:, 0].tolist() for name, before in fresh.params.items()}
    expected = {name: places.tolist() for name, places in mask.indices.items()}
    assert {name: places for name, places in changed.items() if places} == expected
    with pytest.raises(InputError, match="criterion of a mask is 'luck'"):
        choose_mask(backbone, fresh, examples, 0.05, "luck")


def test_a_mask_by_magnitude_is_refused_where_something_starts_at_zero(
    backbone: Backbone, examples: list[EncodedExample]
) -> None:
    lora = adaptation_named("lora", AdaptationOptions()).fresh(backbone, examples, seed=0)
    with pytest.raises(InputError, match="starts at zero"):
        choose_mask(backbone, lora, examples, 0.05, "magnitude")
    norms = adaptation_named("bias", AdaptationOptions()).fresh(backbone, examples, seed=0)
    assert choose_mask(backbone, norms, examples, 0.05, "magnitude").num_numbers >= 1
