from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.tuning.feature_set import FeatureSet


def test_sequences_are_concatenated_in_order(make_source: Callable[..., Any]) -> None:
    source = make_source()
    parts = [source.features(np.arange(n), 2, 4) for n in (5, 3, 6)]
    whole = FeatureSet.from_sequences(parts)
    assert whole.offsets.tolist() == [0, 3, 4, 8]
    assert (len(whole), whole.num_sequences) == (8, 3)
    assert whole.tap_codes.dtype == np.int8
    assert whole.target_ids.tolist() == [2, 3, 4, 2, 2, 3, 4, 5]
    np.testing.assert_array_equal(whole.top_logits[3:4], parts[1].top_logits)


def test_select_takes_whole_sequences_in_the_order_asked_for(make_source: Callable[..., Any]) -> None:
    source = make_source()
    parts = [source.features(np.arange(n), 2, 4) for n in (5, 3, 6)]
    whole = FeatureSet.from_sequences(parts)
    assert whole.select([2, 0]).digest() == FeatureSet.from_sequences([parts[2], parts[0]]).digest()
    assert len(whole.select([])) == 0


def with_leads(make_source: Callable[..., Any]) -> FeatureSet:
    part = make_source().features(np.arange(6), 2, 4)
    whole = FeatureSet.for_lengths([3], part, leads=[1], first_targets=[3])
    whole.put(0, part)
    return whole


def test_kept_taps_are_kept_everywhere(make_source: Callable[..., Any]) -> None:
    whole = with_leads(make_source)
    kept = whole.keep_taps((0, 2))
    np.testing.assert_array_equal(kept.tap_codes, whole.tap_codes[:, [0, 2]])
    np.testing.assert_array_equal(kept.tap_scales, whole.tap_scales[:, [0, 2]])
    np.testing.assert_array_equal(kept.lead_codes, whole.lead_codes[:, [0, 2]])
    np.testing.assert_array_equal(kept.lead_scales, whole.lead_scales[:, [0, 2]])
    assert len(kept) == len(whole) and kept.digest() != whole.digest()
    with pytest.raises(InputError, match=r"tap indices are \(1, 3\), expected ascending numbers from 0 to 2"):
        whole.keep_taps((1, 3))


@pytest.mark.parametrize("name", ["target_ids", "tap_codes", "log_normalizer", "top_logits", "hidden", "offsets"])
def test_the_digest_sees_every_array(make_source: Callable[..., Any], name: str) -> None:
    whole = FeatureSet.from_sequences([make_source().features(np.arange(5), 2, 4)])
    changed = getattr(whole, name).copy()
    changed.reshape(-1)[0] += 1
    assert replace(whole, **{name: changed}).digest() != whole.digest()


def test_shapes_that_differ_are_refused(make_source: Callable[..., Any]) -> None:
    source = make_source()
    with pytest.raises(InputError, match="top_ids of sequence 1"):
        FeatureSet.from_sequences([source.features(np.arange(5), 2, 4), source.features(np.arange(5), 2, 3)])
    with pytest.raises(InputError, match="no sequences"):
        FeatureSet.from_sequences([])
