"""Whom a student learns from: a model in this process, or one behind a cloud, asked for its likeliest next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.data.batches import EncodedExample
from cotune.distillation.top_log_probs import TopLogProbs, check_top_k
from cotune.errors import MismatchError
from cotune.models.anatomy import BackboneSpec
from cotune.models.backbone import Backbone


class TeacherDescription(Protocol):
    """What has to be known of a model to learn from it; `CloudDescription` and `BackboneSpec` say it."""

    @property
    def backbone_digest(self) -> str:
        """SHA-256, hex: names the model."""
        ...

    @property
    def tokenizer_digest(self) -> str:
        """SHA-256, hex, of its `tokenizer.json`."""
        ...

    @property
    def vocab_size(self) -> int:
        """Rows of its output embedding."""
        ...

    @property
    def max_context(self) -> int:
        """The most tokens that a text may have."""
        ...


class Teacher(Protocol):
    """A model that is asked, and does not change."""

    @property
    def description(self) -> TeacherDescription:
        """What it is."""
        ...

    def top_log_probs(self, examples: Sequence[EncodedExample], top_k: int) -> TopLogProbs:
        """What it says at the target positions of all examples, one after the other.

        Args:
            examples: token ids, and where their targets begin; at least one.
            top_k: tokens for each position, of its vocabulary; that many or more gives all.

        Raises:
            InputError: `top_k` is less than 1, or a text does not fit it.
        """
        ...


class LocalTeacher:
    """A backbone in this process.

    Args:
        backbone: not the object that is trained: a student that asks itself agrees with every answer.

    Example:
        >>> teacher = LocalTeacher(Backbone.from_pretrained("starter"))  # doctest: +SKIP
        >>> teacher.top_log_probs([EncodedExample(np.array([1, 17, 4]), 1)], top_k=8).ids.shape  # doctest: +SKIP
        torch.Size([2, 8])
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    @property
    def description(self) -> BackboneSpec:
        return self._backbone.spec

    def top_log_probs(self, examples: Sequence[EncodedExample], top_k: int) -> TopLogProbs:
        check_top_k(top_k)
        sequences = [(example.input_ids, example.first_target) for example in examples]
        return TopLogProbs.of_logits(self._backbone.target_logits(sequences), top_k)


class LargestLogits(Protocol):
    """The part of `SequenceFeatures` that tells of the next token; NumPy arrays over the targets of one text."""

    @property
    def top_ids(self) -> NDArray[np.int64]:
        """int64 (targets, top_k), ascending."""
        ...

    @property
    def top_logits(self) -> NDArray[np.float32]:
        """float32 (targets, top_k)."""
        ...

    @property
    def log_normalizer(self) -> NDArray[np.float32]:
        """float32 (targets,), log sum exp of all logits."""
        ...


class LogitSource(Protocol):
    """What gives features of texts, such as `cotune.device.features.RemoteFeatureSource`, or a `Backbone`."""

    @property
    def description(self) -> TeacherDescription:
        """The model behind it."""
        ...

    def features(self, input_ids: NDArray[np.int64], first_target: int, top_k: int) -> LargestLogits:
        """As `cotune.wire.features.FeatureSource`."""
        ...


class CloudTeacher:
    """A model behind a source of features: a remote cloud tells the largest logits and the log normaliser.

    A log-probability is their difference, so that it is as exact as float32 numbers of their size are; the cloud's
    numbers come as they are, bit for bit. Compared with `LocalTeacher` on the same model that is 2e-6 nats or less for
    log normalisers below 32, unless the two compute in other batches or on other machines, whose rounding is added.

    The source sends the token ids of each text and nothing else.

    Args:
        source: connected; its connection says what went out, as `cotune.wire.ledgered.LedgeredConnection` does.

    Example:
        >>> with RemoteFeatureSource(connector) as source:  # doctest: +SKIP
        ...     top = CloudTeacher(source).top_log_probs(examples, top_k=64)
    """

    def __init__(self, source: LogitSource) -> None:
        self._source = source

    @property
    def description(self) -> TeacherDescription:
        return self._source.description

    def top_log_probs(self, examples: Sequence[EncodedExample], top_k: int) -> TopLogProbs:
        """As `Teacher` says; one request for each text.

        Raises:
            InputError: also where the source's answer is no distribution over this vocabulary.
            WireError: the cloud refuses, or cannot be reached.
        """
        check_top_k(top_k)
        return TopLogProbs.joined([self._ask(example, top_k) for example in examples])

    def _ask(self, example: EncodedExample, top_k: int) -> TopLogProbs:
        features = self._source.features(np.asarray(example.input_ids, np.int64), example.first_target, top_k)
        top = TopLogProbs(
            torch.from_numpy(features.top_ids.astype(np.int64)),
            torch.from_numpy(features.top_logits - features.log_normalizer[:, None]),
        )
        num_positions = len(example.input_ids) - example.first_target
        top.check(num_positions=num_positions, top_k=top_k, vocab_size=self.description.vocab_size)
        return top


def check_same_tokenizer(student: TeacherDescription, teacher: TeacherDescription) -> None:
    """Make sure that token ids mean the same on both sides.

    Raises:
        MismatchError: they do not.
    """
    ours = (student.tokenizer_digest[:12], student.vocab_size)
    theirs = (teacher.tokenizer_digest[:12], teacher.vocab_size)
    if (student.tokenizer_digest, student.vocab_size) != (teacher.tokenizer_digest, teacher.vocab_size):
        raise MismatchError(
            f"the student has tokenizer {ours[0]} with {ours[1]} tokens and the teacher {theirs[0]} with {theirs[1]}, "
            "expected the same; take a student with the teacher's tokenizer.json, or start from the teacher with fewer "
            "layers"
        )
