"""What one model said of texts, on disk, so that it need not be in memory while the other one learns from it.

A file for each text, bounded in bytes as `cotune.file_cache` says. Its name is the SHA-256 of who read, for
which loss, and both sides' tokens and chunks of the text, so that nothing old is ever taken for something new.

Next-byte log-probabilities are kept in float16, 514 bytes for each chunk with a start of its own; likelihoods in
float32. They are read back from the file also in the run that wrote them: a run that was interrupted sees the same. For
that, too, which texts are read together depends on all that are wanted, not on what is there already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cotune.distillation.common_tokens import TopCommon
from cotune.distillation.mutual_loss import ChunkReadings, MutualLossConfig
from cotune.distillation.paired_texts import PairedText
from cotune.distillation.token_bytes import NUM_EVENTS
from cotune.errors import InputError
from cotune.file_cache import DEFAULT_MAX_BYTES, FileCache

FORMAT = "cotune chunk readings 1"
SUFFIX = ".readings"
HEADER_BYTES = 1024  # the most of a file beside its numbers

# Reads some texts in one pass.
Read = Callable[[Sequence[PairedText]], Sequence[ChunkReadings]]


class ReadingCache:
    """Readings of one teacher for one loss.

    Args:
        folder: made if it is not there; other teachers may share it.
        teacher: names who reads: digests of weights, of what is attached, and of both tokenizers.
        config: of the loss.
        max_bytes: the most that all files may take together.

    Example:
        >>> cache = ReadingCache(Path("run/readings"), teacher=digest, config=loss.config)  # doctest: +SKIP
        >>> cache.fill(texts, wanted, lambda some: read_chunks(proxy, some, 0, loss))  # doctest: +SKIP
        >>> cache.get(texts[3]).log_likelihoods  # doctest: +SKIP
    """

    def __init__(
        self, folder: Path, *, teacher: str, config: MutualLossConfig, max_bytes: int = DEFAULT_MAX_BYTES
    ) -> None:
        self._files = FileCache(folder, suffix=SUFFIX, what="readings", max_bytes=max_bytes)
        self._who, self._config = f"{FORMAT}\n{teacher}\n{config!r}\n", config

    def fill(self, texts: Sequence[PairedText], wanted: Collection[int], read: Read, *, at_once: int = 1) -> int:
        """Have the readings of the wanted texts on disk; `read` is asked for what is not there yet.

        Args:
            texts: all of them.
            wanted: which, by number.
            read: what says them.
            at_once: texts that are given to it together, of like lengths. Where one of them is missing all are read,
                and what was there stays.

        Returns:
            How many readings were missing.

        Raises:
            InputError: they do not fit into the bound, which is known before anything is read, or the disk refuses.
        """
        numbers = sorted(set(wanted))
        self._files.check_bound(sum(self._num_bytes(texts[number]) for number in numbers))
        # A text that is there twice has one reading.
        by_key = {self._key(texts[number]): texts[number] for number in numbers}
        # By bytes, which are the same on both sides.
        by_length = sorted(by_key, key=lambda key: by_key[key].alignment.num_bytes)
        num_missing, needed = 0, set(by_key)
        for begin in range(0, len(by_length), at_once):
            together = by_length[begin : begin + at_once]
            missing = {key for key in together if self._files.get(key) is None}
            if not missing:
                continue
            readings = read([by_key[key] for key in together])
            for key, one in zip(together, readings, strict=True):
                if key in missing:
                    self._files.put(key, _encoded(one), needed=needed)
            num_missing += len(missing)
        return num_missing

    def get(self, text: PairedText) -> ChunkReadings:
        """What `fill` stored.

        Raises:
            InputError: it is gone or damaged.
        """
        contents = self._files.get(self._key(text))
        found = None if contents is None else _decoded(contents)
        if found is None:
            raise InputError(
                f"a reading is missing in {self._files.folder}; leave that folder alone while a round runs, and resume"
            )
        return found

    def _num_bytes(self, text: PairedText) -> int:
        """The most that its file has."""
        num_chunks, config = int(text.alignment.is_usable.sum()), self._config
        each = 4
        if config.byte_weight > 0:
            each += 2 * NUM_EVENTS + config.drops_merged * NUM_EVENTS
        if config.token_weight > 0:
            each += 8 * config.top_k + 4
        return HEADER_BYTES + num_chunks * each

    def _key(self, text: PairedText) -> str:
        state = hashlib.sha256(self._who.encode())
        aligned = text.alignment
        for side, tokens in zip(text.sides, aligned.sides, strict=True):
            for array in (side.input_ids, tokens.first_tokens, tokens.end_tokens):
                state.update(f"{len(array)}\n".encode() + array.astype("<i8").tobytes())
        state.update(aligned.is_usable.tobytes() + aligned.has_own_start.tobytes())
        return state.hexdigest()


def _encoded(readings: ChunkReadings) -> bytes:
    tensors: dict[str, Tensor] = {"log_likelihoods": readings.log_likelihoods.float().cpu()}
    if readings.next_bytes is not None:
        tensors["next_bytes"] = readings.next_bytes.to(torch.float16).cpu()
    if readings.top_common is not None:
        tensors["places"] = readings.top_common.places.to(torch.int32).cpu()
        tensors["log_probs"] = readings.top_common.log_probs.float().cpu()
    if readings.merged is not None:
        tensors["merged"] = readings.merged.cpu()
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _decoded(contents: bytes) -> ChunkReadings | None:
    try:
        found = load(contents)
        return ChunkReadings(
            log_likelihoods=found["log_likelihoods"],
            next_bytes=found["next_bytes"].float() if "next_bytes" in found else None,
            top_common=TopCommon(found["places"].long(), found["log_probs"]) if "places" in found else None,
            merged=found.get("merged"),
        )
    except (SafetensorError, KeyError):
        return None
