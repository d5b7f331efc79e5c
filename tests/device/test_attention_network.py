"""The NumPy side network with a memory: against torch, and against itself in any order of reading."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.device import attention_network
from cotune.device.attention_network import MAX_ROLLBACK, AttentionNetwork, AttentionState
from cotune.device.side_network import open_side_network
from cotune.errors import InputError
from cotune.models import AttentionLadder, AttentionLadderConfig
from cotune.plugin import Plugin
from cotune.wire.codec import dequantise, quantise

SHAPE: dict[str, Any] = {
    "num_taps": 3,
    "tap_dim": 4,
    "basis_dim": 5,
    "side_width": 32,
    "ff_width": 6,
    "head_dim": 16,
    "num_kv_heads": 1,
    "context": 7,
}


def trained(seed: int = 0, **changes: Any) -> AttentionLadder:
    """A network with random values everywhere, of the size that training leaves."""
    generator = torch.Generator().manual_seed(seed)
    network = AttentionLadder(AttentionLadderConfig(**{**SHAPE, **changes}), generator).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def on_device(network: AttentionLadder) -> AttentionNetwork:
    return AttentionNetwork(network.config_dict(), network.to_arrays())


def random_taps(num: int, seed: int = 0, num_taps: int = 3, tap_dim: int = 4) -> list[Any]:
    taps = np.random.default_rng(seed).standard_normal((num, num_taps, tap_dim)).astype(np.float32)
    return [quantise(one) for one in taps]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_it_equals_torch(data: st.DataObject, seed: int) -> None:
    num_taps, tap_dim = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 20))
    head_dim = data.draw(st.sampled_from([2, 16, 32]))
    side = data.draw(st.integers(1, 80))
    heads = max(1, side // head_dim)
    taps = sorted(data.draw(st.sets(st.integers(0, num_taps - 1), min_size=2)))
    network = trained(
        seed,
        num_taps=num_taps,
        tap_dim=tap_dim,
        side_width=side,
        ff_width=data.draw(st.integers(1, 30)),
        head_dim=head_dim,
        num_kv_heads=data.draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        context=data.draw(st.integers(1, 30)),
        tap_indices=tuple(taps),
    )
    first, quantised = data.draw(st.integers(1, 5000)), random_taps(24, seed, num_taps, tap_dim)
    exact = torch.tensor(np.stack([dequantise(*one) for one in quantised]))
    expected = network(exact, torch.arange(first, first + 24)).detach().numpy()
    side_state = on_device(network).open()
    got = np.stack([side_state.correct_exactly(first + i, *one) for i, one in enumerate(quantised)])
    # Both are float32 and add in different orders, through up to five blocks with a norm in each.
    np.testing.assert_allclose(got, expected, atol=2e-4 * max(1.0, float(np.abs(expected).max())))


def test_the_default_size_equals_torch_and_is_quantised() -> None:
    network = trained(num_taps=8, tap_dim=32, basis_dim=96, side_width=64, ff_width=64, head_dim=32, context=512)
    quantised = random_taps(150, 0, 8, 32)
    expected = network(torch.tensor(np.stack([dequantise(*one) for one in quantised]))).detach().numpy()
    device = on_device(network)
    side, again = device.open(), device.open()
    for i, one in enumerate(quantised):
        exact = side.correct_exactly(1 + i, *one)
        np.testing.assert_allclose(exact, expected[i], atol=1e-4)
        codes, scale = quantise(exact)
        correction = again.correct(1 + i, *one)
        np.testing.assert_array_equal(correction.codes, codes)
        assert correction.scale == scale and isinstance(correction.scale, np.float16)


def straight(device: AttentionNetwork, first: int, history: list[Any]) -> np.ndarray:
    """The last position's correction after reading those before it once and in order."""
    side = device.open()
    for i, one in enumerate(history[:-1]):
        side.read(first + i, *one)
    return side.correct_exactly(first + len(history) - 1, *history[-1])


