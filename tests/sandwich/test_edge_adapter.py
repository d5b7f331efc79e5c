"""The edge's losses and slopes: by hand, by differences, by learning; and that the backbone is as before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from redactors import redactor_here
from scripted_clouds import MemoryCloud
from tiny_models import tiny_backbone
from tokenizers import Tokenizer

from cotune.data import Example, encode_example
from cotune.errors import InputError
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone
from cotune.sandwich.account import Account
from cotune.sandwich.bilevel.step_rules import AdamRule
from cotune.sandwich.chat import ToolCall
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.edge_adapter import EdgeAdapter, EdgeConfig, EdgeDrafter, EdgeMerger, EdgeRewriter, edge_adapter
from cotune.sandwich.examples import PrivateExample
from cotune.sandwich.fit import prepare_examples
from cotune.sandwich.pipeline import JoinAnswers, MergeJob, Pipeline, PipelineConfig
from cotune.sandwich.rewrite_trials import Preference
from cotune.sandwich.text_problem import Cell, FitExample
from cotune.sandwich.tools import ToolRun
from cotune.tuning.copy_gate import AHEAD, START_NEXT, START_TRUST, CopyGate

TEMPLATE = "{request}|{answers}:"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("llama")


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    with redactor_here() as redactor:
        pipeline = Pipeline(redactor, CloudGate(MemoryCloud()), PipelineConfig(model="m"))
        texts = [PrivateExample("Hi Ann Lee", "no"), PrivateExample("What now?", "so it is")]
        examples = prepare_examples(pipeline, texts, b"k")
    return [Cell(examples[0], ("yes {draft}",)), Cell(examples[1], ("no", "maybe"))]


@pytest.fixture(scope="module")
def edge(backbone: Backbone) -> Iterator[EdgeAdapter]:
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=1, alpha=1.0, targets=("q_proj",)), seed=1)
    with edge_adapter(backbone, fresh, EdgeConfig(template=TEMPLATE, num_batch_sequences=1)) as made:
        yield made


@pytest.fixture
def plain(backbone: Backbone, edge: EdgeAdapter) -> EdgeAdapter:
    """The same without a copy gate."""
    config = EdgeConfig(template=TEMPLATE, num_batch_sequences=1, copies=False)
    return EdgeAdapter(backbone, edge._model, FreshLike(edge), config, Account())


def cell_of(request: str, target: str, *answers: str) -> Cell:
    """What an edge reads and learns, without a pipeline."""
    return Cell(FitExample(PrivateExample(request, target), None, target), answers)  # type: ignore[arg-type]


def somewhere(edge: EdgeAdapter) -> np.ndarray:
    return edge.start() + 0.1 * np.random.default_rng(0).normal(size=edge.start().size)


def test_the_loss_is_one_less_the_mean_probability_of_the_targets_tokens(
    backbone: Backbone, plain: EdgeAdapter, cells: list[Cell]
) -> None:
    losses = plain.losses(plain.start(), cells)
    tokenizer = Tokenizer.from_str(backbone.tokenizer_json.decode())
    # Braces in an answer stay as they are; the target has the request's placeholders.
    example = encode_example(tokenizer, Example("What now?|no\nmaybe:", " so it is"), eos_token_id=1, max_length=128)
    ids = torch.from_numpy(example.input_ids)[None]
    logits = backbone.model(input_ids=ids).logits[0].log_softmax(-1).detach()
    nats = [-float(logits[place - 1, ids[0, place]]) for place in range(example.first_target, ids.shape[1])]
    assert losses[1] == pytest.approx(1 - np.exp(-np.mean(nats) / 4), abs=1e-5)
    assert ((losses > 0) & (losses < 1)).all()


def test_slopes_are_those_of_the_losses(edge: EdgeAdapter, cells: list[Cell]) -> None:
    x, weights = somewhere(edge), np.array([0.3, 0.7])
    losses, slope = edge.gradient(x, cells, weights, step=0)
    assert losses == pytest.approx(edge.losses(x, cells), abs=1e-5)
    direction = slope / np.linalg.norm(slope)
    rise = weights @ (edge.losses(x + 2e-2 * direction, cells) - edge.losses(x - 2e-2 * direction, cells))
    assert np.linalg.norm(slope) == pytest.approx(rise / 4e-2, rel=0.05)


def test_differences_point_the_same_way(backbone: Backbone, edge: EdgeAdapter, cells: list[Cell]) -> None:
    x, weights = somewhere(edge), np.array([0.5, 0.5])
    _, exact = edge.gradient(x, cells, weights, step=0)
    forward = EdgeConfig(template=TEMPLATE, gradients="zeroth_order", num_directions=40)
    twin = EdgeAdapter(backbone, edge._model, FreshLike(edge), forward, edge.account)
    before = edge.account.taken().edge_backward_tokens
    _, estimated = twin.gradient(x, cells, weights, step=3)
    assert float(exact @ estimated) > 0 and edge.account.taken().edge_backward_tokens == before
    assert np.array_equal(estimated, twin.gradient(x, cells, weights, step=3)[1])


class FreshLike:
    """Stands in for an adapter that is attached already."""

    num_virtual_tokens = 0

    def __init__(self, edge: EdgeAdapter) -> None:
        self.params = edge.params(edge.start())


def test_following_the_slope_lowers_the_loss_and_counts_operations(edge: EdgeAdapter, cells: list[Cell]) -> None:
    x, weights = somewhere(edge), np.array([1.0, 0.0])
    before = edge.losses(x, cells)[0]
    for step in range(5):
        x = x - 2.0 * edge.gradient(x, cells, weights, step)[1]
    assert edge.losses(x, cells)[0] < before
    taken = edge.account.taken()
    assert taken.edge_flops == edge.account.num_edge_parameters * (
        2 * taken.edge_forward_tokens + 6 * taken.edge_backward_tokens
    )


def test_it_writes_as_a_merger(edge: EdgeAdapter) -> None:
    job = MergeJob("Hi", ("yes",))
    text = EdgeMerger(edge, edge.start()).merge(job)
    assert text == edge.write(edge.start(), [job, MergeJob("Ho", ("no",))])[0] and isinstance(text, str)


def test_it_writes_before_and_beside_the_cloud(edge: EdgeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    x, read = edge.start(), list[str]()

    def write_after(x: np.ndarray, texts: list[str]) -> list[str]:
        read.extend(texts)
        return ["one?\n\n two?"]

    monkeypatch.setattr(edge, "write_after", write_after)
    assert EdgeRewriter(edge, x, template="{request}|{answers}").rewrite("Hi {request}") == ["one?", " two?"]
    assert EdgeDrafter(edge, x).draft("Hi") == "one?\n\n two?"
    assert read == ["Hi {request}|{answers}", "User: Hi\nAssistant:"]


def test_the_backbone_is_as_before(backbone: Backbone) -> None:
    fresh_backbone = tiny_backbone("llama")
    names = {name for name, _ in fresh_backbone.model.named_parameters()}
    fresh = LoraAdapter.fresh(fresh_backbone.model, LoraShape(rank=1))
    with edge_adapter(fresh_backbone, fresh, EdgeConfig()):
        assert names != {name for name, _ in fresh_backbone.model.named_parameters()}
    assert names == {name for name, _ in fresh_backbone.model.named_parameters()}


@pytest.mark.parametrize(
    "changes", [{"template": "{request}"}, {"gradients": "magic"}, {"max_new_tokens": 0}, {"smoothing_radius": 0.0}]
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"answers|gradients|max_new_tokens|smoothing_radius"):
        EdgeConfig(**changes)  # type: ignore[arg-type]


def test_it_draws_by_seed_and_learns_what_shall_follow(edge: EdgeAdapter) -> None:
    x = somewhere(edge)
    before = edge.account.taken().edge_forward_tokens
    one, again, other = (edge.sample_after(x, ["Hi"] * 2, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert one == again != other and edge.account.taken().edge_forward_tokens > before
    pairs, weights = [("Hi", "so it is")], np.ones(1)
    losses, slope = edge.gradient_after(x, pairs, weights, 0)
    lower, _ = edge.gradient_after(x - 2.0 * slope, pairs, weights, 1)
    assert lower[0] < losses[0] and edge.account.taken().edge_backward_tokens > 0


PREFERENCES = [Preference("Hi", "so it is", "no"), Preference("What now?", "no", "maybe it is")]


def test_log_probabilities_of_texts_are_those_of_their_tokens(backbone: Backbone, edge: EdgeAdapter) -> None:
    x = edge.start()
    before = edge.account.taken().edge_forward_tokens
    (found,) = edge.log_probs_after(x, [("What now?", "no")])
    tokenizer = Tokenizer.from_str(backbone.tokenizer_json.decode())
    example = encode_example(tokenizer, Example("What now?", " no"), eos_token_id=1, max_length=128)
    assert edge.account.taken().edge_forward_tokens == before + len(example.input_ids)
    ids = torch.from_numpy(example.input_ids)[None]
    logits = backbone.model(input_ids=ids).logits[0].log_softmax(-1).detach()
    assert found == pytest.approx(
        sum(float(logits[place - 1, ids[0, place]]) for place in range(example.first_target, ids.shape[1])), abs=1e-4
    )


@pytest.mark.parametrize("size", [1, 4])
def test_pairs_are_learnt_from_their_reference_on(backbone: Backbone, edge: EdgeAdapter, size: int) -> None:
    config = EdgeConfig(template=TEMPLATE, num_batch_sequences=size)
    twin = EdgeAdapter(backbone, edge._model, FreshLike(edge), config, edge.account)
    start = somewhere(edge)
    texts = [(each.read, text) for each in PREFERENCES for text in (each.better, each.worse)]
    reference = twin.log_probs_after(start, texts).reshape(-1, 2)
    at_start = twin.preference_losses(start, PREFERENCES, reference, beta=0.5)
    assert at_start == pytest.approx([np.log(2)] * 2, abs=1e-5)
    # Elsewhere: the loss of both margins, and its slope against differences.
    x = start + 0.1 * np.random.default_rng(1).normal(size=start.size)
    margins = twin.log_probs_after(x, texts).reshape(-1, 2) - reference
    expected = np.log1p(np.exp(-0.5 * (margins[:, 0] - margins[:, 1])))
    before = edge.account.taken().edge_backward_tokens
    losses, slope = twin.preference_gradient(x, PREFERENCES, reference, 0, beta=0.5)
    assert losses == pytest.approx(expected, abs=1e-5) and edge.account.taken().edge_backward_tokens > before
    direction = slope / np.linalg.norm(slope)
    rise = np.mean(
        twin.preference_losses(x + 1e-2 * direction, PREFERENCES, reference, beta=0.5)
        - twin.preference_losses(x - 1e-2 * direction, PREFERENCES, reference, beta=0.5)
    )
    assert np.linalg.norm(slope) == pytest.approx(rise / 2e-2, rel=0.05)


def test_pairs_are_learnt_from_in_the_memory_of_inference_too(backbone: Backbone, edge: EdgeAdapter) -> None:
    x = somewhere(edge)
    reference = np.zeros((2, 2))
    _, exact = edge.preference_gradient(x, PREFERENCES, reference, 0, beta=0.5)
    forward = EdgeConfig(template=TEMPLATE, gradients="zeroth_order", num_directions=16)
    twin = EdgeAdapter(backbone, edge._model, FreshLike(edge), forward, edge.account)
    before = edge.account.taken().edge_backward_tokens
    _, estimated = twin.preference_gradient(x, PREFERENCES, reference, 0, beta=0.5)
    assert float(exact @ estimated) > 0 and edge.account.taken().edge_backward_tokens == before


ANSWERS = [("yes <PERSON_4821>, so it is",), ("one", "", "two"), (" maybe \n",)]


def test_an_untrained_merge_is_the_clouds_answer(edge: EdgeAdapter) -> None:
    """As `JoinAnswers` has it, placeholders and all, also where it is longer than the edge may write."""
    jobs = [MergeJob("Hi Ann", answers) for answers in ANSWERS]
    assert edge.write(edge.start(), jobs) == [JoinAnswers().merge(job).strip() for job in jobs]
    called = ToolRun(ToolCall(id="1", name="balance", arguments="{}"), {}, 12, is_done=True)
    assert edge.write(edge.start(), [MergeJob("Hi", ("",), tool_runs=(called,))]) == ["balance: 12"]
    long = "so it is " * 40
    assert edge.write(edge.start(), [MergeJob("Hi", (long,))]) == [long.strip()]
    assert edge.write(edge.start(), [MergeJob("Hi", ("",))]) == [""]


def test_without_an_answer_or_before_the_cloud_nothing_is_copied(edge: EdgeAdapter, plain: EdgeAdapter) -> None:
    x, own = edge.start(), plain.start()
    assert len(x) == len(own) + CopyGate.fresh(24).num_parameters
    assert edge.write(x, [MergeJob("Hi", ())]) == plain.write(own, [MergeJob("Hi", ())])
    assert edge.write_after(x, ["Hi|yes:"]) == plain.write_after(own, ["Hi|yes:"]) != ["yes"]
    assert edge.losses(x, [cell_of("Hi", "no")]) == pytest.approx(plain.losses(own, [cell_of("Hi", "no")]))
    pairs = [("Hi", "so it is")]
    assert edge.log_probs_after(x, pairs) == pytest.approx(plain.log_probs_after(own, pairs))
    assert not edge.gradient_after(x, pairs, np.ones(1), 0)[1][len(own) :].any()


def test_a_right_answer_is_copied_token_by_token(edge: EdgeAdapter) -> None:
    """The target and c are the same tokens, so that each is copied: the loss is at most 1 - g alpha."""
    right = [cell_of("Hi", "yes <PERSON_4821>, so it is", *ANSWERS[0]), cell_of("Hi", "one\n\ntwo", *ANSWERS[1])]
    alpha = np.exp(START_NEXT) / (np.exp(START_NEXT) + AHEAD - 1)
    assert (edge.losses(edge.start(), right) <= 1 - START_TRUST[0] * alpha + 1e-6).all()
    wrong = cell_of("Hi", "no", "yes")
    assert edge.losses(edge.start(), [wrong])[0] > 0.5


def place_of(edge: EdgeAdapter, name: str) -> int:
    """The last number of one of the gate's tensors in x."""
    gate, place = CopyGate.fresh(24), edge.start().size
    for field in reversed(fields(gate)):
        if field.name == name:
            return place - 1
        place -= getattr(gate, field.name).numel()
    raise AssertionError(name)


