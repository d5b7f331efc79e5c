"""What devices read is what the cloud's model wrote, once, and nothing else of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from co_tuning_scene import run, scene_on

from cotune.data.templates import Example
from cotune.errors import InputError
from cotune.federation.comparison.scene import CLOUD
from cotune.federation.comparison.seqkd import SeqKd, from_arrays, to_arrays
from cotune.federation.greedy_texts import write_greedily


def test_devices_get_the_clouds_own_answers_once(models: Path, tmp_path: Path) -> None:
    scene = scene_on(models, tmp_path, ("llama",))
    method, cloud = SeqKd(max_new_tokens=3), scene.start()[CLOUD]
    written = method.written(cloud, scene.public)
    with cloud.loaded() as model:
        answers = write_greedily(model, scene.cloud.reader, [one.prompt for one in scene.public], max_new_tokens=3)
    assert [(one.prompt, one.target) for one in written] == [
        (one.prompt, answer.text) for one, answer in zip(scene.public, answers, strict=True) if answer.text.strip()
    ]
    assert written and all(one.target not in {other.target for other in scene.public} for one in written)
    once = run(method, scene).account.down["llama"]
    two_rounds = scene_on(models, tmp_path, ("llama",), num_rounds=2)
    assert run(method, two_rounds).account.down["llama"] == once > sum(len(one.prompt) for one in written)


def test_texts_travel_whole_and_settings_are_checked() -> None:
    texts = [Example("日本?", " 😀\n"), Example("a", " b")]
    assert from_arrays(to_arrays(texts)) == texts
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        SeqKd(max_new_tokens=0)
