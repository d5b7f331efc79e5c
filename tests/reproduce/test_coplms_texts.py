"""Texts of the co-tuning study: made-up domains, and data sets."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from coplms_main import parser
from coplms_texts import CROSSED, MIXED, OWN, SKILLS, school_of, texts_of

from cotune.errors import InputError


def write_set(root: Path, name: str, num_train: int, num_test: int) -> None:
    (root / name).mkdir(parents=True)
    for split, num in (("train", num_train), ("test", num_test)):
        rows = [json.dumps({"question": f"{name} {split} {i}?", "answer": f"{name}{i}"}) for i in range(num)]
        (root / name / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    for name, num in (("law", 40), ("med", 40), ("news", 2100)):
        write_set(tmp_path, name, num, 20)
    words = ["--data-root", str(tmp_path), "--datasets", "law", "med", "--school", "news", "--devices", "3", "2"]
    return parser().parse_args(
        [*words, "--num-train", "10", "--num-open", "5", "--num-test", "8", "--num-public", "20"]
    )


def test_a_data_set_is_a_domain_and_devices_of_one_share_no_text(args: argparse.Namespace) -> None:
    found = texts_of(args, 3, 0)
    assert found == texts_of(args, 3, 0) != texts_of(args, 3, 1)
    law, med, more = found.domains
    assert [len(one.train) for one in found.domains] == [10, 10, 10]
    train = [{each.prompt for each in one.train} for one in found.domains]
    assert not train[0] & train[2] and all("law train" in one for one in train[0] | train[2])
    assert len(found.open) == 10 and not set(found.open) & (train[0] | train[1] | train[2])
    assert law.asked == more.asked and len(law.asked) == 8 and all("med test" in one.prompt for one in med.asked)
    asked = found.of_device(1)
    assert asked[OWN] == med.asked and asked[CROSSED] == [*law.asked, *more.asked] and asked[MIXED] == []
    assert all("news test" in one.prompt for one in asked[SKILLS]) and len(asked[SKILLS]) == 8
    # Of fewer devices the first ones, with the same texts.
    assert texts_of(args, 2, 0).domains == found.domains[:2]


def test_the_school_reads_what_is_in_no_test_and_not_public(args: argparse.Namespace) -> None:
    school = {one.prompt for one in school_of(args)}
    assert len(school) == 2080 and all("news train" in one for one in school)
    public = {one.prompt for seed in range(3) for one in texts_of(args, 2, seed).public}
    assert len(public) == 20 and not public & school and all("news train" in one for one in public)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_train": 20}, "there are 40 training texts of law, expected at least 45"),
        ({"num_test": 21}, "there are 20 test texts of news, expected at least 21"),
        ({"num_public": 200}, "--school has 2100 training texts, expected at least 2000 beside public"),
        ({"school": ["law"]}, "a school without domains"),
        ({"school": None}, "--school none"),
        ({"data_root": None}, "--data-root is None"),
    ],
)
def test_too_little_is_refused(args: argparse.Namespace, change: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        texts_of(argparse.Namespace(**{**vars(args), **change}), 3, 0)


def test_made_up_domains_are_open_to_the_server_without_answers() -> None:
    own = parser().parse_args(["--devices", "2", "--num-things", "3"])
    found = texts_of(own, 2, 4)
    assert len(found.open) == 2 * 3 * 3
    trained = {one.prompt for domain in found.domains for one in domain.train}
    assert set(found.open) <= trained and not set(found.open) & found.tested()
    kept = {one.prompt for one in found.kept_out()}
    assert set(found.open) <= kept and found.tested() <= kept
