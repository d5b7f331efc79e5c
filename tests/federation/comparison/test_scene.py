"""The scene's seeds and the account's bytes, which are those of the messages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from co_tuning_scene import scene_on

from cotune.errors import InputError
from cotune.federation.comparison.scene import CLOUD, Account
from cotune.federation.messages import Reply, encode


def test_seeds_differ_by_round_place_and_part(models: Path, tmp_path: Path) -> None:
    scene = scene_on(models, tmp_path)
    found = {
        scene.seed_of(number, name, part) for number in (1, 2) for name in (*scene.sites, CLOUD) for part in (0, 1)
    }
    assert len(found) == 12 and scene.seed_of(1, CLOUD) == replace(scene).seed_of(1, CLOUD)
    with pytest.raises(InputError, match="none named cloud or proxy"):
        replace(scene, sites={"proxy": scene.sites["llama"]})


def test_bytes_are_those_of_whole_messages() -> None:
    account, arrays, digest = Account(), {"a": np.ones(3, np.float32), "b": np.zeros(2, np.uint8)}, "0" * 64
    came = account.send_up("desk", 2, arrays, digest=digest)
    assert {name: one.tolist() for name, one in came.items()} == {"a": [1.0] * 3, "b": [0, 0]}
    reply = Reply(
        run_id="comparison",
        round_number=2,
        device="desk",
        arrays=arrays,
        num_examples=0,
        metrics={},
        base_digest=digest,
    )
    assert account.up["desk"] == len(encode(replace(reply, signature=bytes(64))))
    account.send_down("desk", 2, arrays, digest=digest)
    account.send_down("desk", 3, arrays, digest=digest)
    once = account.down["desk"] / 2
    assert 14 < once == int(once) and account.up.keys() == account.down.keys() == {"desk"}
    account.hold(5)
    account.hold(3)
    assert account.held_bytes == 5
