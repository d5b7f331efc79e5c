from __future__ import annotations

import numpy as np
import pytest

from cotune.federation.robust import krum_scores
from cotune.federation.robust.krum_scores import krum_order, squared_distances
from cotune.federation.robust.votes import read_votes


def votes_of(updates: np.ndarray, scales: np.ndarray | None = None) -> object:
    return read_votes(updates, np.ones(len(updates)), scales=scales, reader="test")


def test_distances_by_hand() -> None:
    updates = np.array([[0, 0], [3, 4], [0, 1]], dtype=np.float32)
    assert squared_distances(votes_of(updates)).tolist() == [[0, 25, 1], [25, 0, 18], [1, 18, 0]]
    halves = squared_distances(votes_of(updates, np.array([1.0, 0.5, 0.0])))
    assert halves.tolist() == [[0, 6.25, 0], [6.25, 0, 6.25], [0, 6.25, 0]]


def test_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = np.random.default_rng(0).standard_normal((5, 37)).astype(np.float32)
    whole = updates.astype(np.float64)
    expected = ((whole[:, None] - whole) ** 2).sum(axis=2)
    monkeypatch.setattr(krum_scores, "_BLOCK_BYTES", 5 * 8 * 4)
    np.testing.assert_allclose(squared_distances(votes_of(updates)), expected, rtol=1e-12)


def test_near_updates_far_from_zero_keep_their_digits() -> None:
    updates = np.array([[2.0**24], [2.0**24 + 2], [2.0**24 + 6]], dtype=np.float32)
    assert squared_distances(votes_of(updates))[0].tolist() == [0, 4, 36]
    far = np.full((2, 1000), np.finfo(np.float32).max, dtype=np.float32)
    far[1] *= -1
    assert np.isfinite(squared_distances(votes_of(far))).all()


def test_scores_by_hand() -> None:
    points = np.array([0.0, 1.0, 2.0, 2.5, 9.0, 8.0])
    # f = 2: the 2 nearest. 0: 1+4 = 5; 1: 1+1 = 2; 2: 0.25+1 = 1.25; 2.5: 0.25+2.25 = 2.5; 9: 1+42.25; 8: 1+30.25.
    assert krum_order((points - points[:, None]) ** 2, 2).tolist() == [2, 1, 3, 0, 5, 4]
    # f = 1: the 3 nearest, and 1 with 4.25 comes before 2 with 5.25.
    assert krum_order((points - points[:, None]) ** 2, 1).tolist()[:2] == [1, 2]


def test_each_others_nearest_are_ordered_by_all_distances() -> None:
    # 1 and 2 are nearest to each other and have equal scores; 2 is nearer to 5.
    for points in ([1.0, 2.0, 5.0], [5.0, 2.0, 1.0], [2.0, 1.0, 5.0]):
        values = np.array(points)
        assert values[krum_order((values - values[:, None]) ** 2, 1)].tolist() == [2.0, 1.0, 5.0]
    assert krum_order(np.zeros((1, 1)), 1).tolist() == [0]
