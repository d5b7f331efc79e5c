from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ToyBackbone

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.file_cache import CHECKSUM_BYTES, sealed
from cotune.tuning.feature_cache import SUFFIX, CollectProgress, FeatureCache, collect_features
from cotune.tuning.feature_cache import _decode as decode
from cotune.tuning.feature_cache import _encode as encode


def open_cache(folder: Path, **changes: Any) -> FeatureCache:
    return FeatureCache(folder, **{"backbone_digest": "b", "projections_digest": "p", **changes})


def test_a_second_run_asks_the_source_for_nothing(
    tmp_path: Path, make_source: Callable[..., Any], examples: list[EncodedExample]
) -> None:
    source, seen = make_source(), []
    first = collect_features(open_cache(tmp_path), source, examples, 4, seen.append)
    assert len(source.asked) == len(examples)
    assert seen[-1] == CollectProgress(num_done=len(examples), num_fetched=len(examples), num_sequences=len(examples))

    second = collect_features(open_cache(tmp_path), make_source(fail_after=0), examples, 4)
    assert second.digest() == first.digest()


def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, make_source: Callable[..., Any], examples: list[EncodedExample]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect_features(open_cache(tmp_path), make_source(fail_after=4), examples, 4)
    source = make_source()
    resumed = collect_features(open_cache(tmp_path), source, examples, 4)
    assert source.asked == [example.input_ids.tolist() for example in examples[4:]]
    undisturbed = collect_features(open_cache(tmp_path / "other"), make_source(), examples, 4)
    assert resumed.digest() == undisturbed.digest()


def test_an_example_that_occurs_twice_is_fetched_once(
    tmp_path: Path, make_source: Callable[..., Any], examples: list[EncodedExample]
) -> None:
    source = make_source()
    whole = collect_features(open_cache(tmp_path), source, [examples[0], examples[1], examples[0]], 4)
    assert len(source.asked) == 2
    assert whole.select([0]).digest() == whole.select([2]).digest()


def test_the_name_tells_apart_all_that_features_depend_on(tmp_path: Path) -> None:
    example = EncodedExample(np.array([1, 2, 3]), 1)
    names = {
        open_cache(tmp_path).key(example, 4),
        open_cache(tmp_path).key(example, 5),
        open_cache(tmp_path, backbone_digest="other").key(example, 4),
        open_cache(tmp_path, projections_digest="other").key(example, 4),
        open_cache(tmp_path).key(EncodedExample(np.array([1, 2, 3]), 2), 4),
        open_cache(tmp_path).key(EncodedExample(np.array([1, 2, 4]), 1), 4),
        open_cache(tmp_path).key(EncodedExample(np.array([1, 2, 3, 0]), 1), 4),
    }
    assert len(names) == 7


def test_a_network_that_remembers_gets_the_taps_before_the_targets(tmp_path: Path) -> None:
    """The source is asked from the prompt's last positions on; only the targets are judged."""
    asked: list[int] = []

    class Source:
        def features(self, input_ids: np.ndarray, first_target: int, top_k: int) -> Any:
            asked.append(first_target)
            return ToyBackbone().features(input_ids, first_target, top_k)

    texts = [EncodedExample(np.arange(3, 15), 8), EncodedExample(np.arange(20, 26), 2)]
    whole = collect_features(open_cache(tmp_path), Source(), texts, 4, prompt_window=3)
    assert asked == [6, 1]  # 3 positions up to the first target, that one included; a text begins at 1
    assert whole.offsets.tolist() == [0, 4, 8] and whole.lead_offsets.tolist() == [0, 2, 3]
    assert whole.first_targets.tolist() == [8, 2]
    plain = ToyBackbone().features(np.arange(3, 15), 6, 4)
    np.testing.assert_array_equal(whole.lead_codes[:2], plain.tap_codes[:2])
    np.testing.assert_array_equal(whole.tap_codes[:4], plain.tap_codes[2:])
    np.testing.assert_array_equal(whole.target_ids[:4], np.arange(11, 15))
    again = collect_features(open_cache(tmp_path), Source(), texts, 4, prompt_window=3)
    assert again.digest() == whole.digest() and len(asked) == 2
    without = collect_features(open_cache(tmp_path), Source(), texts, 4)
    assert asked[2:] == [8, 2] and without.digest() != whole.digest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:CHECKSUM_BYTES],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data + b"x",
        lambda data: sealed(b"no features"),
    ],
    ids=["cut", "empty", "checksum only", "one bit", "longer", "something else"],
)
def test_a_damaged_file_is_fetched_again(
    tmp_path: Path, make_source: Callable[..., Any], examples: list[EncodedExample], damage: Callable[[bytes], bytes]
) -> None:
    whole = collect_features(open_cache(tmp_path), make_source(), examples, 4)
    path = tmp_path / (open_cache(tmp_path).key(examples[3], 4) + SUFFIX)
    path.write_bytes(damage(path.read_bytes()))
    assert open_cache(tmp_path).get(path.stem) is None and not path.exists()
    source = make_source()
    again = collect_features(open_cache(tmp_path), source, examples, 4)
    assert source.asked == [examples[3].input_ids.tolist()]
    assert again.digest() == whole.digest()
    assert open_cache(tmp_path).get(path.stem) is not None


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_random_bytes_are_no_features(data: bytes) -> None:
    assert decode(data) is None


