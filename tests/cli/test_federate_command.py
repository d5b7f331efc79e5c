"""`cotune federate` as its users run it: a config, a run that is killed and goes on, and everything done wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from co_tuning import domain_texts, model_folder, write_texts
from tiny_models import save_tiny, tiny_backbone

from cotune.cli.mixed_needs import with_needs
from cotune.federation.settings import FederationSettings
from cotune.federation.user_privacy import UserPrivacyAccount

CONFIG = """
algorithm = "{algorithm}"
model = "{model}"
[data]
path = "persona"
limit = 40
num_devices = 3
num_judge = 6
max_length = 48
[adapter]
rank = 2
[steps]
num_steps = 2
batch_size = 4
learning_rate = 0.02
[options.seed]
num_directions = 6
learning_rate = 0.003
batch_size = 4
[rounds]
num_rounds = {num_rounds}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def config(tmp_path: Path, model: Path, *, algorithm: str = "rolora", num_rounds: int = 3) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(CONFIG.format(algorithm=algorithm, model=model, num_rounds=num_rounds), encoding="utf-8")
    return path


def rounds_of(out: Path) -> list[dict[str, Any]]:
    lines = (out.with_name(out.name + ".run") / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_prompts_are_federated_and_saved_as_a_folder_of_peft(tmp_path: Path, model: Path, run: Any) -> None:
    path = config(tmp_path, model, algorithm="fedpeptao")
    refused = run("federate", path, "--out", tmp_path / "out", "--json")
    assert refused.status == 2 and "expected 'prefix', which fedpeptao needs" in refused.err
    text = path.read_text(encoding="utf-8").replace("rank = 2", 'kind = "prefix"\nvirtual_tokens = 4')
    path.write_text(text, encoding="utf-8")
    outcome = run("federate", path, "--out", tmp_path / "out", "--json")
    assert outcome.status == 0, outcome.err
    told = json.loads(outcome.out)
    assert told["num_accepted"] == 3 and told["heldout_nats_per_token"] < told["start_nats_per_token"]
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (saved["peft_type"], saved["num_virtual_tokens"]) == ("PREFIX_TUNING", 4)
    # It goes on from its checkpoint, with the server's momentum and drifts.
    more = path.read_text(encoding="utf-8").replace("num_rounds = 3", "num_rounds = 4")
    path.write_text(more, encoding="utf-8")
    assert run("federate", path, "--out", tmp_path / "out", "--resume", "--json").status == 0
    assert len(rounds_of(tmp_path / "out")) == 4


def check_run(folder: Path, told: Mapping[str, Any], algorithm: str) -> None:
    """What every run leaves: each byte counted, the secret nowhere else, a report, its settings."""
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(entry["bytes"] for entry in ledger) == told["bytes_up"]
    assert (folder / "run.secret").stat().st_mode & 0o777 == 0o600
    secret = (folder / "run.secret").read_bytes()
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "run.secret":
            assert secret not in file.read_bytes() and secret.hex().encode() not in file.read_bytes()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"Federated tuning with {algorithm}" in page and "Refused replies" not in page
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]["algorithm"] == algorithm


