"""Bulyan: updates chosen by Krum, and of each coordinate those nearest to the median."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.federation.robust.krum_scores import krum_order, squared_distances
from cotune.federation.robust.rule import check_count
from cotune.federation.robust.votes import read_votes


@dataclass(frozen=True, kw_only=True)
class Bulyan:
    """Bulyan over Krum.

    El Mhamdi, Guerraoui and Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium", arXiv 1802.07927,
    section 4, for n >= 4 f + 3:

    1. Krum chooses one of the updates, it is taken out, and so on, until theta = n - 2 f are chosen.
    2. Of each coordinate's theta numbers, the beta = theta - 2 f nearest to their median are averaged.

    So a liar that passes Krum because it is far off in one coordinate alone is cut there: what is kept lies no farther
    from the median, itself among the honest numbers, than some honest one does. Each device has one vote: weights are
    ignored, except that weight 0 leaves a device out.

    Example:
        >>> updates = np.array([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [1e6]], dtype=np.float32)
        >>> Bulyan(num_byzantine=1)(updates, np.ones(7))
        array([4.], dtype=float32)
    """

    num_byzantine: int
    """f, devices that may send anything."""

    def __post_init__(self) -> None:
        check_count("num_byzantine", self.num_byzantine, at_least=0)

    @property
    def min_replies(self) -> int:
        """4 f + 3."""
        return 4 * self.num_byzantine + 3

    def max_byzantine(self, num_replies: int) -> int:
        """f, where there are enough replies."""
        return self.num_byzantine if num_replies >= self.min_replies else 0

    def __call__(
        self,
        updates: NDArray[np.float32],
        weights: NDArray[np.float64],
        /,
        *,
        scales: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float32]:
        """The mean of what is nearest to the median; see `RobustRule`."""
        reader = f"bulyan with num_byzantine {self.num_byzantine}"
        votes = read_votes(updates, weights, scales=scales, min_replies=self.min_replies, reader=reader)
        chosen = choose_by_krum(squared_distances(votes), self.num_byzantine)
        selected = votes.only(np.sort(chosen))
        combined = np.empty(selected.dim, dtype=np.float32)
        for columns, ordered in selected.ordered_blocks():
            combined[columns] = mean_around_median(ordered, selected.num - 2 * self.num_byzantine)
        return combined


def choose_by_krum(distances: NDArray[np.float64], num_byzantine: int) -> NDArray[np.int64]:
    """Step 1: places of the theta = n - 2 f updates, in the order in which Krum takes them out.

    Args:
        distances: squared, (n, n).
        num_byzantine: f.
    """
    left = np.arange(len(distances))
    chosen = []
    for _ in range(len(distances) - 2 * num_byzantine):
        best = krum_order(distances[np.ix_(left, left)], num_byzantine)[0]
        chosen.append(left[best])
        left = np.delete(left, best)
    return np.array(chosen, dtype=np.int64)


def mean_around_median(ordered: NDArray[np.float64], num_kept: int) -> NDArray[np.float64]:
    """Step 2: of each row the mean of the numbers nearest to its median.

    Args:
        ordered: (columns, theta), each row sorted.
        num_kept: beta.

    Returns:
        float64 (columns,).

    Example:
        >>> mean_around_median(np.array([[0.0, 1.0, 2.0, 9.0, 9.5]]), 3)
        array([1.])
    """
    theta = ordered.shape[1]
    median = (ordered[:, (theta - 1) // 2] + ordered[:, theta // 2]) / 2
    # In sorted order the nearest are neighbours: of all runs of beta, the one whose farther end is nearest.
    starts = theta - num_kept + 1
    below = median[:, None] - ordered[:, :starts]
    above = ordered[:, num_kept - 1 :] - median[:, None]
    first = np.maximum(below, above).argmin(axis=1)
    places = first[:, None] + np.arange(num_kept)
    mean: NDArray[np.float64] = np.take_along_axis(ordered, places, axis=1).mean(axis=1)
    return mean
