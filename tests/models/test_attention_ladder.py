"""The side network with a memory against its equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cotune.errors import InputError
from cotune.models import AttentionLadder, AttentionLadderConfig

SHAPE: dict[str, Any] = {
    "num_taps": 4,
    "tap_dim": 5,
    "basis_dim": 6,
    "side_width": 8,
    "ff_width": 7,
    "head_dim": 2,
    "num_kv_heads": 2,
    "context": 4,
    "tap_indices": (0, 2, 3),
}


def shaken(**changes: Any) -> AttentionLadder:
    """A network with random values everywhere, in float64."""
    config = AttentionLadderConfig(**{**SHAPE, **changes})
    network = AttentionLadder(config, torch.Generator().manual_seed(0)).eval().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return network


def random_taps(*shape: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(0).standard_normal((*shape, 4, 5)))


def by_loops(network: AttentionLadder, taps: np.ndarray, positions: list[int]) -> np.ndarray:
    """The module's equations, one position, one head and one pair at a time."""
    config = network.config
    w = {name.removeprefix("ladder."): p.detach().numpy() for name, p in network.named_parameters()}
    head_dim, groups = config.head_dim, config.num_heads // config.num_kv_heads

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + 1e-6)

    def turned(x: np.ndarray, position: int) -> np.ndarray:
        out = x.copy()
        for j in range(head_dim // 2):
            angle = position * config.rope_theta ** (-2 * j / head_dim)
            a, b = x[j], x[j + head_dim // 2]
            out[j] = a * np.cos(angle) - b * np.sin(angle)
            out[j + head_dim // 2] = b * np.cos(angle) + a * np.sin(angle)
        return out

    used = [0, 2, 3]
    h = [w["mix_weight"][0] @ t[0] + w["mix_bias"][0] for t in taps]
    for i in range(2):
        mu = 1 / (1 + np.exp(-w["mix_gate"][i] / 0.1))
        u = [w["mix_weight"][i + 1] @ t[used[i + 1]] + w["mix_bias"][i + 1] for t in taps]
        h = [mu * a + (1 - mu) * b for a, b in zip(h, u, strict=True)]
        x = [w["attention_norm"][i] * norm(a) for a in h]
        heads = {
            name: [(w[f"{name}_weight"][i] @ a).reshape(-1, head_dim) for a in x] for name in ("query", "key", "value")
        }
        after = []
        for t, position in enumerate(positions):
            attended = []
            for head in range(config.num_heads):
                query = turned(heads["query"][t][head], position)
                seen = [j for j, other in enumerate(positions) if 0 <= position - other < config.context]
                scores = [query @ turned(heads["key"][j][head // groups], positions[j]) / head_dim**0.5 for j in seen]
                weights = np.exp(scores) / np.exp(scores).sum()
                attended.append(sum(p * heads["value"][j][head // groups] for p, j in zip(weights, seen, strict=True)))
            after.append(h[t] + w["output_weight"][i] @ np.concatenate(attended))
        h = []
        for a in after:
            x_ff = w["ff_norm"][i] * norm(a)
            gate = w["gate_weight"][i] @ x_ff
            h.append(a + w["down_weight"][i] @ (gate / (1 + np.exp(-gate)) * (w["up_weight"][i] @ x_ff)))
    return np.stack([w["head_weight"] @ (w["norm_weight"] * norm(a)) + w["head_bias"] for a in h])


def test_it_computes_its_equations() -> None:
    network, taps, positions = shaken(), random_taps(7), [5, 6, 7, 8, 9, 11, 12]
    got = network(taps, torch.tensor(positions)).detach().numpy()
    np.testing.assert_allclose(got, by_loops(network, taps.numpy(), positions), rtol=1e-9)


def test_by_hand() -> None:
    """One block of width 1 that adds the mean of u_1 over the positions seen: keys are zero, so all weigh the same."""
    config = AttentionLadderConfig(
        num_taps=2, tap_dim=1, basis_dim=1, side_width=1, ff_width=1, head_dim=2, num_kv_heads=1, context=2
    )
    one, zero = [[[1.0]]], [[[0.0], [0.0]]]
    arrays = {
        "ladder.mix_weight": [[[1.0]], [[1.0]]],
        "ladder.mix_bias": [[0.0], [0.0]],
        "ladder.mix_gate": [0.0],
        "ladder.attention_norm": [[1.0]],
        "ladder.query_weight": zero,
        "ladder.key_weight": zero,
        "ladder.value_weight": [[[1.0], [0.0]]],
        "ladder.output_weight": [[[4.0, 0.0]]],
        "ladder.ff_norm": [[1.0]],
        "ladder.gate_weight": one,
        "ladder.up_weight": one,
        "ladder.down_weight": [[[0.0]]],
        "norm_weight": [1.0],
        "head_weight": [[3.0]],
        "head_bias": [0.5],
    }
    network = AttentionLadder.from_arrays(vars(config), {k: np.array(v, np.float32) for k, v in arrays.items()})
    taps = torch.tensor([[[2.0], [4.0]], [[-1.0], [-5.0]], [[1.0], [1.0]]])
    # h before attention: (2 + 4) / 2 = 3, -3, 1. Normalised: 1, -1, 1. Means over two: 1, 0, 0. h: 7, -3, 1.
    expected = torch.tensor([7.0, -3.0, 1.0])
    torch.testing.assert_close(network.ladder(taps[None], torch.tensor([[4, 5, 6]]))[0, :, 0], expected)
    torch.testing.assert_close(network(taps)[:, 0], torch.tensor([3.5, -2.5, 3.5]))


def test_a_position_depends_on_those_before_it_and_within_its_context() -> None:
    # One block, so that what is seen through others does not blur the picture.
    network, taps = shaken(tap_indices=(0, 3)), random_taps(9)
    before = network(taps)
    changed = taps.clone()
    changed[3] += 1
    differs = (network(changed) != before).any(dim=-1)
    assert differs.tolist() == [False, False, False, True, True, True, True, False, False]


def test_sequences_in_a_batch_and_padding_do_not_disturb_each_other() -> None:
    network, taps = shaken(), random_taps(2, 9)
    positions = torch.stack([torch.arange(3, 12), torch.arange(7, 16)])
    together = network(taps, positions)
    torch.testing.assert_close(together[0], network(taps[0], positions[0]))
    torch.testing.assert_close(together[1, :5], network(taps[1, :5], positions[1, :5]))


def test_only_the_distance_between_positions_counts() -> None:
    network, taps = shaken(), random_taps(6)
    torch.testing.assert_close(network(taps, torch.arange(1, 7)), network(taps, torch.arange(401, 407)))
    skipped = torch.tensor([1, 2, 4, 5, 6, 7])
    assert not torch.allclose(network(taps, torch.arange(1, 7))[2:], network(taps, skipped)[2:])


def test_taps_that_are_not_used_change_nothing() -> None:
    network, taps = shaken(), random_taps(6)
    changed = taps.clone()
    changed[:, 1] += 5
    assert torch.equal(network(taps), network(changed))
    assert shaken(tap_indices=None).config.tap_indices == (0, 1, 2, 3)


def test_dropout_works_in_training_alone() -> None:
    network, taps = shaken(dropout=0.5), random_taps(6)
    assert torch.equal(network(taps), network(taps))
    network.train()
    assert not torch.equal(network(taps), network(taps))


@pytest.mark.parametrize("tap_indices", [None, (0, 3, 6)])
@pytest.mark.parametrize("side_width", [16, 64])
def test_the_budget_is_used_and_not_exceeded(side_width: int, tap_indices: tuple[int, ...] | None) -> None:
    shape = {"num_taps": 7, "tap_dim": 32, "basis_dim": 64, "side_width": side_width, "tap_indices": tap_indices}
    config = AttentionLadderConfig.for_budget(200_000, **shape)
    assert AttentionLadder(config).num_parameters == config.num_parameters <= 200_000
    assert AttentionLadderConfig(**shape, ff_width=config.ff_width + 1).num_parameters > 200_000
    with pytest.raises(InputError, match="num_parameters is 3000, expected at least"):
        AttentionLadderConfig.for_budget(3000, **shape)


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 3},
        {"num_kv_heads": 3},
        {"context": 0},
        {"context": 2**20},
        {"prompt_window": 0},
        {"rope_theta": 1.0},
        {"rope_theta": float("inf")},
        {"rope_theta": "10000"},
        {"tap_indices": (0,)},
        {"tap_indices": (0, 4)},
        {"tap_indices": (2, 1)},
        {"tap_indices": (0, 0.5)},
        {"tap_indices": None, "num_taps": 1},
    ],
)
def test_bad_shapes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        AttentionLadderConfig(**{**SHAPE, **changes})
