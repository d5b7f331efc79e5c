"""Merged products of mixed ranks: dense sums, dense rules, and the truncated SVD, worked without any basis."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.algorithm import Combine
from cotune.federation.lora_factors import LoraFactors
from cotune.federation.product_merge import LowRank, combined_products, left_out, merge_products, product_change
from cotune.federation.robust.clip_to_median_norm import ClipToMedianNorm
from cotune.federation.robust.mean import Mean
from cotune.federation.robust.median import Median
from cotune.federation.robust.multi_krum import MultiKrum

OUT, IN = 9, 11


def factors(rank: int, seed: int, num_out: int = OUT, num_in: int = IN) -> LoraFactors:
    rng = np.random.default_rng(seed)
    draw = [rng.standard_normal(shape).astype(np.float32) for shape in ((rank, num_in), (num_out, rank))]
    return LoraFactors(*draw)


def dense(one: LowRank) -> NDArray[np.float64]:
    return one.b @ one.a


def best_of_rank(matrix: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("num_out", [OUT, 200])
@pytest.mark.parametrize("rule", [Mean(), ClipToMedianNorm(rule=Mean()), MultiKrum(num_byzantine=1)])
def test_rules_of_lengths_and_distances_see_the_dense_changes(rule: Combine, num_out: int) -> None:
    before = {"q": factors(3, 0, num_out), "v": factors(3, 1, num_out)}
    afters = [
        {"q": factors(r, 10 + i, num_out), "v": factors(r, 20 + i, num_out)} for i, r in enumerate([1, 2, 3, 1, 2])
    ]
    changes = [{layer: product_change(after[layer], before[layer]) for layer in before} for after in afters]
    weights = np.array([1.0, 2.0, 1.0, 3.0, 1.0])
    merged = merge_products(before, changes, weights, rule)
    rows = np.stack([np.concatenate([dense(one[layer]).reshape(-1) for layer in before]) for one in changes])
    combined = rule(rows.astype(np.float32), weights).astype(np.float64).reshape(2, num_out, IN)
    lost = whole = 0.0
    for layer, change in zip(before, combined, strict=True):
        matrix = before[layer].product() + change
        best = best_of_rank(matrix, 3)
        assert np.allclose(merged.layers[layer].product(), best, atol=2e-5)
        lost, whole = lost + np.square(matrix - best).sum(), whole + np.square(matrix).sum()
    assert merged.discarded_energy == pytest.approx(lost / whole, rel=1e-4)


def test_what_fits_the_rank_is_kept_whole_and_what_is_missing_can_still_learn() -> None:
    nothing = LoraFactors(np.zeros((4, IN), np.float32), np.zeros((OUT, 4), np.float32))
    one, two = factors(1, 1), factors(1, 2)
    merged = merge_products(
        {"q": nothing}, [{"q": product_change(own, nothing)} for own in (one, two)], np.array([1.0, 3.0]), Mean()
    )
    assert np.allclose(merged.layers["q"].product(), one.product() / 4 + 0.75 * two.product(), atol=1e-5)
    assert merged.discarded_energy < 1e-12
    assert np.allclose(np.linalg.norm(merged.layers["q"].a[2:], axis=1), 1, atol=1e-6)
    assert not merged.layers["q"].b[:, 2:].any()


def test_a_liar_does_not_move_the_median_further_than_honest_devices_lie() -> None:
    # A common change of rank 1 and little noise: with a basis of unit vectors the median is that of the weights.
    nothing = LoraFactors(np.zeros((2, 3), np.float32), np.zeros((2, 2), np.float32))
    honest = [factors(2, 5, 2, 3).product() + 0.01 * factors(2, i, 2, 3).product() for i in range(4)]
    changes = [{"q": LowRank(np.eye(3), np.asarray(one, np.float64))} for one in [*honest, -1e6 * honest[0]]]
    merged = merge_products({"q": nothing}, changes, np.ones(5), Median())
    found = merged.layers["q"].product()
    assert (found >= np.min(honest, axis=0) - 1e-4).all() and (found <= np.max(honest, axis=0) + 1e-4).all()
    rows = np.stack([dense(one["q"]).reshape(-1) for one in changes]).astype(np.float32)
    assert np.allclose(found.reshape(-1), Median()(rows, np.ones(5)), atol=1e-5)


def test_a_rule_that_refuses_is_heard() -> None:
    before = {"q": factors(2, 0)}
    with pytest.raises(InputError, match="replies"):
        merge_products(
            before, [{"q": product_change(factors(1, 1), before["q"])}], np.ones(1), MultiKrum(num_byzantine=1)
        )


@pytest.mark.parametrize("most", [None, 2])
def test_what_the_best_adapter_leaves_out_is_the_rest_of_the_sum(most: int | None) -> None:
    before = {"q": factors(2, 0)}
    changes = [{"q": product_change(factors(2, seed), before["q"])} for seed in (1, 2, 3)]
    product = combined_products(before, changes, np.ones(3), Mean())["q"]
    merged = merge_products(before, changes, np.ones(3), Mean())
    whole = np.mean([factors(2, seed).product() for seed in (1, 2, 3)], axis=0)
    rest = left_out(product, 2, most=most)
    assert rest is not None and rest.rank == (4 if most is None else 2)
    u, s, vt = np.linalg.svd(whole)
    end = 2 + rest.rank
    assert np.allclose(rest.product(), (u[:, 2:end] * s[2:end]) @ vt[2:end], atol=1e-4)
    lost = np.square(whole - merged.layers["q"].product()).sum() / np.square(whole).sum()
    assert merged.discarded_energies["q"] == pytest.approx(lost, rel=1e-4)
    # What is rounding is nothing.
    alone = combined_products(before, changes[:1], np.ones(1), Mean())["q"]
    assert left_out(alone, 2) is None
