"""The memory of a device's round: what is measured holds what is known to be held, and the middle child counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coplms_memory
import pytest
from co_tuning import model_folder
from co_tuning_scene import make_models
from coplms_contest import CoPlmsStudy
from coplms_memory import MeasuredAccount, measure, measured_peak, of_length, one_round, parser
from coplms_texts import texts_of_test

LITTLE = ["--devices", "2", "--num-things", "2", "--num-skills", "2", "--num-test", "1", "--num-public", "2"]
LITTLE += ["--batch-size", "2", "--rank", "4", "--local-steps", "1", "--cloud-steps", "1", "--rounds", "1"]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> CoPlmsStudy:
    root = tmp_path_factory.mktemp("memory")
    models = make_models(root / "models")
    model_folder(models / "proxy-smaller", "llama", "byte_level", seed=2)
    return CoPlmsStudy(
        "memory", parser().parse_args(["--method", "ours", "--models", str(models), "--cells", str(root), *LITTLE])
    )


def test_the_devices_work_is_measured_and_the_clouds_is_not(
    study: CoPlmsStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Meter:
        def __init__(self, device: str) -> None:
            assert device == "cpu"

        def read(self) -> int:
            return len(account.seconds)

    monkeypatch.setattr(coplms_memory, "PeakMeter", Meter)
    account = MeasuredAccount()
    for name in ("device-0", "device-1", "cloud"):
        with account.at(name):
            pass
    assert account.seconds.keys() == {"device-0", "device-1", "cloud"} and account.peak_bytes == 2
    monkeypatch.setattr(Meter, "read", lambda self: None)
    with pytest.raises(coplms_memory.InputError, match="cannot be measured here"), account.at("device-0"):
        pass


def test_texts_are_the_longest_or_the_shortest(study: CoPlmsStudy) -> None:
    questions = texts_of_test(study.args, 2, 0)
    for longest in (True, False):
        for own, whole in zip(of_length(questions, 3, longest=longest).domains, questions.domains, strict=True):
            lengths = sorted((len(one.prompt + one.target) for one in whole.train), reverse=longest)
            assert [len(one.prompt + one.target) for one in own.train] == lengths[:3]


def test_a_round_is_measured_behind_a_little_one_of_all_devices(
    study: CoPlmsStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(coplms_memory, "one_round", lambda *given: seen.append(one_round(*given)) or seen[-1])
    assert measure(study, "ours") == {"peak_bytes": seen[1].peak_bytes}
    assert len(seen) == 2 and seen[0].held_bytes > 0 and seen[1].up.keys() == {"device-0", "device-1"}


def test_the_middle_child_counts(study: CoPlmsStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(arguments: list[str], **_: Any) -> dict[str, int]:
        asked.append(arguments)
        return {"peak_bytes": (7, 900, 8)[len(asked) - 1]}

    monkeypatch.setattr(coplms_memory, "run_measured", run)
    assert measured_peak(study.args, Path("m"), "seqkd") == {"peak_bytes": 8}
    told = parser().parse_args(asked[0][1:])
    assert (told.method, told.models, told.devices, told.batch_size) == ("seqkd", Path("m"), [2], 2)
    assert told.local_steps == 2 and told.num_things == 2