def test_people_see_each_round_and_get_an_adapter_that_is_not_written_over(
    tmp_path: Path, model: Path, run: Any
) -> None:
    path, out = config(tmp_path, model), tmp_path / "out"
    outcome = run("federate", path, "--out", out)
    assert outcome.status == 0 and outcome.out == ""
    folder = tmp_path / "out.run"
    told = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert (told["num_rounds"], told["num_accepted"], told["num_devices"]) == (3, 3, 3)
    assert told["heldout_nats_per_token"] < told["start_nats_per_token"]
    check_run(folder, told, "rolora")
    # Who took part, losses, bytes by kind up and down, seconds and memory: a line for each round as it is stored.
    lines = outcome.err.splitlines()
    for line, row in zip(lines, rounds_of(out), strict=False):
        assert line.startswith(f"round {row['round_number']}: accepted, devices' loss {row['loss']:.4f}, held-out ")
        assert "3 of 3 replies (device-0, device-1, device-2), " in line
        for way in ("up", "down"):
            sent = row[f"bytes_{way}"]
            assert f"{sum(sent.values()):,} bytes (" in line and f") {way}, " in line
            assert all(f"{num:,} {kind}" in line for kind, num in sent.items())
        assert f"{row['seconds']:.1f} s, {row['device_seconds']:.2f} s of work, " in line and line.endswith("of memory")
    assert "3 of 3 rounds accepted" in lines[3]
    judged = run("evaluate", model, tmp_path / "c.jsonl", "--lora", out, "--json")
    assert judged.status == 2  # there are no such texts
    texts = tmp_path / "c.jsonl"
    texts.write_text(json.dumps({"prompt": "User: Hello\nAssistant:", "completion": " Hi."}) + "\n", encoding="utf-8")
    assert run("evaluate", model, texts, "--lora", out, "--max-new-tokens", 2, "--json").status == 0
    # What is there is left alone, and so it is after everything that is refused.
    files = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    run("federate", path, "--out", out).check_refusal("has a run already; go on with --resume")
    path.write_text(path.read_text(encoding="utf-8").replace("rank = 2", "rank = 3"), encoding="utf-8")
    run("federate", path, "--out", out, "--resume").check_refusal("another configuration")
    assert files == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    # The same settings over other texts would be another curve.
    path.write_text(path.read_text(encoding="utf-8").replace("rank = 3", "rank = 2"), encoding="utf-8")
    run("federate", path, "--out", out, "--resume", "--dtype", "bfloat16").check_refusal("the dtype of the run in")
    (folder / "inputs.json").write_text('{"texts": "0123", "dtype": "float32"}', encoding="utf-8")
    run("federate", path, "--out", out, "--resume").check_refusal("out.run was 0123 and is")
    (folder / "inputs.json").unlink()
    (folder / "run.secret").unlink()
    run("federate", path, "--out", out, "--resume").check_refusal("run.secret")
    assert not (folder / "run.secret").exists()


def test_a_run_in_json_is_what_its_folder_holds(tmp_path: Path, model: Path, run: Any) -> None:
    outcome = run("federate", config(tmp_path, model, algorithm="seed"), "--out", tmp_path / "out", "--json")
    assert outcome.status == 0 and outcome.err == ""
    told = json.loads(outcome.out)
    assert told == json.loads((tmp_path / "out.run" / "metrics.json").read_text(encoding="utf-8"))
    # Six slopes a round tell little; that they do lower the loss is tested with more of them elsewhere.
    assert told["num_rounds"] == 3 and told["num_devices"] == 3
    check_run(tmp_path / "out.run", told, "seed")


def test_a_run_in_which_nothing_was_learnt_says_so(tmp_path: Path, model: Path, run: Any) -> None:
    path = config(tmp_path, model, num_rounds=1)
    path.write_text(path.read_text(encoding="utf-8") + "max_update_norm = 1e-9\n", encoding="utf-8")
    outcome = run("federate", path, "--out", tmp_path / "out")
    assert outcome.status == 0 and "round 1: void, 0 of 3 replies, " in outcome.err
    assert "nothing was learnt: the adapter is the one that the run began with" in outcome.err


