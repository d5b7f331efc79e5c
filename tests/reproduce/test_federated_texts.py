"""Texts of the studies of federations: every text has one place, and splits go by labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from federated_texts import StudyTexts, read_texts, split_texts
from study_options import PERSONA

from cotune.data.templates import Example
from cotune.errors import InputError


def labelled(labels: str) -> StudyTexts:
    texts = [Example(f"{place}?", f" {label}") for place, label in enumerate(labels)]
    return StudyTexts(devices=texts, labels=list(labels), server=[], test=[])


def test_the_persona_has_four_domains_and_no_request_twice() -> None:
    texts = read_texts([PERSONA], None, num_train=20, num_server=4, num_test=8)
    assert {label: texts.labels.count(label) for label in texts.labels} == dict.fromkeys(
        ("everyday", "messages", "tasks", "facts"), 5
    )
    everything = [*texts.devices, *texts.server, *texts.test]
    assert (len(texts.devices), len(texts.server), len(texts.test)) == (20, 4, 8)
    assert len({one.prompt for one in everything}) == 32
    with pytest.raises(InputError, match=r"different requests of the kind \w+, expected"):
        read_texts([PERSONA], None, num_train=8000, num_server=4, num_test=4)


def test_data_sets_are_domains_and_one_alone_is_labelled_by_its_targets(tmp_path: Path) -> None:
    for name in ("law", "med"):
        (tmp_path / name).mkdir()
        for split, num in (("train", 9), ("test", 3)):
            rows = [{"prompt": f"{name} {split} {i}?", "completion": f" {'ab'[i % 2]}"} for i in range(num)]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = read_texts(["law", "med"], tmp_path, num_train=12, num_server=4, num_test=4)
    assert both.labels == ["law"] * 6 + ["med"] * 6 and len(both.server) == 4 and len(both.test) == 4
    assert set(read_texts(["law"], tmp_path, num_train=6, num_server=2, num_test=3).labels) == {"a", "b"}
    with pytest.raises(InputError, match="law has 9 training texts"):
        read_texts(["law"], tmp_path, num_train=6, num_server=9, num_test=3)
    with pytest.raises(InputError, match="has no folder art"):
        read_texts(["art"], tmp_path, num_train=6, num_server=2, num_test=3)
    with pytest.raises(InputError, match="expected persona alone"):
        read_texts(["law", PERSONA], tmp_path, num_train=6, num_server=2, num_test=3)


def test_domains_take_turns_over_devices() -> None:
    texts = labelled("aabbbbcc")
    found = split_texts(texts, "domains", num_devices=4, seed=0)
    targets = {name: {one.target for one in own} for name, own in found.items()}
    assert targets == {"device-0": {" a"}, "device-1": {" b"}, "device-2": {" c"}, "device-3": {" a"}}
    assert sum(len(own) for own in found.values()) == 8 and len(found["device-0"]) == 1
    with pytest.raises(InputError, match="have 3 labels, expected at most 2, one device for each"):
        split_texts(texts, "domains", num_devices=2, seed=0)


@pytest.mark.parametrize("split", ["iid", "dirichlet"])
def test_other_splits_give_every_text_to_one_device(split: str) -> None:
    texts = labelled("ab" * 20)
    found = split_texts(texts, split, num_devices=4, seed=1)
    assert sorted(one.prompt for own in found.values() for one in own) == sorted(one.prompt for one in texts.devices)
    assert ({len(own) for own in found.values()} == {10}) == (split == "iid")