def test_the_gates_slopes_are_those_of_the_losses(edge: EdgeAdapter, cells: list[Cell]) -> None:
    x, weights = somewhere(edge), np.array([0.4, 0.6])
    mixed = [cell_of("Hi", "no, so it is", "no"), cell_of("What now?", "yes", "yes")]
    _, slope = edge.gradient(x, mixed, weights, step=0)
    for name in ("weight", "bias", "up"):
        place = place_of(edge, name)
        turn = np.zeros(len(x))
        turn[place] = 2e-2
        rise = weights @ (edge.losses(x + turn, mixed) - edge.losses(x - turn, mixed)) / 4e-2
        assert slope[place] == pytest.approx(rise, rel=0.05, abs=1e-5) and rise


def test_a_gate_that_was_kept_is_the_start(backbone: Backbone, edge: EdgeAdapter) -> None:
    kept = replace(CopyGate.fresh(24), weight=torch.linspace(-1, 1, 24), bias=torch.full((2,), -40.0))
    twin = EdgeAdapter(backbone, edge._model, FreshLike(edge), edge.config, edge.account, kept)
    x, job = twin.start(), MergeJob("Hi", ("yes",))
    found = twin.gate(x)
    assert found is not None and torch.equal(found.weight, kept.weight) and torch.equal(found.bias, kept.bias)
    # It trusts nothing, so the model writes by itself.
    assert twin.write(x, [job]) != ["yes"] == edge.write(edge.start(), [job])