@pytest.mark.integration
def test_a_killed_run_goes_on_along_the_same_curve(tmp_path: Path, model: Path, run: Any) -> None:
    path, out = config(tmp_path, model, algorithm="seed", num_rounds=400), tmp_path / "out"
    # Rounds as cheap as they can be, since all that end before the kill are done again.
    path.write_text(path.read_text(encoding="utf-8").replace("num_directions = 6", "num_directions = 2"))
    command = [sys.executable, "-m", "cotune", "federate", str(path), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    rounds = tmp_path / "out.run" / "rounds.jsonl"
    ends_s = time.monotonic() + 300
    while not (rounds.is_file() and len(rounds.read_text(encoding="utf-8").splitlines()) >= 2):
        assert process.poll() is None and time.monotonic() < ends_s
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    before = len(rounds_of(out))
    assert before < 400 and not out.exists()
    more = before + 2
    assert run("federate", path, "--out", out, "--num-rounds", more, "--resume").status == 0
    again = rounds_of(out)
    assert [one["round_number"] for one in again] == list(range(1, more + 1))
    # The same secret in one go gives the same curve; that another one does not is tested with simulations.
    (tmp_path / "whole.run").mkdir()
    shutil.copy(tmp_path / "out.run" / "run.secret", tmp_path / "whole.run")
    assert run("federate", path, "--out", tmp_path / "whole", "--num-rounds", more).status == 0
    losses = [[one[name] for one in again] for name in ("heldout_loss", "loss", "counted")]
    whole = rounds_of(tmp_path / "whole")
    assert [[one[name] for one in whole] for name in ("heldout_loss", "loss", "counted")] == losses


def test_wrong_use_is_refused_in_one_sentence(tmp_path: Path, model: Path, run: Any) -> None:
    path, out = config(tmp_path, model, num_rounds=1), tmp_path / "out"
    run("federate", tmp_path / "none.toml", "--out", out).check_refusal("none.toml cannot be read")
    run("federate", path, "--out", out, "--algorithm", "fedavg").check_refusal("algorithm is 'fedavg', expected one of")
    run("federate", path, "--out", out, "--resume").check_refusal("has no run; leave it out")
    run("federate", path, "--out", out, "--num-rounds", 0).check_refusal("num_rounds is 0")
    bad = tmp_path / "bad.toml"
    bad.write_text("[data]\nnum_device = 3\n", encoding="utf-8")
    run("federate", bad, "--out", out).check_refusal("data.num_device is not known")
    bad.write_text("[data]\npath = 'nowhere.jsonl'\n", encoding="utf-8")
    run("federate", bad, "--out", out).check_refusal("nowhere.jsonl")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("x", encoding="utf-8")
    run("federate", path, "--out", full).check_refusal("holds something else")
    run("federate", path, "--out", ".").check_refusal("expected the name of a new folder")
    run("federate", path, "--out", tmp_path / ("x" * 300)).check_refusal("File name too long")
    # Refused only when the model is there: what the run had made by then is gone again.
    text = path.read_text(encoding="utf-8")
    for old, new, words in (
        ("rank = 2", "rank = 2\ntargets = ['query']", "targets has query"),
        ("rank = 2", "rank = 100000000", "adapter.rank is 100000000"),
        ("max_length = 48", "max_length = 1", "max_length"),
        ('"rolora"', '"mixed"', "has 1 bytes, expected at least"),
    ):
        assert old in text
        path.write_text(text.replace(old, new) + "[options.mixed]\nmemory_bytes = { '*' = 1 }\n", encoding="utf-8")
        run("federate", path, "--out", out).check_refusal(words)
    assert not out.exists() and not (tmp_path / "out.run").exists()


def test_the_printed_example_is_a_config(tmp_path: Path, run: Any) -> None:
    outcome = run("federate", "example")
    assert outcome.status == 0 and outcome.out.startswith('algorithm = "rolora"')
    path = tmp_path / "example.toml"
    path.write_text(outcome.out.replace("num_devices = 10", "num_devices = 1000"), encoding="utf-8")
    run("federate", path, "--out", tmp_path / "out").check_refusal("there are 400 texts")


def test_a_private_audited_encrypted_run_goes_on_and_says_what_it_spent(tmp_path: Path, model: Path, run: Any) -> None:
    path, out, key = config(tmp_path, model, algorithm="seed", num_rounds=2), tmp_path / "out", tmp_path / "my.key"
    text = path.read_text(encoding="utf-8") + "tolerance = 1e6\n[privacy]\nnoise_multiplier = 4.0\n"
    path.write_text(text + "[audit]\nnum_canaries = 4\n", encoding="utf-8")
    assert run("federate", "key", key).status == 0
    outcome = run("federate", path, "--out", out, "--checkpoint-key", key)
    assert outcome.status == 0, outcome.err
    lines = outcome.err.splitlines()
    assert lines[0].startswith("privacy, if all rounds are merged: epsilon 1.36 at delta 1e-05")
    assert any(line.startswith("privacy: epsilon 1.36") for line in lines)
    assert any(line.startswith("- The unit is one device") for line in lines)
    assert any(line.startswith("audit: empirical epsilon") and "the account says 1.36" in line for line in lines)
    assert "7 of 7 replies" in outcome.err
    folder = tmp_path / "out.run"
    last = folder / "checkpoints" / "checkpoint-000002"
    assert {one.name for one in last.iterdir()} == {"arrays.safetensors.sealed", "state.json.sealed"}
    again = ("federate", path, "--out", out, "--num-rounds", 4, "--resume", "--json")
    run(*again).check_refusal("is encrypted; give the key")
    outcome = run(*again, "--checkpoint-key", key)
    assert outcome.status == 0, outcome.err
    told = json.loads(outcome.out)
    spent = UserPrivacyAccount(noise_multiplier=4.0, num_rounds=4, delta=1e-5)
    assert told["privacy"]["num_rounds"] == 4 and told["privacy"]["epsilon"] == spent.epsilon
    assert told["audit"]["num_rounds"] == 2 and told["audit"]["num_canaries"] == 4
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["privacy"] == told["privacy"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "What it gives away of a device" in page and "The server is trusted" in page and "Made-up devices" in page
    path.write_text(text.replace("[rounds]", "[combine]\nrule = 'median'\n[rounds]"), encoding="utf-8")
    run("federate", path, "--out", tmp_path / "new").check_refusal("combine.rule is 'median' and [privacy] is on")


def test_a_start_of_a_and_a_scale_of_ones_own(tmp_path: Path, model: Path, run: Any) -> None:
    """The other starts are tested with simulations."""
    path = config(tmp_path, model, algorithm="ffa_lora")
    text = path.read_text(encoding="utf-8")
    text = text.replace("rank = 2", "rank = 2\nstart = 'update_svd'\nscale = 'rslora'").replace("0.02", "0.005")
    path.write_text(text, encoding="utf-8")
    outcome = run("federate", path, "--out", tmp_path / "out", "--json")
    assert outcome.status == 0, outcome.err
    told = json.loads(outcome.out)
    assert told["num_accepted"] >= 2 and told["heldout_nats_per_token"] < told["start_nats_per_token"]
    assert "lora_A" in rounds_of(tmp_path / "out")[1]["bytes_down"]
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert saved["use_rslora"] is True


def test_devices_without_memory_for_lora_get_seed_mode_by_what_the_planner_says(
    tmp_path: Path, model: Path, run: Any
) -> None:
    path = config(tmp_path, model, num_rounds=2)
    given: dict[str, Any] = {"memory_bytes": {"*": 1}, "seed_mode": {"batch_size": 1}}
    asked = replace(FederationSettings.read(path), options={"mixed": given})
    needs: Any = with_needs(asked, tiny_backbone("llama"), "float32").options["mixed"]
    assert needs["lora_bytes"] > needs["seed_bytes"] > 450_000_000
    small = needs["lora_bytes"] - 1
    table = f"[options.mixed]\nmemory_bytes = {{ device-0 = {small + 1}, '*' = {small} }}\n"
    seed_mode = "[options.mixed.seed_mode]\nnum_directions = 6\nlearning_rate = 0.003\nbatch_size = 1\n"
    text = path.read_text(encoding="utf-8").replace('"rolora"', '"mixed"') + table + seed_mode
    path.write_text(text, encoding="utf-8")
    outcome = run("federate", path, "--out", tmp_path / "out", "--json")
    assert outcome.status == 0, outcome.err
    first, second = rounds_of(tmp_path / "out")
    assert first["bytes_up"]["slopes"] == 2 * 4 * 6 and first["bytes_up"]["lora_B"] > 0
    # One device of the one class and two of the other: the usual rule suits itself to both.
    assert "void" not in (first["verdict"], second["verdict"])


def co_tuned(tmp_path: Path, *, num_rounds: int, devices: str = "ab") -> Path:
    """Settings for devices with models of their own, of which b has no room for the proxy."""
    proxy, cloud = (model_folder(tmp_path / name, "llama", "byte_level", seed=1) for name in ("proxy", "cloud"))
    small = model_folder(tmp_path / "small", "gpt2", "byte_level")
    for name in devices:
        (tmp_path / "texts").mkdir(exist_ok=True)
        write_texts(tmp_path / "texts" / f"{name}.jsonl", domain_texts("law", 4))
    public = write_texts(tmp_path / "public.jsonl", domain_texts("public", 3))
    path = tmp_path / "c.toml"
    path.write_text(
        f"""
algorithm = "coplms"
model = "{proxy}"
[data]
path = "{tmp_path / "texts"}"
split = "domains"
num_judge = 2
max_length = 64
[adapter]
rank = 2
[steps]
num_steps = 1
batch_size = 2
[rounds]
num_rounds = {num_rounds}
tolerance = 9.0
[options.coplms]
devices = {{ "*" = "{small}" }}
channels = {{ b = "likelihoods" }}
[options.coplms.cloud]
model = "{cloud}"
public = "{public}"
""",
        encoding="utf-8",
    )
    return path


def weights_of(out: Path) -> dict[str, bytes]:
    """All tensors that a co-tuned run left but its checkpoints, by their place."""
    run = out.with_name(f"{out.name}.run")
    files = [*out.rglob("*.safetensors"), *(run / "cloud-adapter").rglob("*.safetensors")]
    files += (run / "devices").rglob("*.safetensors")
    return {str(file.relative_to(out.parent)).removeprefix(out.name): file.read_bytes() for file in files}


@pytest.mark.integration
def test_a_killed_co_tuned_run_ends_with_the_same_weights(tmp_path: Path, run: Any) -> None:
    path, out = co_tuned(tmp_path, num_rounds=200), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "cotune", "federate", str(path), "--out", str(out)], stderr=subprocess.DEVNULL
    )
    rounds = tmp_path / "out.run" / "rounds.jsonl"
    ends_s = time.monotonic() + 300
    while not (rounds.is_file() and rounds.read_text(encoding="utf-8").splitlines()):
        assert process.poll() is None and time.monotonic() < ends_s
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    more = len(rounds_of(out)) + 2
    assert more < 200 and not out.exists()
    assert run("federate", path, "--out", out, "--num-rounds", more, "--resume").status == 0
    (tmp_path / "whole.run").mkdir()
    shutil.copy(tmp_path / "out.run" / "run.secret", tmp_path / "whole.run")
    assert run("federate", path, "--out", tmp_path / "whole", "--num-rounds", more).status == 0
    found, expected = weights_of(out), weights_of(tmp_path / "whole")
    # Private adapters and small models of the last rounds too.
    told = {"/adapter_model", ".run/cloud-adapter/adapter_model", *(f".run/devices/{one}/model/model" for one in "ab")}
    assert {f"{name}.safetensors" for name in told} <= found.keys() and len(found) == len(told) + 2 * 3
    assert found.keys() == expected.keys() and all(found[name] == expected[name] for name in found)


