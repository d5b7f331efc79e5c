from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, tiny_backbone

from cotune.compression.distil import DistilBatch, DistilBatches, DistilResult, DistilSettings, DistilTuner, distil
from cotune.compression.fewer_layers import with_fewer_layers
from cotune.compression.teacher_cache import CachedTeacher
from cotune.data.batches import EncodedExample
from cotune.distillation.divergences import Divergence, ForwardKl, JensenShannon, ReverseKl, divergence_of_logits
from cotune.distillation.teacher import LocalTeacher
from cotune.distillation.top_log_probs import TopLogProbs
from cotune.errors import InputError, MismatchError
from cotune.models.adapters import LoraShape
from cotune.models.backbone import Backbone
from cotune.tuning.full import Full
from cotune.tuning.loop import CHECKPOINT_FILE, LoopConfig, LoopProgress
from cotune.tuning.lora import Lora
from cotune.tuning.soft_prompt import SoftPrompt

ALL = [ForwardKl(), ReverseKl(), JensenShannon(0.1), JensenShannon(0.9)]
LOOP = LoopConfig(epochs=3, learning_rate=1e-2, checkpoint_interval_s=0.0)


@pytest.fixture(scope="module")
def teacher() -> Backbone:
    return tiny_backbone("llama")


@pytest.fixture(scope="module")
def student(teacher: Backbone) -> Backbone:
    return with_fewer_layers(teacher, (0, 2))


def draw_texts(num: int, seed: int) -> list[EncodedExample]:
    """Prompts of 1 to 4 tokens and targets of 3 to 10."""
    rng = np.random.default_rng(seed)
    return [
        EncodedExample(rng.integers(2, VOCAB, first + int(rng.integers(3, 11))), first)
        for first in rng.integers(1, 5, num).tolist()
    ]


TEXTS, HELDOUT = draw_texts(10, 0), draw_texts(6, 1)


def settings(**changes: Any) -> DistilSettings:
    values: dict[str, Any] = {"loop": LOOP, "teacher_share": 1.0, "num_batch_sequences": 4, "max_new_tokens": 5}
    return DistilSettings(**{**values, **changes})


def run(student: Backbone, teacher: Any, **options: Any) -> DistilResult:
    changes = {name: options.pop(name) for name in list(options) if name in DistilSettings.__dataclass_fields__}
    return distil(student, teacher, TEXTS, settings(**changes), **options)


def apart(student: Backbone, result: DistilResult | None, teacher: Backbone, divergence: Divergence) -> float:
    """Mean divergence over the held-out texts, in one pass of the plain models."""
    sequences = [(text.input_ids, text.first_target) for text in HELDOUT]
    if result is None:
        logits = student.target_logits(sequences)
    else:
        with result.adapter.attach(student.model):
            logits = student.target_logits(sequences)
    return float(divergence_of_logits(divergence, teacher.target_logits(sequences), logits).mean())


@pytest.mark.parametrize("top_k", [None, 40], ids=["whole vocabulary", "top 40"])
@pytest.mark.parametrize("divergence", ALL, ids=repr)
def test_each_loss_brings_the_student_nearer(
    student: Backbone, teacher: Backbone, divergence: Divergence, top_k: int | None
) -> None:
    before = apart(student, None, teacher, divergence)
    chosen = settings(divergence=divergence, top_k=top_k, num_batch_sequences=8)
    result = distil(student, LocalTeacher(teacher), draw_texts(48, 2), chosen, heldout=HELDOUT)
    assert apart(student, result, teacher, divergence) < 0.9 * before
    heldout = [record.heldout_loss for record in result.curve]
    assert heldout[0] is not None and min(heldout) < 0.9 * heldout[0]
    if top_k is None:
        assert heldout[0] == pytest.approx(before, rel=1e-4)
    assert apart(student, None, teacher, divergence) == before  # the backbone is as it was


