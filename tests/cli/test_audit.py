from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from clouds import in_a_thread

import cotune
from cotune.cli import audit_scoring
from cotune.cloud.hosted import HostedModel
from cotune.data.assistant_text import generate_exchanges
from cotune.evaluation.canaries import Manifest
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.tuning.loop import LoopConfig
from cotune.tuning.lora import LoraConfig, tune_lora
from cotune.tuning.personal import encode_examples

STARTER = Path(cotune.__file__).parent / "models" / "starter" / "model.safetensors"
needs_starter = pytest.mark.skipif(
    not STARTER.is_file(), reason="the starter model has no weights yet; make them with scripts/train_starter.py"
)


def write_texts(path: Path, num: int, seed: int) -> Path:
    rows = [{"request": each.request, "answer": each.answer} for each in generate_exchanges(num, seed=seed)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a folder, as transformers writes it."""
    folder = tmp_path_factory.mktemp("model")
    backbone = tiny_models.tiny_backbone("llama")
    backbone.model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(backbone.tokenizer_json)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts.jsonl", 6, 1)


Run = Callable[..., object]
SMALL = ("--candidates", 63, "--prefix-tokens", 1, "--next-tokens", 4)


def test_plant_writes_texts_and_manifest(run: Run, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "planted"
    told = run("audit", "plant", texts, "--out", out, "--times", "2,3", "--each", 2, "--length", 4, "--json")
    assert told.status == 0
    answer = json.loads(told.out)
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    manifest = Manifest.load(out / "canaries.json")
    assert answer["num_texts"] == len(rows) == 6 + 2 * 5
    assert answer["space_bits"] == pytest.approx(13.29, abs=0.01)
    assert [each["times"] for each in answer["canaries"]] == [0, 0, 2, 2, 3, 3]
    for canary in manifest.canaries:
        assert rows.count({"prompt": canary.prompt, "target": canary.secret}) == canary.times
    # The secrets are in the folder alone.
    assert not any(canary.secret.strip() in told.out for canary in manifest.canaries)
    words = run("audit", "plant", texts, "--out", tmp_path / "other", "--kind", "words")
    assert words.status == 0 and "6 texts and 21 with canaries" in " ".join(words.out.split())


def test_an_audit_before_and_after_and_a_limit(run: Run, texts: Path, tmp_path: Path, model: Path) -> None:
    planted, lora, out = tmp_path / "planted", tmp_path / "lora", tmp_path / "run"
    run("audit", "plant", texts, "--out", planted, "--times", "16", "--length", 4)
    from cotune.data.records import read_examples
    from cotune.models.backbone import Backbone

    backbone = Backbone.from_pretrained(str(model))
    encoded = encode_examples(backbone.tokenizer_json, read_examples(planted), backbone.description)
    config = LoraConfig(loop=LoopConfig(epochs=8, learning_rate=0.02), shape=LoraShape(rank=4))
    tune_lora(backbone, encoded, config).adapter.save(lora, backbone.model)
    other = write_texts(tmp_path / "other.jsonl", 5, 9)
    common = (model, planted, *SMALL, "--lora", lora)

    passed = run("audit", *common, "--heldout", other, "--max-extraction", 1, "--json")
    assert passed.status == 0 and passed.err == ""
    told = json.loads(passed.out)
    assert told["passed"] is True
    lora_told, base_told = told["models"]
    assert (lora_told["name"], base_told["name"]) == ("lora", "base")
    assert lora_told["extraction"]["num_texts"] == 6  # the canaries are no training texts
    assert lora_told["heldout_extraction"]["num_texts"] == 5
    assert lora_told["membership"]["gap"] > base_told["membership"]["gap"]
    assert [each["times"] for each in lora_told["exposures"]] == [0, 16]
    assert lora_told["exposures"][1]["bits"] == 6.0 > base_told["exposures"][1]["bits"]

    failed = run("audit", *common, "--max-exposure", 5, "--out", out, "--json")
    assert failed.status == 3
    assert len(failed.err.splitlines()) == 1
    assert failed.err.startswith("error: lora memorised too much: a canary planted 16 times has exposure 6.00 bits")
    assert json.loads(failed.out)["passed"] is False
    assert json.loads((out / "audit.json").read_text())["passed"] is False
    settings = json.loads((out / "config.json").read_text())
    assert settings["command"] == "cotune audit" and settings["config"]["max_exposure"] == 5
    page = (out / "report.html").read_text()
    assert "memorised too much" in page and "<svg" in page

    words = run("audit", "model", *common, "--heldout", other)
    assert words.status == 0
    said = " ".join(words.out.split())
    assert "exposure 16 x 6.00 of 6.00 bits at most" in said and "members told apart" in said


def test_a_model_beside_its_base_and_an_option_first(run: Run, texts: Path, model: Path) -> None:
    told = run("audit", "--json", model, texts, *SMALL, "--base", model)
    assert told.status == 0
    names = [each["name"] for each in json.loads(told.out)["models"]]
    assert names == ["model", "base"]


@pytest.mark.parametrize(
    ("method", "options", "file"),
    [
        ("dora", ("--rank", 2), "adapter_config.json"),
        ("bias", (), "selected.safetensors"),
        ("prefix", ("--virtual-tokens", 3), "adapter_config.json"),
        ("side", ("--side-width", 8), "plugin.json"),
    ],
)
def test_every_kind_of_result_is_audited_and_judged(
    run: Run, texts: Path, tmp_path: Path, model: Path, method: str, options: tuple[object, ...], file: str
) -> None:
    out, merged = tmp_path / "out", tmp_path / "merged"
    more = ("--merged", merged) if method == "bias" else ()
    rate = ("--epochs", 6, "--learning-rate", 0.05)
    made = run("tune", model, texts, "--method", method, "--out", out, *rate, *options, *more, "--json")
    assert made.status == 0 and (out / file).is_file(), made.err
    told = run("audit", model, texts, *SMALL, "--adapter", out, "--heldout", texts, "--json")
    assert told.status == 0 and told.err == "", told.err
    tuned, base = json.loads(told.out)["models"]
    assert (tuned["name"], base["name"]) == ("integration" if method == "side" else "adapter", "base")
    nats = tuned["membership"]["train_nats"]
    assert nats < base["membership"]["train_nats"] - 0.01
    alone = json.loads(run("audit", model, texts, *SMALL, "--heldout", texts, "--json").out)["models"][0]
    # Beside a prefix texts are cut by three tokens, with it and without.
    close = 0.05 if method == "prefix" else 1e-4
    assert base["membership"]["train_nats"] == pytest.approx(alone["membership"]["train_nats"], abs=close)
    if merged in more:
        # A merged model says the same, put on its base as an adapter and taken as the model.
        for words in ((model, texts, "--adapter", merged), (merged, texts, "--base", model)):
            whole = run("audit", *words, *SMALL, "--heldout", texts, "--json")
            assert whole.status == 0, whole.err
            assert json.loads(whole.out)["models"][0]["membership"]["train_nats"] == pytest.approx(nats, abs=1e-4)
    judged = run("evaluate", model, texts, "--adapter", out, "--max-new-tokens", 4, "--json")
    assert judged.status == 0 and judged.err == "", judged.err
    before = json.loads(run("evaluate", model, texts, "--max-new-tokens", 4, "--json").out)
    assert json.loads(judged.out)["nats_per_token"] < before["nats_per_token"] - 0.01
    if method != "side":
        for command in ("audit", "evaluate"):
            run(command, model, texts, "--adapter", out, "--mode", "spa").check_refusal("is no plugin; drop --mode")


def test_a_plugin_of_another_model_and_an_empty_folder_are_refused(
    run: Run, texts: Path, tmp_path: Path, model: Path
) -> None:
    tiny_models.untrained_plugin(tiny_models.tiny_backbone("llama", seed=5)).save(tmp_path / "plugin")
    run("audit", model, texts, "--adapter", tmp_path / "plugin").check_refusal("the plugin was tuned on another model")
    run("audit", model, texts, "--adapter", tmp_path).check_refusal("holds no adapter, expected one of")


def test_help_tells_both_ways(run: Run) -> None:
    told = run("audit", "--help")
    assert told.status == 0 and "plant" in told.out and "model" in told.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cloud", "ws://127.0.0.1:9"), "holds no plugin.json"),
        (("--mode", "spa"), "is no plugin; drop --mode"),
        (("--lora", "a", "--adapter", "b"), "--lora and --adapter cannot be given together"),
        (("--max-exposure", "3"), "there are no canaries in the texts"),
        (("--max-extraction", "7"), "max_extraction is 7.0, expected a share from 0 to 1"),
        (("--candidates", "0"), "num_candidates is 0"),
        (("--canaries", "none.json"), "none.json: the canary manifest cannot be read"),
        (("--limit", "0"), "--limit is 0, expected at least 1"),
        (("--heldout", "none.jsonl"), "none.jsonl: there is no such file"),
    ],
)
def test_bad_input_is_one_sentence(run: Run, texts: Path, arguments: tuple[str, ...], words: str) -> None:
    run("audit", "no-model", texts, *arguments).check_refusal(words)


def test_texts_that_are_too_short(run: Run, texts: Path, model: Path) -> None:
    run("audit", model, texts, "--prefix-tokens", 500).check_refusal("ask for fewer (--prefix-tokens, --next-tokens)")


def test_bad_planting_is_one_sentence(run: Run, texts: Path, tmp_path: Path) -> None:
    run("audit", "plant", texts, "--out", tmp_path).check_refusal("which is there already")
    new = tmp_path / "new"
    run("audit", "plant", texts, "--out", new, "--times", "1,x").check_refusal("--times is '1,x'")
    run("audit", "plant", texts, "--out", new, "--times", "0").check_refusal("expected numbers from 1")
    run("audit", "plant", texts, "--out", new, "--kind", "runes").check_refusal("kind is 'runes'")
    run("audit", "plant", texts, "--out", new, "--each", 10**9).check_refusal("canaries in all, expected at most")
    run("audit", "plant", texts, "--out", new, "--seed", -1).check_refusal("seed is -1, expected 0 or more")
    run("audit", "plant", texts, "--out", texts / "new").check_refusal("cannot be written")
    run("audit", "plant", tmp_path / "none.jsonl", "--out", new).check_refusal("no such file")
    assert not new.exists()


def test_an_adapter_of_another_model_or_half_of_one_is_one_sentence(
    run: Run, texts: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "adapter"
    llama = {**tiny_models.ARCHITECTURES["llama"], "intermediate_size": 48}
    monkeypatch.setitem(tiny_models.ARCHITECTURES, "llama", llama)
    wider = tiny_models.tiny_backbone("llama").model
    wider.config.name_or_path = "somewhere/else"
    LoraAdapter.fresh(wider, LoraShape(rank=2)).save(adapter, wider)
    for command in ("audit", "evaluate"):
        refused = run(command, model, texts, "--adapter", adapter)
        refused.check_refusal("does not fit this LlamaForCausalLM; attach it to the model that it was tuned on")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    run("audit", model, texts, "--adapter", adapter).check_refusal("holds no adapter with safetensors")
    weights.unlink()
    run("evaluate", model, texts, "--adapter", adapter).check_refusal("holds no adapter with safetensors")


def test_a_file_where_the_run_should_go_is_told_before_the_audit(run: Run, texts: Path, tmp_path: Path) -> None:
    run("audit", "no-model", texts, "--out", texts).check_refusal("where a file is in the way; give another folder")
    run("audit", "no-model", texts, "--out", texts / "run").check_refusal("where a file is in the way")
    assert list(tmp_path.iterdir()) == [texts]


def test_a_plugin_needs_its_cloud(run: Run, texts: Path, tmp_path: Path) -> None:
    (tmp_path / "plugin.json").write_text("{}")
    run("audit", tmp_path, texts).check_refusal("is a plugin; give the cloud")


def test_a_loaded_lora_is_the_one_that_is_audited(texts: Path) -> None:
    backbone = tiny_models.tiny_backbone("llama")
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=2))
    score = audit_scoring.backbone_scores(backbone, fresh, None, "lora", lambda done, total, note="": None)
    from cotune.data.records import read_examples

    found = score(read_examples(texts)[:1])
    assert found["lora"][0].nats == pytest.approx(found["base"][0].nats, abs=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("remembers", [False, True])
def test_a_plugin_with_its_cloud(run: Run, texts: Path, tmp_path: Path, remembers: bool) -> None:
    backbone = tiny_models.tiny_backbone("llama")
    plugin = tiny_models.random_plugin(backbone, 0.5, remembers=remembers)
    plugin.save(tmp_path / "plugin")
    run("audit", "plant", texts, "--out", tmp_path / "planted", "--times", 1, "--length", 2)
    common = (tmp_path / "planted", "--candidates", 7, *SMALL[2:], "--json")
    with in_a_thread(HostedModel.of(backbone)) as url:
        told = run("audit", tmp_path / "plugin", *common, "--cloud", url)
    assert told.status == 0, told.err
    mine, base = json.loads(told.out)["models"]
    assert (mine["name"], base["name"]) == ("integration", "base")
    assert [each["max_bits"] for each in mine["exposures"]] == [3.0, 3.0]
    # The cloud's model alone is what a model without a plugin is.
    backbone.model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes(backbone.tokenizer_json)
    alone = json.loads(run("audit", tmp_path / "model", *common).out)["models"][0]
    assert [each["bits"] for each in base["exposures"]] == [each["bits"] for each in alone["exposures"]]
    assert base["extraction"] == alone["extraction"]
    # With the model at hand no cloud is needed, and nothing is different.
    here = json.loads(run("audit", tmp_path / "model", *common, "--adapter", tmp_path / "plugin").out)["models"][0]
    assert here["exposures"] == mine["exposures"] and here["extraction"] == mine["extraction"]
