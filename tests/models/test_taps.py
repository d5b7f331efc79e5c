"""Projecting states to taps: one position in NumPy, many in torch, the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.models import Projections
from cotune.models.taps import StateRecorder, TapProjector


@settings(max_examples=50, deadline=None)
@given(
    num_taps=st.integers(1, 6),
    hidden=st.integers(1, 50),
    positions=st.integers(1, 4),
    size=st.sampled_from([0.0, 1e-4, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_one_position_equals_many(num_taps: int, hidden: int, positions: int, size: float, seed: int) -> None:
    projections = Projections.random(tap_layers=range(num_taps), hidden_size=hidden, tap_dim=(hidden + 1) // 2)
    projector = TapProjector(projections, torch.device("cpu"))
    states = size * torch.randn((num_taps, positions, hidden), generator=torch.Generator().manual_seed(seed))
    together = projector.project(states).numpy()
    y = states.double().numpy()
    normalised = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    exact = np.einsum("tph,tdh->ptd", normalised, projections.taps)
    np.testing.assert_allclose(together, exact, atol=2e-5)
    for i in range(positions):
        one = projector.project(states[:, i : i + 1])[0].numpy()
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, exact[i], atol=2e-5)


def test_raw_states_are_not_normalised() -> None:
    random = Projections.random(tap_layers=range(2), hidden_size=8, tap_dim=3)
    raw = Projections(tap_layers=(0, 1), taps=random.taps, basis=random.basis, normalise=False, kind="random")
    states = 7 * torch.randn((2, 1, 8), generator=torch.Generator().manual_seed(0))
    projector = TapProjector(raw, torch.device("cpu"))
    expected = np.einsum("th,tdh->td", states[:, 0].numpy(), raw.taps)
    np.testing.assert_allclose(projector.project(states)[0].numpy(), expected, atol=1e-4)


def test_half_precision_states_are_projected_in_float32() -> None:
    projector = TapProjector(Projections.random(tap_layers=(0,), hidden_size=8), torch.device("cpu"))
    states = torch.full((1, 1, 8), 3.0e4, dtype=torch.float16)  # its square overflows float16
    expected = projector.project(states.float()).numpy()
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(projector.project(states).numpy(), expected)


def test_the_recorder_watches_only_when_asked() -> None:
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False) for _ in range(3)])
    head = torch.nn.Linear(2, 5, bias=False)

    def run(x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = layer(x)
        logits: torch.Tensor = head(x)
        return logits

    x = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        plain = run(x)
        recorder = StateRecorder(layers, head, (0, 1, 3))
        assert torch.equal(run(x), plain)
        recorder.start(lambda states: states[:, -1])
        assert run(x).shape == (1, 5)
        hidden, states = recorder.stop()
        after_1 = layers[0](x)
        after_3 = layers[2](layers[1](after_1))
    assert [s.tolist() for s in states] == [s[:, -1].tolist() for s in (x, after_1, after_3)]
    assert torch.equal(hidden, after_3[:, -1])
    with torch.inference_mode():
        assert torch.equal(run(x), plain)


def test_taps_of_a_broken_model_reach_the_codec_as_they_are() -> None:
    projector = TapProjector(Projections.random(tap_layers=(0,), hidden_size=8), torch.device("cpu"))
    assert torch.isnan(projector.project(torch.full((1, 1, 8), torch.nan))).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_gpu_agrees() -> None:
    projections = Projections.random(tap_layers=range(3), hidden_size=40)
    states = torch.randn((3, 1, 40), generator=torch.Generator().manual_seed(0))
    on_cpu = TapProjector(projections, torch.device("cpu")).project(states)
    on_gpu = TapProjector(projections, torch.device("cuda")).project(states.cuda()).cpu()
    np.testing.assert_allclose(on_gpu, on_cpu, atol=1e-4)
