"""A teacher's answers on disk: each text is asked about once, whatever the number of epochs, runs and interruptions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from cotune.data.batches import EncodedExample
from cotune.distillation.teacher import Teacher, TeacherDescription
from cotune.distillation.top_log_probs import TopLogProbs, check_top_k
from cotune.errors import InputError
from cotune.file_cache import DEFAULT_MAX_BYTES, FileCache

FORMAT = "cotune teacher 1"
SUFFIX = ".teacher"
BYTES_PER_TOKEN = 8  # an id and a log-probability
HEADER_BYTES = 512  # the most of a file beside these


class CachedTeacher:
    """A teacher that remembers, with files as of `cotune.file_cache`: whole or not there, checked, bounded.

    A file's name is the SHA-256 of teacher, text, first target and k. The teacher is asked for one text at a time, so
    that an answer does not depend on which texts of a batch were there already; what comes back are the same float32
    numbers in all runs. Texts that a student writes itself are remembered too, and go first where room is short.

    Attributes:
        num_asked: texts that the teacher was asked about.

    Args:
        teacher: to ask.
        folder: made if it is not there; runs with any teachers may share it.
        max_bytes: the most that all files may take together.

    Example:
        >>> teacher = CachedTeacher(CloudTeacher(source), Path("run/teacher"))  # doctest: +SKIP
        >>> teacher.reserve(examples, top_k=64)  # doctest: +SKIP
    """

    def __init__(self, teacher: Teacher, folder: Path, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._teacher = teacher
        self._files = FileCache(folder, suffix=SUFFIX, what="teacher", max_bytes=max_bytes)
        self._needed: frozenset[str] = frozenset()
        self.num_asked = 0

    @property
    def description(self) -> TeacherDescription:
        return self._teacher.description

    def reserve(self, examples: Sequence[EncodedExample], top_k: int) -> None:
        """Never evict the answers to these texts, which each epoch needs again.

        Raises:
            InputError: they do not fit into the bound; nothing was asked yet.
        """
        keys = {self._key(example, top_k): len(example.input_ids) - example.first_target for example in examples}
        k = min(top_k, self.description.vocab_size)
        self._files.check_bound(sum(HEADER_BYTES + num * k * BYTES_PER_TOKEN for num in keys.values()))
        self._needed |= keys.keys()

    def top_log_probs(self, examples: Sequence[EncodedExample], top_k: int) -> TopLogProbs:
        """As `Teacher` says.

        Raises:
            InputError: also where an answer does not fit beside what is reserved, or the disk does not take it.
        """
        check_top_k(top_k)
        return TopLogProbs.joined([self._answer(example, top_k) for example in examples])

    def _answer(self, example: EncodedExample, top_k: int) -> TopLogProbs:
        key = self._key(example, top_k)
        known = self._files.get(key)
        answer = None if known is None else self._decoded(known, example, top_k)
        if answer is None:
            answer = self._teacher.top_log_probs([example], top_k)
            self.num_asked += 1
            self._files.put(key, _encoded(answer), needed=self._needed | {key})
        return answer

    def _decoded(self, contents: bytes, example: EncodedExample, top_k: int) -> TopLogProbs | None:
        """What is in a file, or None where it is something else."""
        try:
            arrays = load(contents)
            answer = TopLogProbs(arrays["ids"].to(torch.int64), arrays["log_probs"])
            num_positions = len(example.input_ids) - example.first_target
            answer.check(num_positions=num_positions, top_k=top_k, vocab_size=self.description.vocab_size)
        except (SafetensorError, KeyError, InputError):
            return None
        return answer

    def _key(self, example: EncodedExample, top_k: int) -> str:
        about = self.description
        k = min(top_k, about.vocab_size)
        state = hashlib.sha256(f"{FORMAT}\n{about.backbone_digest}\n{about.tokenizer_digest}\n".encode())
        state.update(f"{k} {example.first_target} {len(example.input_ids)}\n".encode())
        state.update(np.ascontiguousarray(example.input_ids, "<i8").data)
        return state.hexdigest()


def _encoded(answer: TopLogProbs) -> bytes:
    return save(
        {
            "ids": answer.ids.to(torch.int32).cpu().contiguous(),
            "log_probs": answer.log_probs.float().cpu().contiguous(),
        }
    )