def test_the_gate_counts_among_the_edges_parameters(edge: EdgeAdapter, plain: EdgeAdapter) -> None:
    sizes = []
    for each in (plain, edge):
        account = Account()
        each.count_in(account)
        sizes.append(account.num_edge_parameters)
    assert sizes[1] == sizes[0] + CopyGate.fresh(24).num_parameters


def test_it_learns_to_leave_the_cloud_where_it_is_always_wrong() -> None:
    """The cloud says "a" to all; of cats that is right, of dogs it is not."""
    made = [(f"{count} {what}", z) for what, z in (("cat", "a"), ("dog", "b")) for count in ("one", "two", "my")]
    cells = [cell_of(request, target, "a") for request, target in made]
    backbone = tiny_backbone("llama")
    fresh, rule = LoraAdapter.fresh(backbone.model, LoraShape(rank=4), seed=0), AdamRule()
    with edge_adapter(backbone, fresh, EdgeConfig(template="{answers} {request}:", max_new_tokens=4)) as edge:
        x = edge.start()
        assert edge.write(x, [cell.job for cell in cells]) == ["a"] * 6
        for step in range(100):
            x = rule.step(x, edge.gradient(x, cells, np.full(6, 1 / 6), step)[1], 2e-2)
        assert edge.write(x, [cell.job for cell in cells]) == ["a"] * 3 + ["b"] * 3
        # Of animals in requests that it never saw, too.
        assert edge.write(x, [MergeJob(f"the {what}", ("a",)) for what in ("cat", "dog")]) == ["a", "b"]
