"""Distillation: a smaller student learns what a teacher says of each next token.

    L = (1 - a) CE(given targets) + a T^2 D(p_teacher, p_student), both means over target positions

with a = `teacher_share`, temperature T and D one of `cotune.distillation.divergences`. A share of the texts of each
epoch is on-policy, as in GKD (Agarwal et al., arXiv 2306.13649, Algorithm 1): their targets are not the given ones but
what the student, as it is at that step, writes after the same prompt; the teacher judges these tokens, and no gradient
goes through the drawing. On-policy texts have no CE, as nobody says that they are right.

The teacher is a `cotune.distillation.teacher.Teacher`, here or behind a cloud. Loop, checkpoints, clipping and what is
trained (all parameters, or an adapter) are those of `cotune.tuning`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from cotune.data.batches import EncodedExample, pad_batch, similar_lengths
from cotune.distillation.divergences import Divergence, ForwardKl, check_temperature, divergence_of_top
from cotune.distillation.teacher import Teacher, check_same_tokenizer
from cotune.distillation.top_log_probs import check_top_k
from cotune.errors import InputError
from cotune.models.anatomy import BackboneSpec
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import answer_logits, check_targets, digest_examples
from cotune.tuning.attached import Tunable, check_attached, check_lengths
from cotune.tuning.continuations import continuations, sampled
from cotune.tuning.full import Full
from cotune.tuning.gradient import GradientState
from cotune.tuning.gradient_checkpointing import gradient_checkpointing
from cotune.tuning.loop import EpochRecord, LoopConfig, LoopProgress, run_loop
from cotune.tuning.own_tensors import own_tensors_restored, taken
from cotune.tuning.tune import Adaptation
from cotune.tuning.tuner import Metrics, Params


@dataclass(frozen=True, kw_only=True)
class DistilSettings:
    """How a student learns."""

    what: Adaptation = field(default_factory=Full)
    """The student's parameters that change."""
    divergence: Divergence = field(default_factory=ForwardKl)
    """Of the student from the teacher."""
    temperature: float = 1.0
    """T, of both distributions in the divergence."""
    teacher_share: float = 0.5
    """a, above 0 and at most 1: how much of the loss is the divergence; the rest is -log p of the given targets."""
    top_k: int | None = None
    """Tokens that the teacher tells of each position, the rest being one lump; None for all. A cloud sends 7 bytes for
    each: give it a number, such as 64."""
    on_policy_share: float = 0.0
    """Share of the texts whose targets the student writes itself, 0 to 1; exact over the whole run, up to one text."""
    sampling_temperature: float = 1.0
    """Of the student's own texts, above 0."""
    max_new_tokens: int = 64
    """Longest own text."""
    min_prompt_tokens: int = 8
    """An own text begins after the given prompt, and after at least this many of the text's tokens, if it has so many:
    plain texts have a prompt of one token."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=3, learning_rate=5e-4))
    """Epochs, time and learning rate."""
    num_batch_sequences: int = 8
    """Sequences in one step."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    max_grad_norm: float = 1.0
    """Total norm that a step's gradient is clipped to."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping what is inside it."""
    seed: int = 0
    """Of the order of texts, of which of them are on-policy, and of the draws."""

    def __post_init__(self) -> None:
        check_attached(self)
        check_temperature(self.temperature)
        if not 0 < self.teacher_share <= 1:
            raise InputError(
                f"teacher_share is {self.teacher_share}, expected above 0 and at most 1; without a teacher, use tune"
            )
        if self.top_k is not None:
            check_top_k(self.top_k)
        if not 0 <= self.on_policy_share <= 1:
            raise InputError(f"on_policy_share is {self.on_policy_share}, expected 0 to 1")
        if not 0 < self.sampling_temperature < float("inf"):
            raise InputError(f"sampling_temperature is {self.sampling_temperature}, expected a positive number")
        for name in ("max_new_tokens", "min_prompt_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True, kw_only=True)
class DistilResult:
    """A student that has learnt, and how it went.

    Attributes:
        adapter: attach it to the student's model to use it, or merge it.
        settings: as it was trained.
        num_trained: numbers that were trained.
        curve: losses by epoch, L of this module on the given texts; epoch 0 is the start.
        best_epoch: the epoch whose parameters `adapter` has.
    """

    adapter: Tunable
    settings: DistilSettings
    num_trained: int
    curve: list[EpochRecord]
    best_epoch: int

    def save_model(self, folder: Path, student: Backbone) -> None:
        """Write the student as a whole Hugging Face folder: weights, configs and `tokenizer.json`.

        Args:
            folder: new, or empty.
            student: as it was given to `distil`.

        Raises:
            InputError: the folder holds something, or the adapter cannot be a part of weights.
        """
        merged = self.adapter.merge(student.model)
        merged.save_model(folder, student.model, student.tokenizer_json)


@dataclass(frozen=True, kw_only=True)
class DistilBatch:
    """What one step learns from.

    Attributes:
        examples: given texts.
        is_own: of each, whether the student writes the target itself.
        seed: of these draws.
    """

    examples: tuple[EncodedExample, ...]
    is_own: tuple[bool, ...]
    seed: int = 0


class DistilBatches:
    """Texts of similar lengths together; which of them are on-policy is drawn anew in each epoch.

    Of n texts, floor(share n (e + 1)) - floor(share n e) are on-policy in epoch e, so that the share is exact over all
    epochs, up to one text.

    Args:
        examples: given texts.
        num_batch_sequences: the most in one batch.
        on_policy_share: 0 to 1.
        seed: of order, choice and draws.

    Raises:
        InputError: there is no text, or one without a target.
    """

    def __init__(
        self, examples: Sequence[EncodedExample], num_batch_sequences: int, *, on_policy_share: float, seed: int
    ) -> None:
        check_targets(examples)
        self._examples, self._size = examples, num_batch_sequences
        self._share, self._seed = on_policy_share, seed

    def __len__(self) -> int:
        return -(-len(self._examples) // self._size)

    def epoch(self, epoch: int) -> Iterator[DistilBatch]:
        num = len(self._examples)
        # A share such as 0.1 is a little more or less than a tenth.
        before, after = (int(self._share * num * count + 1e-9) for count in (epoch, epoch + 1))
        rng = np.random.default_rng((self._seed, epoch))
        own = frozenset(rng.permutation(num)[: after - before].tolist())
        lengths = [len(example.input_ids) for example in self._examples]
        for batch in similar_lengths(lengths, self._size, int(rng.integers(2**32))):
            yield DistilBatch(
                examples=tuple(self._examples[index] for index in batch),
                is_own=tuple(index in own for index in batch),
                seed=int(rng.integers(2**63)),
            )


class DistilTuner:
    """Gradient descent on L; fits `cotune.tuning.tuner.Tuner`.

    Args:
        model: the student's, with what is trained attached; its own tensors are trained.
        spec: of the student.
        teacher: is asked for each batch.
        settings: loss, own texts, descent.
    """

    def __init__(self, model: PreTrainedModel, spec: BackboneSpec, teacher: Teacher, settings: DistilSettings) -> None:
        self._model, self._spec, self._teacher, self._settings = model, spec, teacher, settings
        self._top_k = teacher.description.vocab_size if settings.top_k is None else settings.top_k
        self._max_context = min(spec.max_context, teacher.description.max_context)

    def init(self, params: Params) -> GradientState:
        """Write `params` into the model, whose tensors the state then is."""
        return GradientState.inside(self._model, params, weight_decay=self._settings.weight_decay)

    def step(self, state: GradientState, batch: DistilBatch) -> tuple[GradientState, Metrics]:
        share = self._settings.teacher_share
        examples = self._with_own_texts(state, batch)
        answer, distance = self._nats(state, examples)
        loss = share * distance.mean()
        lengths = torch.tensor([len(example.input_ids) - example.first_target for example in examples])
        is_given = ~torch.tensor(batch.is_own).repeat_interleave(lengths)
        if share < 1 and bool(is_given.any()):
            loss = loss + (1 - share) * answer[is_given.to(answer.device)].mean()
        metrics = state.descend(loss, max_grad_norm=self._settings.max_grad_norm)
        own = {"divergence": float(distance.detach().mean()), "own_texts": float(sum(batch.is_own))}
        return state, {**metrics, **own}

    @torch.no_grad()
    def evaluate(self, state: GradientState, batch: DistilBatch) -> tuple[float, int]:
        """L over the given targets."""
        share = self._settings.teacher_share
        answer, distance = self._nats(state, batch.examples)
        nats = share * distance.double().sum() + (1 - share) * answer.double().sum()
        return float(nats), len(answer)

    def _nats(self, state: GradientState, examples: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        """-log p of each target, and T^2 D at its position, float32 (targets,)."""
        settings = self._settings
        batch = pad_batch(examples, self._spec.pad_token_id)
        logits, targets = answer_logits(self._model, self._model.get_output_embeddings(), state.params, batch)
        told = self._teacher.top_log_probs(examples, self._top_k)
        distance = divergence_of_top(settings.divergence, told, logits, temperature=settings.temperature)
        return F.cross_entropy(logits, targets, reduction="none"), settings.temperature**2 * distance

    def _with_own_texts(self, state: GradientState, batch: DistilBatch) -> list[EncodedExample]:
        """The batch's texts, with what the student writes where it is asked to."""
        settings = self._settings
        prompts = [
            example.input_ids[: max(example.first_target, min(settings.min_prompt_tokens, len(example.input_ids) - 1))]
            for example, is_own in zip(batch.examples, batch.is_own, strict=True)
            if is_own
        ]
        if not prompts:
            return list(batch.examples)
        room = max(1, self._max_context - max(map(len, prompts)))
        written = iter(
            continuations(
                self._model,
                state.params,
                prompts,
                sampled(torch.Generator().manual_seed(batch.seed), settings.sampling_temperature),
                max_new_tokens=min(settings.max_new_tokens, room),
                stop_token_ids=self._spec.eos_token_ids,
            )
        )
        own = iter(EncodedExample(np.array([*prompt, *next(written)], np.int64), len(prompt)) for prompt in prompts)
        return [next(own) if is_own else e for e, is_own in zip(batch.examples, batch.is_own, strict=True)]


def distil(
    student: Backbone,
    teacher: Teacher,
    texts: Sequence[EncodedExample],
    settings: DistilSettings,
    *,
    heldout: Sequence[EncodedExample] = (),
    run_dir: Path | None = None,
    resume: bool = False,
    progress: Callable[[LoopProgress], None] | None = None,
) -> DistilResult:
    """Train a student on what a teacher says; the student's backbone is as before afterwards.

    A run that was interrupted and resumed ends with the same weights, own texts included: they are drawn from the
    student as the checkpoint has it.

    Args:
        student: a loaded folder, or `with_fewer_layers` of the teacher; serves nobody else meanwhile.
        teacher: with the same tokenizer and another model object than the student's. A `CachedTeacher` is asked about
            each text once.
        texts: token ids and where the targets begin; of plain texts all tokens after the first.
        settings: how.
        heldout: texts to judge each epoch by, with L; the best epoch wins. Empty: the last one does.
        run_dir: for metrics and checkpoints.
        resume: go on from the checkpoint in `run_dir`, if there is one.
        progress: called after each step.

    Raises:
        MismatchError: the tokenizers differ.
        InputError: nothing to learn from, or a text that does not fit student and teacher.
        NonFiniteLossError: a loss is nan or inf.

    Example:
        >>> student = with_fewer_layers(backbone, spread_layers(backbone.spec.num_layers, 2))  # doctest: +SKIP
        >>> result = distil(student, LocalTeacher(backbone), texts, DistilSettings())  # doctest: +SKIP
        >>> result.save_model(Path("student"), student)  # doctest: +SKIP
    """
    check_same_tokenizer(student.spec, teacher.description)
    fresh = settings.what.fresh(student, texts, seed=settings.seed)
    check_lengths([*texts, *heldout], student, fresh)
    longest = max((len(text.input_ids) for text in [*texts, *heldout]), default=0)
    if longest > teacher.description.max_context:
        raise InputError(
            f"a text has {longest} tokens, expected at most {teacher.description.max_context}, the teacher's context; "
            "give max_length when encoding"
        )
    if settings.on_policy_share and fresh.num_virtual_tokens:
        raise InputError(
            f"on_policy_share is {settings.on_policy_share} with {fresh.num_virtual_tokens} virtual tokens in front of "
            "each text, expected 0 with those; train all parameters or an adapter such as lora"
        )
    size = settings.num_batch_sequences
    batches = DistilBatches(texts, size, on_policy_share=settings.on_policy_share, seed=settings.seed)
    judges = DistilBatches(heldout, size, on_policy_share=0.0, seed=0) if heldout else None
    with (
        fresh.attach(student.model) as model,
        own_tensors_restored(model, fresh.params, run_dir),
        gradient_checkpointing(student.model, enabled=settings.gradient_checkpointing),
    ):
        tuner = DistilTuner(model, student.spec, teacher, settings)
        result = run_loop(
            tuner,
            tuner.init(fresh.params),
            batches,
            settings.loop,
            heldout=judges,
            run_dir=run_dir,
            fingerprint=_fingerprint(student, teacher, settings, texts, heldout),
            resume=resume,
            progress=progress,
        )
        params = taken(result.state.params)
    return DistilResult(
        adapter=fresh.trained(params),
        settings=settings,
        num_trained=fresh.num_parameters,
        curve=result.curve,
        best_epoch=result.best_epoch,
    )


def _fingerprint(
    student: Backbone,
    teacher: Teacher,
    settings: DistilSettings,
    texts: Sequence[EncodedExample],
    heldout: Sequence[EncodedExample],
) -> str:
    number_types = sorted({str(parameter.dtype) for parameter in student.model.parameters()})
    digests = (student.spec.backbone_digest, teacher.description.backbone_digest)
    about = repr((settings, digests, number_types, digest_examples(texts, heldout)))
    return hashlib.sha256(about.encode()).hexdigest()
