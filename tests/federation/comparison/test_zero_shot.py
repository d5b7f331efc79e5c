"""Nobody learns, in as many rounds as the others have."""

from __future__ import annotations

from pathlib import Path

from co_tuning_scene import run, scene_on

from cotune.federation.comparison.zero_shot import ZeroShot


def test_every_round_has_the_models_as_they_were_given(models: Path, tmp_path: Path) -> None:
    ran = run(ZeroShot(), scene_on(models, tmp_path, num_rounds=2))
    assert len(ran.parties) == 3 and ran.parties[0] == ran.parties[2] and not ran.account.flops
    assert not any(party.weights for party in ran.parties[0].values())
