"""What is FedMKT's own: who is chosen for a text, what travels, and the loss; by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from co_tuning_scene import has_learnt, run, scene_on

from cotune.data.templates import Example
from cotune.distillation.mapped_targets import SparseTargets
from cotune.errors import InputError
from cotune.federation.comparison.fedmkt import FedMkt, Said, choose, read_public, whole_for_all
from cotune.federation.comparison.scene import CLOUD


def said(losses: list[float], first_id: int) -> Said:
    """Of texts with one target each, all on one token that tells who said it."""
    ids = [np.array([[first_id + place, 0]]) for place in range(len(losses))]
    return Said(ids, [np.array([[9.0, -np.inf]], np.float32)] * len(losses), np.array(losses, np.float32))


def test_for_each_text_the_one_with_the_least_loss_is_chosen_and_the_own_one_where_they_tie() -> None:
    own, first, second = said([1.0, 2.0, 0.5, 3.0], 10), said([2.0, 1.0, 0.5, 2.0], 20), said([3.0, 1.5, 0.5, 1.0], 30)
    chosen = choose(own, [(one.own_targets(), one.losses) for one in (first, second)])
    assert [int(one.ids[0, 0]) for one in chosen] == [10, 21, 12, 33]
    assert all(one.probs[0].tolist() == [1.0, 0.0] for one in chosen)
    assert [int(one.ids[0, 0]) for one in choose(own, [])] == [10, 11, 12, 13]


def test_what_travels_is_6_bytes_for_a_token_and_comes_back() -> None:
    rng = np.random.default_rng(0)
    sizes = [3, 1]
    own = Said(
        [rng.integers(0, 70_000, (size, 4)) for size in sizes],
        [rng.standard_normal((size, 4)).astype(np.float32) for size in sizes],
        np.array([0.5, 2.0], np.float32),
    )
    arrays = own.as_arrays()
    assert sum(one.nbytes for one in arrays.values()) == 6 * 4 * 4 + 4 * 2
    back = Said.of_arrays(arrays, sizes)
    for mine, theirs in zip((*own.ids, *own.logits), (*back.ids, *back.logits), strict=True):
        assert np.allclose(mine, theirs, rtol=1e-3)
    assert back.losses.tolist() == [0.5, 2.0]


def test_the_loss_by_hand() -> None:
    chosen = [SparseTargets(np.array([[1]]), np.array([[1.0]], np.float32)), said([0.0], 2).own_targets()[0]]

    class Batch:
        targets = torch.tensor([0, 2])

    logits = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    log_q = logits.log_softmax(1)
    wanted = 0.9 * -(log_q[0, 0] + log_q[1, 2]) / 2 + 0.1 * -(log_q[0, 1] + log_q[1, 2]) / 2
    assert float(FedMkt().loss(chosen)([0, 1], Batch(), logits)) == pytest.approx(float(wanted))


def test_the_off_by_one_changes_what_is_learnt_and_texts_are_whole(models: Path, tmp_path: Path) -> None:
    scene = scene_on(models, tmp_path, ("llama",))
    fixed, published = (run(FedMkt(is_fixed=is_fixed, top_k=4), scene).parties[-1] for is_fixed in (True, False))
    assert has_learnt(fixed["llama"], published["llama"])
    # What a party says of a text is its own likeliest tokens and its loss.
    cloud = fixed[CLOUD]
    (text,) = cloud.read(scene.public[:1], max_tokens=64)
    told = read_public(cloud, [text], 3)
    with cloud.loaded() as model:
        ids = torch.from_numpy(text.sides[0].input_ids)
        log_q = model(input_ids=ids[None]).logits[0].log_softmax(1)
    places = np.flatnonzero(text.sides[0].is_target)
    wanted = -sum(float(log_q[place - 1, ids[place]]) for place in places) / len(places)
    assert told.losses[0] == pytest.approx(wanted, rel=1e-4) and math.isfinite(wanted)
    assert np.array_equal(told.ids[0], log_q[places - 1].topk(3).indices.numpy())
    long = replace(scene, public=[Example("the cat? " * 40, " yes.")], max_tokens=40)
    with pytest.raises(InputError, match="none of 1 public texts is read alike by all models"):
        run(FedMkt(top_k=4), long)
    some = replace(scene, public=[*long.public, *scene.public], max_tokens=40)
    assert whole_for_all(some, some.start()) == list(scene.public)


@pytest.mark.parametrize(("options", "words"), [({"top_k": 0}, "top_k is 0"), ({"ce_weight": 1.0}, "ce_weight is 1.0")])
def test_settings_that_make_no_sense_are_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(InputError, match=words):
        FedMkt(**options)  # type: ignore[arg-type]