def test_devices_with_models_of_their_own_are_co_tuned(tmp_path: Path, run: Any) -> None:
    path, out = co_tuned(tmp_path, num_rounds=1), tmp_path / "out"
    outcome = run("federate", path, "--out", out, "--json")
    assert outcome.status == 0, outcome.err
    told = json.loads(outcome.out)
    assert told["num_devices"] == 2 and told["num_devices_with_proxy"] == 1 and told["proxy_download_bytes"] > 10_000
    assert (out / "adapter_config.json").is_file()
    folder = tmp_path / "out.run"
    assert (folder / "cloud-adapter" / "adapter_config.json").is_file()
    for device in ("a", "b"):
        assert (folder / "devices" / device / "model" / "tokenizer.json").is_file()
    # What it left is where it goes on, and what people see says what was downloaded.
    again = run("federate", path, "--out", out, "--num-rounds", 2, "--resume")
    assert again.status == 0 and "once: the proxy" in " ".join(again.err.split())
    assert [one["verdict"] for one in rounds_of(out)] == ["accepted"] * 2
    kinds = {json.loads(line)["kind"] for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()}
    assert kinds == {"co_tune", "tell_likelihoods"}


def test_devices_without_the_proxy_do_not_make_a_round_void(tmp_path: Path, run: Any) -> None:
    """Of three devices two send an adapter: a rule for three would refuse them."""
    path, out = co_tuned(tmp_path, num_rounds=1, devices="abc"), tmp_path / "out"
    outcome = run("federate", path, "--out", out)
    assert outcome.status == 0 and [one["verdict"] for one in rounds_of(out)] == ["accepted"], outcome.err


