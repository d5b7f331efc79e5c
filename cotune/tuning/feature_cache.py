"""Features on disk: the cloud computes each sequence once, whatever the number of epochs, runs and interruptions.

The backbone is frozen, so its features of a text never change (SPA's side network reads them and nothing else; PAE
MobiLLM, arXiv 2507.01216, caches activations for the same reason). One file holds one sequence, appears complete or
not at all, and carries a checksum; a run that was interrupted fetches only what is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.file_cache import DEFAULT_MAX_BYTES, FileCache
from cotune.generation.side_state import first_position
from cotune.tuning.feature_set import FeatureSet
from cotune.wire.features import FeatureSource, SequenceFeatures

FORMAT = "cotune features 1"
SUFFIX = ".features"


@dataclass(frozen=True, kw_only=True)
class CollectProgress:
    """How far `collect_features` is: sequences at hand, of them fetched in this run, and all that are wanted."""

    num_done: int
    num_fetched: int
    num_sequences: int


class FeatureCache:
    """A folder of features, bounded in bytes; the least recently used sequences of other runs make room.

    A file's contents are a safetensors file. Its name is the SHA-256 of all that the features depend on, so caches can
    be shared by any models and data sets, and a file that is cut or damaged is fetched again.

    Args:
        folder: made if it is not there.
        backbone_digest: of the model whose features these are.
        projections_digest: of its frozen down-projections.
        max_bytes: the most that all files in the folder may take together.

    Raises:
        InputError: `max_bytes` is not positive, or the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        *,
        backbone_digest: str,
        projections_digest: str,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        self._files = FileCache(folder, suffix=SUFFIX, what="feature", max_bytes=max_bytes)
        self._origin = f"{FORMAT}\n{backbone_digest}\n{projections_digest}\n"

    @property
    def max_bytes(self) -> int:
        """The most that all files may take together."""
        return self._files.max_bytes

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, of this run and of others."""
        return self._files.size_bytes

    def key(self, example: EncodedExample, top_k: int, prompt_window: int = 0) -> str:
        """Name of the features of one example: SHA-256, hex, of all that they depend on.

        Args:
            example: its token ids, and where its targets begin.
            top_k: base logits kept for each position.
            prompt_window: how many positions up to the first target are asked for, as in `collect_features`.
        """
        first = first_position(example.first_target, prompt_window)
        state = hashlib.sha256(self._origin.encode())
        state.update(f"{top_k} {first} {len(example.input_ids)}\n".encode())
        state.update(np.ascontiguousarray(example.input_ids, "<i8").data)
        return state.hexdigest()

    def stored_bytes(self, key: str) -> int:
        """Size of a file in bytes, 0 if it is not there."""
        return self._files.stored_bytes(key)

    def get(self, key: str) -> SequenceFeatures | None:
        """The features of that name, or None if they are not there or damaged; a damaged file is removed."""
        contents = self._files.get(key)
        if contents is None:
            return None
        features = _decode(contents)
        if features is None:
            self._files.drop(key)
        return features

    def put(self, key: str, features: SequenceFeatures, *, needed: Collection[str] = ()) -> None:
        """Store features under a name; complete or not at all.

        Args:
            key: from `key`.
            features: of one sequence.
            needed: names that must not be evicted to make room.

        Raises:
            InputError: they do not fit beside what is needed, or the disk does not take them.
        """
        self._files.put(key, _encode(features), needed=needed)

    def check_bound(self, num_bytes: int) -> None:
        """Refuse a run whose features cannot fit, before the cloud computes them.

        Raises:
            InputError: `num_bytes` is more than the bound.
        """
        self._files.check_bound(num_bytes)


def collect_features(
    cache: FeatureCache,
    source: FeatureSource,
    examples: Sequence[EncodedExample],
    top_k: int,
    progress: Callable[[CollectProgress], None] | None = None,
    *,
    prompt_window: int = 0,
) -> FeatureSet:
    """Features of all examples, from the cache where they are there, else from the source and into the cache.

    Each sequence is stored as soon as it arrives, so an interrupted run goes on where it was.

    Args:
        cache: where features are kept.
        source: a backbone, or a cloud over the network.
        examples: token ids and where the targets begin.
        top_k: how many base logits to keep for each position.
        progress: called after each sequence.
        prompt_window: of the side network, see `cotune.generation.side_state.first_position`; taps of so many
            positions up to the first target come too.

    Returns:
        The target positions of all examples, in order, and the taps of those before that are asked for.

    Raises:
        InputError: there are no examples, or their features do not fit into the bounded cache.
    """
    if not examples:
        raise InputError("there are no examples to collect features for, expected at least one")
    keys = [cache.key(example, top_k, prompt_window) for example in examples]
    needed = frozenset(keys)
    first_targets = [example.first_target for example in examples]
    firsts = [first_position(first_target, prompt_window) for first_target in first_targets]
    asked = [len(example.input_ids) - first for example, first in zip(examples, firsts, strict=True)]
    leads = [first_target - first for first_target, first in zip(first_targets, firsts, strict=True)]
    lengths = [num - lead for num, lead in zip(asked, leads, strict=True)]
    whole: FeatureSet | None = None
    num_fetched = 0
    for index, (key, example) in enumerate(zip(keys, examples, strict=True)):
        features = cache.get(key)
        if features is None:
            features = source.features(np.asarray(example.input_ids, np.int64), firsts[index], top_k)
            if num_fetched == 0:
                cache.check_bound(_needed_bytes(cache, keys, asked, features))
            cache.put(key, features, needed=needed)
            num_fetched += 1
        if whole is None:
            whole = FeatureSet.for_lengths(lengths, features, leads=leads, first_targets=first_targets)
        whole.put(index, features)
        if progress is not None:
            progress(CollectProgress(num_done=index + 1, num_fetched=num_fetched, num_sequences=len(examples)))
    assert whole is not None
    return whole


def _needed_bytes(cache: FeatureCache, keys: Sequence[str], lengths: Sequence[int], sample: SequenceFeatures) -> int:
    """Bytes that a run's features take in the cache: what is there, and the rest judged by one sample."""
    bytes_per_position = sum(array.nbytes for array in _arrays(sample).values()) / max(1, len(sample))
    return int(
        sum(
            cache.stored_bytes(key) or bytes_per_position * length
            for key, length in dict(zip(keys, lengths, strict=True)).items()
        )
    )


def _arrays(features: SequenceFeatures) -> dict[str, NDArray[np.generic]]:
    return {
        "target_ids": features.target_ids.astype(np.int32),
        "tap_codes": features.tap_codes,
        "tap_scales": features.tap_scales,
        "log_normalizer": features.log_normalizer,
        "target_logits": features.target_logits,
        "top_ids": features.top_ids.astype(np.int32),
        "top_logits": features.top_logits,
        "hidden": features.hidden,
    }


def _encode(features: SequenceFeatures) -> bytes:
    return save({name: np.ascontiguousarray(array) for name, array in _arrays(features).items()})


def _decode(contents: bytes) -> SequenceFeatures | None:
    try:
        arrays = load(contents)
        return SequenceFeatures(
            target_ids=arrays["target_ids"].astype(np.int64),
            tap_codes=arrays["tap_codes"],
            tap_scales=arrays["tap_scales"],
            log_normalizer=arrays["log_normalizer"],
            target_logits=arrays["target_logits"],
            top_ids=arrays["top_ids"].astype(np.int64),
            top_logits=arrays["top_logits"],
            hidden=arrays["hidden"],
        )
    except (SafetensorError, KeyError):
        return None
