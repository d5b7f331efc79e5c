"""Planes by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.sandwich.bilevel.planes import PlaneConfig, PlaneSet

X, Y = np.array([1.0]), np.array([2.0])


def test_a_plane_cuts_off_the_point_at_which_it_was_made() -> None:
    planes = PlaneSet(PlaneConfig())
    # h = 1 above its bound here, slopes 3 and 4, so normalised by 5: 0.6 x + 0.8 y - 2 <= 0.
    planes.cut(X, Y, height=1.0, a=np.array([3.0]), b=np.array([4.0]))
    plane = planes.planes[0]
    assert (plane.a[0], plane.b[0], plane.kappa) == pytest.approx((0.6, 0.8, -2.0))
    assert plane.height(X, Y) == pytest.approx(0.2)
    # A step of 0.2 against (0.6, 0.8) is just enough.
    assert plane.height(X - 0.2 * plane.a, Y - 0.2 * plane.b) == pytest.approx(0.0)


def test_multipliers_rise_where_violated_and_fall_where_not() -> None:
    planes = PlaneSet(PlaneConfig(dual_rate=0.5, dual_decay=0.1, max_dual=0.12))
    planes.cut(X, Y, height=1.0, a=np.array([3.0]), b=np.array([4.0]))
    planes.ascend(X, Y)
    assert planes.planes[0].dual == pytest.approx(0.1)  # 0.5 * 0.2
    pull_x, pull_y = planes.pull(X, Y)
    assert (pull_x[0], pull_y[0]) == pytest.approx((0.06, 0.08))
    planes.ascend(X, Y)
    assert planes.total_dual == 0.12  # 0.1 + 0.5 (0.2 - 0.01) is more than the most
    planes.ascend(X - 9, Y)
    assert planes.total_dual == 0.0


def test_idle_planes_are_dropped_and_full_sets_lose_the_weakest() -> None:
    planes = PlaneSet(PlaneConfig(max_planes=2, patience=2))
    for slope in (1.0, 2.0, 3.0):
        planes.cut(X, Y, height=1.0, a=np.array([slope]), b=np.array([0.0]))
        planes.planes[-1].dual = slope
    assert [plane.dual for plane in planes.planes] == [2.0, 3.0]
    planes.planes[0].dual = 0.0
    planes.drop_idle()
    assert len(planes.planes) == 2
    planes.drop_idle()
    assert [plane.dual for plane in planes.planes] == [3.0]


def test_slopes_of_no_length_make_no_plane() -> None:
    planes = PlaneSet(PlaneConfig())
    planes.cut(X, Y, height=1.0, a=np.zeros(1), b=np.zeros(1))
    assert planes.planes == []


@pytest.mark.parametrize("name", ["dual_rate", "dual_decay", "max_dual", "max_planes", "patience"])
def test_settings_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        PlaneConfig(**{name: -1})


def test_planes_follow_a_y_whose_places_change_and_keep_their_height() -> None:
    planes = PlaneSet(PlaneConfig())
    # Slopes 3 along x and 0, 4 along y, normalised by 5; 1 above its bound at x = 1, y = (7, 2): kappa -2.
    planes.cut(X, np.array([7.0, 2.0]), height=1.0, a=np.array([3.0]), b=np.array([0.0, 4.0]))
    plane = planes.planes[0]
    planes.follow([1, None, 0], np.array([7.0, 2.0]))
    assert plane.b.tolist() == pytest.approx([0.8, 0.0, 0.0]) and plane.kappa == pytest.approx(-2.0)
    assert plane.height(X, np.array([2.0, 99.0, 7.0])) == pytest.approx(0.2)
    # The place with the slope goes: it is held at 2.
    planes.follow([1], np.array([2.0, 99.0, 7.0]))
    assert plane.b.tolist() == [0.0] and plane.kappa == pytest.approx(-0.4)
    assert plane.height(X, np.array([99.0])) == pytest.approx(0.2)
