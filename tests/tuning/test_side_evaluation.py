from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cotune.generation.output_basis import OutputBasis
from cotune.models.side_network import SideNetwork
from cotune.tuning.side import SideConfig, fresh_ladder
from cotune.tuning.side_evaluation import evaluate_side


@pytest.fixture
def make_network(output_basis: OutputBasis) -> Callable[..., SideNetwork]:
    """A ladder whose corrections are random, not zero."""

    def make(features: Any, size: float) -> SideNetwork:
        network = fresh_ladder(features, output_basis, SideConfig(side_width=8, inner_width=8))
        torch.nn.init.normal_(network.head_weight, std=size, generator=torch.Generator().manual_seed(0))
        return network

    return make


def delta_of(features: Any, network: SideNetwork, basis: OutputBasis) -> np.ndarray[Any, Any]:
    from cotune.models.side_network import fake_quantise

    taps = torch.from_numpy(features.tap_codes.astype(np.float32) * features.tap_scales.astype(np.float32)[..., None])
    with torch.no_grad():
        correction: np.ndarray[Any, Any] = fake_quantise(network(taps)).numpy()
    return correction @ basis.matrix().T


def test_probabilities_and_choices_are_those_of_the_whole_vocabulary(
    draw_world: Callable[..., Any], output_basis: OutputBasis, make_network: Callable[..., SideNetwork]
) -> None:
    world = draw_world(300, 3)
    features = world.features(output_basis.vocab_size)
    network = make_network(features, 0.5)
    found = evaluate_side(features, network, output_basis, "parallel")
    rows = np.arange(300)
    for logits, probability, argmax in (
        (world.logits, found.base_probability, found.base_argmax),
        (world.logits + delta_of(features, network, output_basis), found.side_probability, found.side_argmax),
    ):
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(probability, shares[rows, world.target_ids], rtol=1e-4)
        np.testing.assert_array_equal(argmax, logits.argmax(axis=1))
    assert found.is_certified.all()
    assert found.summary()["disagree_rate"] == np.mean(found.base_argmax != found.side_argmax) > 0


def test_a_certified_choice_is_never_wrong(
    draw_world: Callable[..., Any], output_basis: OutputBasis, make_network: Callable[..., SideNetwork]
) -> None:
    world = draw_world(300, 3)
    features = world.features(6)
    network = make_network(features, 0.3)
    found = evaluate_side(features, network, output_basis, "parallel")
    true = (world.logits + delta_of(features, network, output_basis)).argmax(axis=1)
    assert 0.1 < found.is_certified.mean() < 1
    np.testing.assert_array_equal(found.side_argmax[found.is_certified], true[found.is_certified])
    assert (found.side_argmax != true).any(), "the top alone does not always hold the best token"


def test_the_serial_family_chooses_by_delta_alone(
    draw_world: Callable[..., Any], output_basis: OutputBasis, make_network: Callable[..., SideNetwork]
) -> None:
    features = draw_world(50, 3).features(6)
    network = make_network(features, 0.3)
    found = evaluate_side(features, network, output_basis, "serial")
    np.testing.assert_array_equal(found.side_argmax, delta_of(features, network, output_basis).argmax(axis=1))
    assert found.is_certified.all()