MOVES = st.lists(st.tuples(st.integers(-6, 9), st.booleans()), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(moves=MOVES, first=st.integers(1, 100), context=st.sampled_from([1, 5, 40]), seed=st.integers(0, 9))
def test_the_same_bits_however_the_earlier_positions_came_to_be_known(
    moves: list[tuple[int, bool]], first: int, context: int, seed: int
) -> None:
    """Going on by some positions or back by some, reading or correcting; buffers so small that they grow and drop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_network, "_BLOCK", 4)
        patch.setattr(attention_network, "MAX_ROLLBACK", 6)
        device = on_device(trained(seed, context=context))
        others, pool = device.open(), random_taps(300, seed)
        side = device.open()
        history: list[Any] = []
        furthest = 0
        for number, (step, corrects) in enumerate(moves):
            furthest = max(furthest, len(history))
            if step < 0:
                del history[max(0, furthest - 5, len(history) + step) :]
            for _ in range(max(1, step)):
                one = pool[(31 * number + len(history)) % len(pool)]
                history.append(one)
                position = first + len(history) - 1
                # Another sequence of the same network in between leaves no trace.
                others.read(1, *pool[number])
                if corrects:
                    got = side.correct_exactly(position, *one)
                    np.testing.assert_array_equal(got, straight(device, first, history))
                else:
                    side.read(position, *one)
                assert side.next_position == position + 1


def test_reading_a_position_again_forgets_what_came_after() -> None:
    device, taps = on_device(trained()), random_taps(8)
    side = device.open()
    assert side.next_position is None
    for position, one in enumerate(taps[:6], start=3):
        side.read(position, *one)
    side.read(5, *taps[7])
    assert side.next_position == 6
    expected = straight(device, 3, [taps[0], taps[1], taps[7], taps[6]])
    np.testing.assert_array_equal(side.correct_exactly(6, *taps[6]), expected)
    # At the first position or before it everything is forgotten.
    np.testing.assert_array_equal(side.correct_exactly(2, *taps[0]), straight(device, 2, [taps[0]]))
    assert side.next_position == 3


def test_holes_are_refused_and_change_nothing() -> None:
    device, taps = on_device(trained()), random_taps(4)
    side = device.open()
    side.read(4, *taps[0])
    with pytest.raises(InputError, match="position is 6, expected at most 5"):
        side.correct(6, *taps[1])
    with pytest.raises(InputError, match="position is 0, expected at least 1"):
        side.read(0, *taps[1])
    with pytest.raises(InputError, match=r"expected \(3, 4\) and \(3,\)"):
        side.read(5, np.zeros((3, 5), np.int8), np.zeros(3, np.float16))
    assert side.next_position == 5
    np.testing.assert_array_equal(side.correct_exactly(5, *taps[1]), straight(device, 4, taps[:2]))


def fill(side: AttentionState, num: int) -> None:
    taps = random_taps(50)
    for position in range(1, num + 1):
        side.read(position, *taps[position % 50])


def test_memory_is_bounded_by_the_context() -> None:
    side = on_device(trained()).open()
    sizes = []
    for position, one in enumerate(random_taps(1200), start=1):
        side.read(position, *one)
        sizes.append(side.size_bytes)
    positions = SHAPE["context"] + MAX_ROLLBACK + 2 * 64
    assert sizes[0] < sizes[-1] == max(sizes) == sizes[600] <= positions * 2 * 2 * 16 * 4


def test_a_full_memory_can_go_back_a_good_way_and_says_when_it_cannot() -> None:
    device = on_device(trained())
    side = device.open()
    fill(side, 1200)
    one = random_taps(1)[0]
    side.read(1201 - MAX_ROLLBACK, *one)
    fill(side := device.open(), 1200)
    with pytest.raises(InputError, match="what it needs is forgotten; read again from position 1 on"):
        side.read(600, *one)
    assert side.next_position == 1201


def test_an_untrained_network_corrects_nothing() -> None:
    network = AttentionLadder(AttentionLadderConfig(**SHAPE), torch.Generator().manual_seed(0))
    side = on_device(network).open()
    for position, one in enumerate(random_taps(9), start=1):
        correction = side.correct(position, *one)
        assert not correction.codes.any() and correction.scale == 0


def test_a_saved_plugin_is_the_same_network(tmp_path: Path) -> None:
    network = trained(tap_indices=(0, 2), prompt_window=9)
    plugin = Plugin(
        kind=network.kind,
        config=network.config_dict(),
        tensors=network.to_arrays(),
        backbone_digest="b",
        projections_digest="p",
        tokenizer_digest="t",
        tokenizer_json=b"{}",
        output_basis=b"",
    )
    plugin.save(tmp_path / "plugin")
    opened = open_side_network(Plugin.load(tmp_path / "plugin"))
    assert isinstance(opened, AttentionNetwork)
    assert opened.reads_every_position and opened.prompt_window == 9
    assert (opened.num_taps, opened.tap_dim, opened.basis_dim, opened.context) == (3, 4, 5, 7)
    assert network.num_parameters * 4 * 0.8 < opened.size_bytes < network.num_parameters * 4
    taps = random_taps(12)
    np.testing.assert_array_equal(straight(opened, 1, taps), straight(on_device(network), 1, taps))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 2**17}, "does not fit attention_ladder"),
        ({"head_dim": 15}, "does not fit attention_ladder"),
        ({"num_kv_heads": 3}, "does not fit attention_ladder"),
        ({"rope_theta": 0.5}, "does not fit attention_ladder"),
        ({"rope_theta": True}, "does not fit attention_ladder"),
        ({"tap_indices": [0, 3]}, "does not fit attention_ladder"),
        ({"tap_indices": [0]}, "does not fit attention_ladder"),
        ({"tap_indices": 4}, "does not fit attention_ladder"),
        ({"prompt_window": None}, "does not fit attention_ladder"),
        ({"ff_width": 7}, "expected float32"),
    ],
)
def test_configs_that_do_not_fit_are_input_errors(changes: dict[str, Any], message: str) -> None:
    network = trained()
    with pytest.raises(InputError, match=message):
        AttentionNetwork({**network.config_dict(), **changes}, network.to_arrays())
    with pytest.raises(InputError, match="the plugin has tensors"):
        AttentionNetwork(network.config_dict(), {})


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, cotune.device.attention_network; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