def test_all_dtypes_come_back(make_source: Callable[..., Any]) -> None:
    features = make_source().features(np.arange(7), 2, 4)
    again = decode(encode(features))
    assert again is not None
    for name, array in vars(features).items():
        assert getattr(again, name).dtype == array.dtype, name
        np.testing.assert_array_equal(getattr(again, name), array)


def test_least_recently_used_files_of_other_runs_make_room(
    tmp_path: Path, make_source: Callable[..., Any], examples: list[EncodedExample]
) -> None:
    source = make_source()
    others = [EncodedExample(np.arange(10, 18), 4), EncodedExample(np.arange(20, 28), 4)]
    collect_features(open_cache(tmp_path), source, others, 4)
    cache = open_cache(tmp_path)
    paths = [tmp_path / (cache.key(other, 4) + SUFFIX) for other in others]
    os.utime(paths[0], ns=(10**9, 10**9))
    os.utime(paths[1], ns=(2 * 10**9, 2 * 10**9))
    assert cache.get(paths[0].stem) is not None  # using a file makes it young again

    mine = [EncodedExample(np.arange(30, 38), 4)]
    bounded = open_cache(tmp_path, max_bytes=cache.size_bytes + 10)
    collect_features(bounded, source, mine, 4)
    assert [path.exists() for path in paths] == [True, False]
    assert bounded.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir()) <= bounded.max_bytes


def test_a_run_that_cannot_fit_is_refused_after_one_sequence_and_evicts_nothing(
    tmp_path: Path, make_source: Callable[..., Any], examples: list[EncodedExample]
) -> None:
    collect_features(open_cache(tmp_path), make_source(), [EncodedExample(np.arange(10, 18), 4)], 4)
    source = make_source()
    bounded = open_cache(tmp_path, max_bytes=open_cache(tmp_path).size_bytes + 1000)
    with pytest.raises(InputError, match="raise max_bytes"):
        collect_features(bounded, source, examples * 2 + [EncodedExample(np.arange(20, 38), 1)], 4)
    assert len(source.asked) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_what_the_run_needs_is_never_evicted(tmp_path: Path, make_source: Callable[..., Any]) -> None:
    source = make_source()
    cache = open_cache(tmp_path)
    features = source.features(np.arange(8), 4, 4)
    cache.put("needed", features)
    bounded = open_cache(tmp_path, max_bytes=cache.size_bytes + 10)
    with pytest.raises(InputError, match="raise max_bytes"):
        bounded.put("more", features, needed={"needed", "more"})
    assert bounded.get("needed") is not None
    bounded.put("more", features, needed={"more"})
    assert bounded.get("needed") is None


def test_the_oldest_file_stays_if_the_run_needs_it(tmp_path: Path, make_source: Callable[..., Any]) -> None:
    features = make_source().features(np.arange(8), 4, 4)
    cache = open_cache(tmp_path)
    for age, name in enumerate(("needed", "other")):
        cache.put(name, features)
        os.utime(tmp_path / (name + SUFFIX), ns=((age + 1) * 10**9,) * 2)
    open_cache(tmp_path, max_bytes=cache.size_bytes + 10).put("more", features, needed={"needed", "more"})
    assert (cache.get("needed") is None, cache.get("other") is None) == (False, True)


def test_leftovers_of_killed_runs_disappear_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    old, young = tmp_path / "old.part", tmp_path / "young.part"
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    open_cache(tmp_path)
    assert (old.exists(), young.exists()) == (False, True)


def test_bad_bounds_and_places_are_refused(tmp_path: Path, make_source: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="max_bytes is 0"):
        open_cache(tmp_path, max_bytes=0)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be made"):
        open_cache(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="no examples"):
        collect_features(open_cache(tmp_path), make_source(), [], 4)