@pytest.mark.parametrize("wrong", ["is not there", "has no tokenizer"])
def test_a_device_whose_model_cannot_be_used_leaves_nothing_behind(tmp_path: Path, run: Any, wrong: str) -> None:
    path = co_tuned(tmp_path, num_rounds=1)
    small = tmp_path / "small"
    if wrong == "is not there":
        shutil.rmtree(small)
    else:
        (small / "tokenizer.json").unlink()
    outcome = run("federate", path, "--out", tmp_path / "out")
    assert outcome.status == 2 and str(small) in " ".join(outcome.err.split()).replace(" ", "")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("public.jsonl", "the public texts of the run"),
        ("small/model.safetensors", "the model of devices.* of the run"),
    ],
)
def test_a_co_tuned_run_goes_on_with_the_same_texts_and_models(
    tmp_path: Path, run: Any, changed: str, told: str
) -> None:
    path, out = co_tuned(tmp_path, num_rounds=1), tmp_path / "out"
    assert run("federate", path, "--out", out).status == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    if changed == "public.jsonl":
        write_texts(tmp_path / changed, domain_texts("law", 3))
    else:
        other = model_folder(tmp_path / "other", "gpt2", "byte_level", seed=9)
        shutil.copy(other / "model.safetensors", tmp_path / changed)
    outcome = run("federate", path, "--out", out, "--num-rounds", 2, "--resume")
    assert outcome.status == 2 and told in " ".join(outcome.err.split())
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
