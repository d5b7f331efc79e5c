from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cotune.generation.output_basis import OutputBasis
from cotune.tuning.corrected_loss import BaseTable, KnownBase, corrected_nats
from cotune.tuning.feature_set import FeatureSet


def exact_nats(logits: NDArray[Any], target_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log softmax(logits)[target] in float64."""
    wide = logits.astype(np.float64)
    largest = wide.max(axis=1, keepdims=True)
    log_normalizer = largest[:, 0] + np.log(np.exp(wide - largest).sum(axis=1))
    return log_normalizer - wide[np.arange(len(wide)), target_ids]


def nats(features: FeatureSet, correction: NDArray[np.float32], basis: NDArray[np.float32]) -> NDArray[np.float32]:
    base = BaseTable.parallel(features, len(basis)).rows(torch.arange(len(features)))
    return corrected_nats(torch.from_numpy(correction), torch.from_numpy(basis), base).numpy()


@pytest.fixture
def basis(output_basis: OutputBasis) -> NDArray[np.float32]:
    return output_basis.matrix()


@pytest.fixture
def correction(basis: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal((30, basis.shape[1])).astype(np.float32)


def test_with_all_logits_it_is_the_exact_softmax(
    draw_world: Callable[..., Any], basis: NDArray[np.float32], correction: NDArray[np.float32]
) -> None:
    world = draw_world(30, 0)
    expected = exact_nats(world.logits + correction @ basis.T, world.target_ids)
    np.testing.assert_allclose(nats(world.features(len(basis)), correction, basis), expected, atol=2e-6)


@pytest.mark.parametrize("top_k", [1, 5, 38, 39])
def test_without_a_correction_it_is_the_base_model_for_any_top_k(
    draw_world: Callable[..., Any], basis: NDArray[np.float32], top_k: int
) -> None:
    world = draw_world(30, 0)
    zero = np.zeros((30, basis.shape[1]), np.float32)
    expected = exact_nats(world.logits, world.target_ids)
    np.testing.assert_allclose(nats(world.features(top_k), zero, basis), expected, atol=3e-5)


def test_it_is_exact_where_the_tail_of_the_base_is_flat(
    draw_world: Callable[..., Any], basis: NDArray[np.float32], correction: NDArray[np.float32]
) -> None:
    world = draw_world(30, 0)
    order = np.argsort(-world.logits, axis=1)
    logits = world.logits.copy()
    np.put_along_axis(logits, order[:, 5:], np.float32(-1.5), axis=1)
    world = replace(world, logits=logits)
    expected = exact_nats(logits + correction @ basis.T, world.target_ids)
    np.testing.assert_allclose(nats(world.features(5), correction, basis), expected, atol=3e-5)


def test_the_tail_is_approximated_closely_and_better_with_more_logits(
    draw_world: Callable[..., Any], basis: NDArray[np.float32], correction: NDArray[np.float32]
) -> None:
    world = draw_world(30, 0)
    expected = exact_nats(world.logits + correction @ basis.T, world.target_ids)
    errors = [np.abs(nats(world.features(k), correction, basis) - expected).mean() for k in (2, 10, 25)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.1
    assert errors[2] < 0.02


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_no_correction_makes_the_target_more_than_certain(
    draw_world: Callable[..., Any], basis: NDArray[np.float32], top_k: int
) -> None:
    # Targets outside the top whose delta is pushed up without end: p stays below 1.
    world = draw_world(30, 0)
    features = world.features(top_k)
    assert (features.top_ids != features.target_ids[:, None]).all(axis=1).any()
    pushed = 50 * basis[world.target_ids]
    found = nats(features, pushed, basis)
    assert (found >= 0).all()
    assert np.isfinite(found).all()


def test_the_serial_family_is_the_softmax_of_delta_alone(
    draw_world: Callable[..., Any], basis: NDArray[np.float32], correction: NDArray[np.float32]
) -> None:
    world = draw_world(30, 0)
    base = BaseTable.serial(world.features(3)).rows(torch.arange(30))
    found = corrected_nats(torch.from_numpy(correction), torch.from_numpy(basis), base).numpy()
    np.testing.assert_allclose(found, exact_nats(correction @ basis.T, world.target_ids), atol=2e-6)


@pytest.mark.parametrize("top_k", [3, 40])
@pytest.mark.parametrize("family", ["parallel", "serial"])
def test_the_written_gradient_is_that_of_the_loss(
    draw_world: Callable[..., Any], basis: NDArray[np.float32], top_k: int, family: str
) -> None:
    features = draw_world(6, 0).features(top_k)
    table = BaseTable.parallel(features, len(basis)) if family == "parallel" else BaseTable.serial(features)
    rows = table.rows(torch.arange(6))
    base = KnownBase(rows.token_ids, *(t.double() for t in (rows.logits, rows.target_logits, rows.log_tail_weight)))
    correction = torch.randn(6, basis.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = torch.from_numpy(basis).double()
    assert torch.autograd.gradcheck(lambda c: corrected_nats(c, wide, base), correction.requires_grad_())


def test_base_logits_of_any_size_stay_finite(draw_world: Callable[..., Any], basis: NDArray[np.float32]) -> None:
    world = draw_world(20, 0, spread=300.0)
    for top_k in (2, 40):
        found = nats(world.features(top_k), np.zeros((20, basis.shape[1]), np.float32), basis)
        np.testing.assert_allclose(found, exact_nats(world.logits, world.target_ids), rtol=1e-5, atol=1e-3)