def test_the_loss_by_hand(student: Backbone, teacher: Backbone) -> None:
    """(1 - a) CE + a T^2 KL, means over the targets, own texts apart."""
    chosen = settings(teacher_share=0.3, temperature=2.0)
    examples = tuple(TEXTS[:3])
    fresh = chosen.what.fresh(student, TEXTS, seed=0)
    with fresh.attach(student.model) as model:
        tuner = DistilTuner(model, student.spec, LocalTeacher(teacher), chosen)
        state = tuner.init(fresh.params)
        nats, count = tuner.evaluate(state, DistilBatch(examples=examples, is_own=(False,) * 3))
        _, metrics = tuner.step(state, DistilBatch(examples=examples, is_own=(False,) * 3))
    expected, distances = [], []
    for text in examples:
        p, q = (one.target_logits([(text.input_ids, text.first_target)]).double() for one in (teacher, student))
        targets = torch.from_numpy(text.input_ids[text.first_target :])
        answer = -q.log_softmax(1).gather(1, targets[:, None])[:, 0]
        log_p, log_q = (p / 2).log_softmax(1), (q / 2).log_softmax(1)
        distances.append(4 * (log_p.exp() * (log_p - log_q)).sum(1))
        expected.append(0.7 * answer + 0.3 * distances[-1])
    assert count == len(torch.cat(expected))
    assert nats == pytest.approx(float(torch.cat(expected).sum()), rel=1e-5)
    assert metrics["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert metrics["divergence"] == pytest.approx(float(torch.cat(distances).mean()), rel=1e-5)
    assert metrics["own_texts"] == 0


class Recorder(LocalTeacher):
    """Remembers what it is asked."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.asked: list[EncodedExample] = []

    def top_log_probs(self, examples: Sequence[EncodedExample], top_k: int) -> TopLogProbs:
        self.asked += examples
        return super().top_log_probs(examples, top_k)


@pytest.mark.parametrize("share", [0.0, 0.25, 1 / 3, 1.0])
def test_the_on_policy_share_is_what_was_asked_for(student: Backbone, teacher: Backbone, share: float) -> None:
    recorder = Recorder(teacher)
    run(student, recorder, on_policy_share=share, min_prompt_tokens=2, loop=replace(LOOP, epochs=3))
    given = {text.input_ids.tobytes() for text in TEXTS}
    prompts = {text.input_ids[: max(text.first_target, 2)].tobytes() for text in TEXTS}
    own = [text for text in recorder.asked if text.input_ids.tobytes() not in given]
    assert len(recorder.asked) == 30 and len(own) == int(30 * share + 1e-9)
    for text in own:
        assert text.input_ids[: text.first_target].tobytes() in prompts
        written = text.input_ids[text.first_target :].tolist()
        assert 1 <= len(written) <= 5 and (len(written) == 5 or written[-1] == 1)  # </s>


def test_own_texts_are_drawn_anew_and_from_the_student_as_it_is(student: Backbone, teacher: Backbone) -> None:
    recorder = Recorder(teacher)
    run(
        student,
        recorder,
        on_policy_share=1.0,
        sampling_temperature=1e-3,  # as good as greedy
        max_new_tokens=3,
        num_batch_sequences=10,
        loop=replace(LOOP, epochs=2, learning_rate=0.1, warmup_fraction=0.0),
    )
    first, second = recorder.asked[:10], recorder.asked[10:]

    def is_greedy(text: EncodedExample) -> bool:
        start = student.target_logits([(text.input_ids, text.first_target)]).argmax(1)
        return start.tolist() == text.input_ids[text.first_target :].tolist()

    assert all(is_greedy(text) for text in first)
    assert sum(is_greedy(text) for text in second) < 5


def test_own_texts_have_no_right_answer(student: Backbone, teacher: Backbone) -> None:
    """With one given and one own text, -log p is that of the given one's targets."""
    chosen = settings(teacher_share=0.4)
    fresh = chosen.what.fresh(student, TEXTS, seed=0)
    recorder = Recorder(teacher)
    examples = (TEXTS[0], TEXTS[1])
    with fresh.attach(student.model) as model:
        tuner = DistilTuner(model, student.spec, recorder, chosen)
        state = tuner.init(fresh.params)
        _, metrics = tuner.step(state, DistilBatch(examples=examples, is_own=(True, False), seed=3))
    own, given = recorder.asked
    assert own.input_ids[:8].tolist() == TEXTS[0].input_ids[:8].tolist() and own.first_target == 8
    assert given.input_ids is TEXTS[1].input_ids
    sequences = [(text.input_ids, text.first_target) for text in (own, given)]
    p, q = teacher.target_logits(sequences), with_fewer_layers(teacher, (0, 2)).target_logits(sequences)
    targets = torch.from_numpy(given.input_ids[given.first_target :])
    answer = torch.nn.functional.cross_entropy(q[-len(targets) :], targets)
    expected = 0.6 * float(answer) + 0.4 * float(divergence_of_logits(ForwardKl(), p, q).mean())
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["own_texts"] == 1


def params_of(result: DistilResult) -> dict[str, torch.Tensor]:
    return dict(result.adapter.params)


def is_same(one: DistilResult, other: DistilResult) -> bool:
    a, b = params_of(one), params_of(other)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_all_listed_is_the_whole_vocabulary_to_the_last_bit(student: Backbone, teacher: Backbone) -> None:
    results = [run(student, LocalTeacher(teacher), divergence=ReverseKl(), top_k=k) for k in (None, VOCAB, VOCAB + 9)]
    assert is_same(results[0], results[1]) and is_same(results[0], results[2])
    assert not is_same(results[0], run(student, LocalTeacher(teacher), divergence=ReverseKl(), top_k=VOCAB - 1))


@pytest.mark.parametrize("stop_at", [2, 7])
def test_a_resumed_run_ends_with_the_same_weights_and_asks_nothing_twice(
    tmp_path: Path, student: Backbone, teacher: Backbone, stop_at: int
) -> None:
    options: dict[str, Any] = {
        "divergence": JensenShannon(0.5),
        "teacher_share": 0.5,
        "top_k": 20,
        "on_policy_share": 0.5,
        "heldout": TEXTS,  # so that it falls, and the weights are not those of the start
    }
    undisturbed = run(student, CachedTeacher(LocalTeacher(teacher), tmp_path / "a"), **options)
    recorder = Recorder(teacher)

    def stop(progress: LoopProgress) -> None:
        if progress.step == stop_at:
            raise KeyboardInterrupt

    run_dir = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(student, CachedTeacher(recorder, tmp_path / "b"), **options, run_dir=run_dir, progress=stop)
    # Killed between the step and its checkpoint: the run goes on from the one before.
    resumed = run(student, CachedTeacher(recorder, tmp_path / "b"), **options, run_dir=run_dir, resume=True)
    assert is_same(resumed, undisturbed) and resumed.best_epoch == undisturbed.best_epoch == 3
    asked = [text.input_ids.tobytes() for text in recorder.asked]
    assert len(asked) == len(set(asked)) == 10 + 15  # given texts once, half of three epochs' texts

    with pytest.raises(InputError, match="another config or other data"):
        run(student, LocalTeacher(teacher), **{**options, "top_k": 21}, run_dir=run_dir, resume=True)
    with pytest.raises(InputError, match="another config or other data"):
        run(student, LocalTeacher(tiny_backbone("llama", seed=9)), **options, run_dir=run_dir, resume=True)


def test_a_step_that_was_not_saved_is_taken_again(tmp_path: Path, student: Backbone, teacher: Backbone) -> None:
    """The checkpoint is of before the last steps: the same own texts are drawn again, from the same student."""
    options: dict[str, Any] = {"on_policy_share": 1.0, "top_k": 10}
    recorder = Recorder(teacher)
    checkpoint = tmp_path / "run" / CHECKPOINT_FILE
    saved: dict[int, bytes] = {}

    def keep(progress: LoopProgress) -> None:
        saved[progress.step] = checkpoint.read_bytes()

    whole = run(student, recorder, **options, run_dir=tmp_path / "run", progress=keep)
    checkpoint.write_bytes(saved[5])
    again = run(student, recorder, **options, run_dir=tmp_path / "run", resume=True)
    assert is_same(whole, again)
    assert [t.input_ids.tolist() for t in recorder.asked[30:]] == [t.input_ids.tolist() for t in recorder.asked[16:30]]


def test_the_best_epoch_wins(student: Backbone, teacher: Backbone) -> None:
    loop = replace(LOOP, epochs=2, learning_rate=3.0, warmup_fraction=0.0)
    result = run(student, LocalTeacher(teacher), heldout=HELDOUT, loop=loop)
    assert result.best_epoch == 0
    for name, parameter in student.model.named_parameters():
        assert torch.equal(params_of(result)[name], parameter)
    assert run(student, LocalTeacher(teacher), loop=loop).best_epoch == 2


def test_a_student_reloads_to_the_same_logits(tmp_path: Path, student: Backbone, teacher: Backbone) -> None:
    result = run(student, LocalTeacher(teacher))
    result.save_model(tmp_path / "student", student)
    reloaded = Backbone.from_pretrained(str(tmp_path / "student"))
    sequence = [(TEXTS[0].input_ids, 1)]
    with result.adapter.attach(student.model):
        expected = student.target_logits(sequence)
    assert torch.equal(reloaded.target_logits(sequence), expected)
    assert reloaded.spec.tokenizer_digest == teacher.spec.tokenizer_digest and reloaded.spec.num_layers == 2
    assert result.num_trained == student.spec.num_parameters


def test_an_adapter_can_be_the_student(tmp_path: Path, student: Backbone, teacher: Backbone) -> None:
    what = Lora(shape=LoraShape(rank=4))
    before = apart(student, None, teacher, ForwardKl())
    result = run(student, LocalTeacher(teacher), what=what, on_policy_share=0.5, gradient_checkpointing=True)
    assert result.num_trained < 0.5 * student.spec.num_parameters
    after = apart(student, result, teacher, ForwardKl())
    assert after < 0.97 * before
    result.save_model(tmp_path / "merged", student)
    merged = Backbone.from_pretrained(str(tmp_path / "merged"))
    assert apart(merged, None, teacher, ForwardKl()) == pytest.approx(after, rel=1e-4)


def test_which_texts_are_own_changes_by_epoch_and_seed() -> None:
    batches = DistilBatches(TEXTS, 4, on_policy_share=0.25, seed=0)
    assert len(batches) == 3
    epochs = [list(batches.epoch(epoch)) for epoch in range(8)]
    counts = [sum(sum(batch.is_own) for batch in epoch) for epoch in epochs]
    assert counts == [2, 3, 2, 3, 2, 3, 2, 3]
    for epoch in epochs:
        every = [text for batch in epoch for text in batch.examples]
        assert sorted(map(id, every)) == sorted(map(id, TEXTS)) and max(len(batch.examples) for batch in epoch) == 4
    own = [{id(t) for b in epoch for t, is_own in zip(b.examples, b.is_own, strict=True) if is_own} for epoch in epochs]
    assert len({frozenset(one) for one in own}) > 4
    seeds = [batch.seed for epoch in epochs for batch in epoch]
    assert len(set(seeds)) == len(seeds)
    again = list(DistilBatches(TEXTS, 4, on_policy_share=0.25, seed=0).epoch(3))
    assert [batch.is_own for batch in again] == [batch.is_own for batch in epochs[3]]
    other = list(DistilBatches(TEXTS, 4, on_policy_share=0.25, seed=1).epoch(3))
    assert [batch.seed for batch in other] != [batch.seed for batch in again]


def test_own_texts_fit_both_contexts(student: Backbone, teacher: Backbone) -> None:
    class ShortTeacher(Recorder):
        @property
        def description(self) -> Any:
            return replace(super().description, max_context=14)

    recorder = ShortTeacher(teacher)
    run(student, recorder, on_policy_share=1.0, max_new_tokens=50, loop=replace(LOOP, epochs=1))
    lengths = [len(text.input_ids) for text in recorder.asked]
    assert max(lengths) == 14
    with pytest.raises(InputError, match=r"a text has 15 tokens, expected at most 14, the teacher's context"):
        distil(student, ShortTeacher(teacher), [EncodedExample(np.arange(15), 1)], settings())


def test_pairs_that_do_not_go_together_are_refused(student: Backbone, teacher: Backbone) -> None:
    foreign = Backbone.from_model(tiny_backbone("llama").model, b"{}")
    with pytest.raises(MismatchError, match="expected the same; take a student with the teacher's"):
        run(student, LocalTeacher(foreign))
    with pytest.raises(InputError, match="with 4 virtual tokens"):
        run(student, LocalTeacher(teacher), what=SoftPrompt(num_virtual_tokens=4), on_policy_share=0.5)
    with pytest.raises(InputError, match="there are no examples"):
        distil(student, LocalTeacher(teacher), [], settings())
    with pytest.raises(InputError, match="all its labels are ignored"):
        distil(student, LocalTeacher(teacher), [EncodedExample(np.arange(4), 4)], settings(what=Full()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("teacher_share", 0.0),
        ("teacher_share", 1.1),
        ("temperature", 0.0),
        ("on_policy_share", -0.1),
        ("on_policy_share", 1.1),
        ("sampling_temperature", 0.0),
        ("max_new_tokens", 0),
        ("min_prompt_tokens", 0),
        ("top_k", 0),
        ("num_batch_sequences", 0),
        ("weight_decay", -1.0),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}"):
        settings(**{name: value})
