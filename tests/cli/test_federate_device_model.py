"""`cotune federate device-model`: a real device's own model, out of what it keeps of its rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from co_tuning import model_folder

from cotune.federation.causal_model import CausalModel
from cotune.federation.device_store import ROUNDS, DeviceStore
from cotune.federation.small_model import SMALL


def device_toml(folder: Path, small: Path, *, extra: str = "") -> Path:
    path = folder / "device.toml"
    own = extra if extra else f'[co_tuning]\nsmall_model = "{small}"\nfolder = "{folder / "state"}"\n'
    path.write_text(
        f'name = "kitchen"\nfolder = "{folder}"\nkey = "none"\nsecret = "none"\n{own}[data]\npath = "none"\n',
        encoding="utf-8",
    )
    return path


def one_more(small: Path, by: float) -> dict[str, torch.Tensor]:
    """All parameters of a small model, moved."""
    with CausalModel(str(small)).loaded() as model:
        return {SMALL + name: one.detach() + by for name, one in model.named_parameters()}


def test_the_model_after_the_last_round_is_written_and_answers(tmp_path: Path, run: Any) -> None:
    small = model_folder(tmp_path / "small", "mamba2", "unigram", seed=3)
    settings, store, out = device_toml(tmp_path, small), DeviceStore(tmp_path / "state" / ROUNDS), tmp_path / "tuned"
    ask = ("federate", "device-model", settings, "--out", out)
    run(*ask).check_refusal("has no round of any run, expected one")
    for number in (1, 2):
        store.save("first", number, one_more(small, number / 10))
    outcome = run(*ask, "--json")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out) == {"out": str(out), "run": "first", "round": 2}
    with CausalModel(str(out)).loaded() as model:
        found = {SMALL + name: one.clone() for name, one in model.named_parameters()}
    wanted = one_more(small, 0.2)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], one) for name, one in wanted.items())
    assert (out / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()

    # Of several runs one has to be named, and what is there is not written over.
    run(*ask).check_refusal("which holds something already")
    store.save("second", 1, one_more(small, 0.5))
    ask = (*ask[:-1], tmp_path / "other")
    run(*ask).check_refusal("has rounds of first, second, expected one run; choose by --run")
    run(*ask, "--run", "third").check_refusal("expected third")
    chosen = run(*ask, "--run", "second")
    assert chosen.status == 0 and "after round 1 of run second" in " ".join(chosen.err.split())


def test_what_is_not_co_tuned_or_of_another_model_is_refused_and_nothing_is_written(tmp_path: Path, run: Any) -> None:
    small, other = (
        model_folder(tmp_path / name, family, kind)
        for name, family, kind in (("small", "gpt2", "byte_level"), ("other", "mamba2", "unigram"))
    )
    out = tmp_path / "out"
    plain = device_toml(tmp_path, small, extra="\n")
    run("federate", "device-model", plain, "--out", out).check_refusal("has no [co_tuning]")
    settings = device_toml(tmp_path, small)
    DeviceStore(tmp_path / "state" / ROUNDS).save("r", 1, one_more(other, 0.1))
    outcome = run("federate", "device-model", settings, "--out", out)
    assert outcome.status != 0 and "is of another small model than" in " ".join(outcome.err.split())
    assert not out.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    DeviceStore(tmp_path / "state" / ROUNDS).save("r", 2, one_more(small, 0.1))
    lost = tmp_path / "small"
    lost.rename(tmp_path / "moved")
    run("federate", "device-model", settings, "--out", out).check_refusal(str(small))
    assert not out.exists()
