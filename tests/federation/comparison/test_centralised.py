"""The upper bound: every model learns every device's texts, as often as alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from co_tuning_scene import run, scene_on

from cotune.federation.comparison.centralised import Centralised
from cotune.federation.comparison.party import Party


def test_everybody_reads_all_texts_and_takes_as_many_times_the_steps(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    read = Party.read

    def watched(self, examples, *, max_tokens):  # type: ignore[no-untyped-def]
        asked.append([one.target for one in examples])
        return read(self, examples, max_tokens=max_tokens)

    taken: list[int] = []
    monkeypatch.setattr(Party, "read", watched)
    monkeypatch.setattr(
        "cotune.federation.comparison.centralised.learn_at",
        lambda scene, account, name, number, own, texts, *, steps: taken.append(steps.num_steps) or own,
    )
    scene = scene_on(models, tmp_path)
    run(Centralised(), scene)
    union = [one.target for site in scene.sites.values() for one in site.examples]
    assert asked == [union, union, [*union, *(one.target for one in scene.public)]] and taken == [4, 4, 4]
