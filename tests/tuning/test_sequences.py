"""Whole sequences as training material: which taps a network with a memory reads, and what it can learn from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cotune.device.attention_network import AttentionNetwork
from cotune.device.likelihood import token_nats
from cotune.errors import InputError
from cotune.generation.output_basis import OutputBasis
from cotune.generation.reference import Personal
from cotune.tuning.feature_set import FeatureSet
from cotune.tuning.loop import LoopConfig
from cotune.tuning.sequences import SequenceData
from cotune.tuning.side import AttentionShape, SideConfig, fresh_network, tune_side
from cotune.tuning.side_evaluation import evaluate_side, nats_per_token
from cotune.wire.codec import dequantise, quantise
from cotune.wire.features import SequenceFeatures

VOCAB, TAPS, TAP_DIM = 12, 3, 6
SHAPE = AttentionShape(head_dim=8, context=6, prompt_window=4)
CONFIG = SideConfig(
    loop=LoopConfig(epochs=12, learning_rate=0.01),
    side_width=16,
    inner_width=16,
    attention=SHAPE,
    num_batch_positions=60,
)


def recalling(length: int, seed: int) -> SequenceFeatures:
    """Positions whose target was shown by the taps two positions before; the base model knows nothing."""
    rng = np.random.default_rng(seed)
    shown = rng.integers(0, VOCAB, length + 2)
    taps = 0.2 * rng.standard_normal((length, TAPS, TAP_DIM)).astype(np.float32)
    codes = np.random.default_rng(0).standard_normal((VOCAB, TAP_DIM)).astype(np.float32)
    taps[:, 1] += codes[shown[2:]]
    targets = shown[:length]
    return SequenceFeatures(
        target_ids=targets,
        tap_codes=quantise(taps)[0],
        tap_scales=quantise(taps)[1],
        log_normalizer=np.full(length, np.log(VOCAB), np.float32),
        target_logits=np.zeros(length, np.float32),
        top_ids=np.tile(np.arange(VOCAB), (length, 1)),
        top_logits=np.zeros((length, VOCAB), np.float32),
        hidden=np.zeros((length, 2), np.float16),
    )


def feature_set(parts: list[SequenceFeatures], leads: list[int], first_targets: list[int]) -> FeatureSet:
    lengths = [len(part) - lead for part, lead in zip(parts, leads, strict=True)]
    whole = FeatureSet.for_lengths(lengths, parts[0], leads=leads, first_targets=first_targets)
    for index, part in enumerate(parts):
        whole.put(index, part)
    return whole


def basis() -> OutputBasis:
    return OutputBasis.from_matrix(np.eye(VOCAB, dtype=np.float32))


def taps_of(part: SequenceFeatures) -> NDArray[np.float32]:
    return dequantise(part.tap_codes, part.tap_scales)


def test_a_batch_has_the_taps_before_the_targets_too_and_pads_on_the_right() -> None:
    parts = [recalling(5, 1), recalling(3, 2)]
    batch = SequenceData(feature_set(parts, [2, 0], [9, 1]), VOCAB, "parallel").take(np.array([0, 1]))
    np.testing.assert_array_equal(batch.taps[0].numpy(), taps_of(parts[0]))
    np.testing.assert_array_equal(batch.taps[1, :3].numpy(), taps_of(parts[1]))
    assert not batch.taps[1, 3:].any()
    # Targets begin at 9 in the first text, with two positions before them; at 1 in the second.
    assert batch.positions.tolist() == [[7, 8, 9, 10, 11], [1, 2, 3, 4, 5]]
    assert batch.targets.tolist() == [2, 3, 4, 5, 6, 7]
    corrections = np.arange(10.0).reshape(2, 5, 1)
    assert batch.at_targets(torch.from_numpy(corrections)).flatten().tolist() == [2, 3, 4, 5, 6, 7]


def test_every_sequence_comes_once_in_an_epoch_in_an_order_of_its_own() -> None:
    parts = [recalling(3 + i, i) for i in range(7)]
    data = SequenceData(feature_set(parts, [1] * 7, [4] * 7), VOCAB, "parallel")
    batches = data.batches(10, seed=3)

    def lengths(epoch: int) -> list[int]:
        return [int(one) for batch in batches.epoch(epoch) for one in np.bincount(batch.targets // batch.taps.shape[1])]

    assert sorted(lengths(0)) == [2, 3, 4, 5, 6, 7, 8]
    assert lengths(0) == lengths(0) != lengths(1)
    in_order = data.batches(1000, seed=None)
    assert len(in_order) == 1 and [len(batch.targets) for batch in in_order.epoch(0)] == [35]


def test_no_targets_are_refused() -> None:
    with pytest.raises(InputError, match="no target positions"):
        SequenceData(feature_set([recalling(2, 0)], [2], [3]), VOCAB, "parallel").batches(8, seed=0)


def test_it_learns_what_only_an_earlier_position_shows_and_a_ladder_cannot() -> None:
    train = feature_set([recalling(20, seed) for seed in range(60)], [2] * 60, [3] * 60)
    heldout = feature_set([recalling(20, 100 + seed) for seed in range(20)], [2] * 20, [3] * 20)

    def nats(config: SideConfig) -> float:
        return nats_per_token(heldout, tune_side(train, basis(), config).network, basis(), "parallel")

    assert nats(CONFIG) < 1.0 < np.log(VOCAB) - 0.1 < nats(replace(CONFIG, attention=None))


def test_the_device_computes_what_training_sees() -> None:
    """Teacher-forced, position after position in NumPy, with the lead that a prompt's last positions are."""
    parts, first_targets, leads = [recalling(9, 1), recalling(7, 2)], [6, 3], [3, 2]
    features = feature_set(parts, leads, first_targets)
    network = tune_side(features, basis(), replace(CONFIG, loop=LoopConfig(epochs=3, learning_rate=0.01))).network
    device = AttentionNetwork(network.config_dict(), network.to_arrays())
    personal = Personal(corrector=device, output_basis=basis(), gate=None)
    found = [
        token_nats(part, personal, "integration", start=first - lead, num_lead=lead)
        for part, first, lead in zip(parts, first_targets, leads, strict=True)
    ]
    expected = evaluate_side(features, network, basis(), "parallel").side_nats
    # Both quantise corrections to int8; rarely one falls to the other side of a half.
    np.testing.assert_allclose(np.concatenate(found), expected, atol=0.03)


def test_an_untrained_network_with_a_memory_is_the_base_model() -> None:
    features = feature_set([recalling(8, 1)], [2], [3])
    network = fresh_network(features, basis(), CONFIG)
    assert network.reads_every_position and network.prompt_window == 4
    assert nats_per_token(features, network, basis(), "parallel") == pytest.approx(np.log(VOCAB), abs=1e-6)


def test_the_word_for_a_side_network_is_checked() -> None:
    assert AttentionShape.for_side("ladder") is None
    assert AttentionShape.for_side("attention", tap_step=2) == AttentionShape(tap_step=2)
    with pytest.raises(InputError, match="side is 'lstm', expected one of ladder, attention"):
        AttentionShape.for_side("lstm")
    with pytest.raises(InputError, match="tap_step is 0"):
        AttentionShape.for_side("attention", tap_step=0)
