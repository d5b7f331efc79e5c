"""`cotune sandwich ask`, `fit` and `script` against a scripted cloud: what is sent, shown, kept and refused."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from processes import python, read_json
from tiny_models import tiny_backbone

from cotune.cli.sandwich_edge import Fitted, read_prompts
from cotune.errors import DataError
from cotune.ledger import EgressLedger
from cotune.sandwich.scripted_cloud import Reply, ScriptedServer, scripted_server

TEXT = "Write to ann@example.org that I am late."
SLOW = ("--detector-timeout", 60)


def say(body: Mapping[str, Any]) -> str:
    """Knows capitals where the prompt asks for them."""
    system = body["messages"][0]["content"] if len(body["messages"]) > 1 else ""
    return "Paris" if "capital" in system else f"About {body['messages'][-1]['content']}"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server(say) as made:
        yield made


@pytest.fixture
def mail(tmp_path: Path) -> Path:
    (tmp_path / "mail.txt").write_text(TEXT)
    (tmp_path / "prices.json").write_text('{"scripted": {"usd_per_million_in": 1000, "usd_per_million_out": 1000}}')
    return tmp_path / "mail.txt"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"{n}: France, asks ann{n}@example.org", "target": "Paris", "private": [f"ann{n}@example.org"]}
        for n in range(10)
    ]
    for name, part in (("train", rows[:8]), ("val", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "prompts.txt").write_text("Be brief.\nSay the capital.\n")
    return tmp_path


@pytest.fixture
def edge(tmp_path: Path) -> Path:
    """A random edge model."""
    backbone, folder = tiny_backbone("llama"), tmp_path / "edge"
    backbone.model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(backbone.tokenizer_json)
    return folder


def fit_words(data: Path, server: ScriptedServer, *more: object) -> list[object]:
    words = [
        "sandwich",
        "fit",
        data / "train.jsonl",
        "--validation",
        data / "val.jsonl",
        "--prompts",
        data / "prompts.txt",
    ]
    settings = ["--cloud", server.base_url, "--model", "scripted", "--out", data / "run", "--metric", "exact_match"]
    return [*words, *settings, *SLOW, *more]


def test_ask_sends_nothing_private_and_restores(run: Callable[..., Any], mail: Path, server: ScriptedServer) -> None:
    ledger = mail.with_name("ledger.jsonl")
    done = run("sandwich", "ask", mail, "--cloud", server.base_url, "--model", "scripted", "--ledger", ledger, *SLOW)
    assert (done.status, done.out) == (0, f"About {TEXT}\n") and "1 calls" in done.err
    assert b"ann@" not in server.bodies[0] and b"<EMAIL_" in server.bodies[0]
    assert [(entry.way, entry.kind) for entry in EgressLedger.read(ledger)] == [("sandwich", "chat")]


def test_a_streamed_answer_is_printed_restored(run: Callable[..., Any], mail: Path, server: ScriptedServer) -> None:
    words = ["sandwich", "ask", mail, "--cloud", server.base_url, "--model", "scripted", "--stream", *SLOW]
    done = run(*words)
    assert (done.status, done.out) == (0, f"About {TEXT}\n") and "1 calls" in done.err
    assert b'"stream":true' in server.bodies[0] and b"ann@" not in server.bodies[0]
    run(*words, "--json").check_refusal("both given")


def test_a_dry_run_shows_and_sends_nothing(run: Callable[..., Any], mail: Path, server: ScriptedServer) -> None:
    words = ["sandwich", "ask", mail, "--cloud", server.base_url, "--model", "scripted", "--prices"]
    done = run(*words, mail.with_name("prices.json"), "--dry-run", "--json", *SLOW)
    shown = json.loads(done.out)
    assert server.bodies == [] and "<EMAIL_" in shown["would_send"][0]["messages"][0]["content"]
    assert shown["at_most"]["usd"] > 0.2 and "ann@" not in done.out
    assert "nothing was sent" in run(*words, mail.with_name("prices.json"), "--dry-run", *SLOW).err
    too_much = run(*words, mail.with_name("prices.json"), "--max-usd", 0.1, *SLOW)
    too_much.check_refusal("usd would be", status=1)
    assert server.bodies == []


def test_the_key_comes_from_the_environment_and_is_never_shown(
    run: Callable[..., Any], mail: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-hidden")
    refuses = scripted_server(lambda body: Reply(text="not sk-hidden", status=401))
    with refuses as server:
        words = ["sandwich", "ask", mail, "--cloud", server.base_url, "--model", "m", *SLOW]
        done = run(*words, "--key-env", "MY_KEY")
        done.check_refusal("status 401", status=1)
        run(*words, "--key-env", "OTHER_KEY").check_refusal("OTHER_KEY")
    assert "sk-hidden" not in done.err


def test_what_cannot_be_asked_is_refused(run: Callable[..., Any], mail: Path) -> None:
    words = ["sandwich", "ask", mail, "--cloud"]
    run(*words, "http://127.0.0.1:9/v1").check_refusal("--model is missing")
    run(*words, "http://example.org/v1", "--model", "m").check_refusal("not encrypted")
    run(*words, "http://127.0.0.1:9/v1", "--fitted", mail.parent).check_refusal("cotune sandwich fit")
    prices = mail.with_name("prices.json")
    run(*words, "http://127.0.0.1:9/v1", "--model", "m", "--prices", prices).check_refusal("no price of 'm'")


def test_fit_projects_first_and_pays_only_when_told(
    run: Callable[..., Any], data: Path, server: ScriptedServer
) -> None:
    shown = json.loads(run(*fit_words(data, server, "--json")).out)
    assert server.bodies == [] and shown["num_cells"] == 20 and not (data / "run").exists()
    run(*fit_words(data, server, "--pay")).check_refusal("without a budget")
    done = run(*fit_words(data, server, "--pay", "--budget-calls", 20, "--steps", 10))
    assert done.status == 0 and "'Say the capital.'" in done.out and "score       1.000" in done.out, done.err
    assert "0.00% of 10 marked values" in done.out and "n = 2" in done.out
    num_sent = len(server.bodies)
    assert num_sent <= 20 and not any(b"ann" in body for body in server.bodies)
    run(*fit_words(data, server, "--pay", "--budget-calls", 20, "--steps", 10)).check_refusal("holds a run already")
    again = run(*fit_words(data, server, "--pay", "--budget-calls", 20, "--steps", 10, "--resume", "--json"))
    assert again.status == 0, again.err
    assert json.loads(again.out)["prompt"] == "Say the capital." and len(server.bodies) == num_sent
    words = ["sandwich", "ask", data / "train.jsonl", "--cloud", server.base_url, "--fitted", data / "run", *SLOW]
    assert run(*words).out == "Paris\n"


def test_a_race_comes_first_where_it_is_asked_for(run: Callable[..., Any], data: Path, server: ScriptedServer) -> None:
    done = run(*fit_words(data, server, "--pay", "--budget-calls", 20, "--steps", 5, "--race", 1))
    assert done.status == 0 and "race        1 prompts left after 4 examples" in done.out, done.err
    assert "'Say the capital.'" in done.out and len(server.bodies) < 20


@pytest.mark.integration
@pytest.mark.parametrize("always", [True, False])
def test_fit_with_an_edge_saves_its_adapter_for_ask(
    run: Callable[..., Any], data: Path, server: ScriptedServer, always: bool
) -> None:
    more = (
        "--always-merge" if always else "--no-copy",
        "--edge",
        "starter",
        "--steps",
        1,
        "--batch-size",
        1,
        "--rank",
        1,
        "--max-new-tokens",
        2,
        "--refit-steps",
        4 if always else 0,
    )
    done = run(
        *fit_words(data, server, *more, "--pay", "--budget-calls", 8, "--limit", 2, "--certificate-share", 0, "--json")
    )
    shown = json.loads(done.out)
    assert always or shown["num_refit_steps"] == 0
    assert shown["taken"]["edge_backward_tokens"] > 0 and shown["taken"]["edge_flops"] > 0
    assert (data / "run" / "adapter" / "adapter_model.safetensors").is_file()
    gate = data / "run" / "adapter" / "copy_gate.safetensors"
    assert Fitted.load(data / "run").is_copying is gate.is_file() is always
    words = ["sandwich", "ask", data / "prompts.txt", "--cloud", server.base_url, "--fitted", data / "run", *SLOW]
    asked = run(*words, "--json")
    # Two tokens of an untrained edge are never right: it is shipped only where that is asked for.
    assert asked.status == 0 and shown["is_merging"] is always and (json.loads(asked.out)["edge_flops"] > 0) is always
    if always:
        said = "Paris" if "capital" in shown["prompt"] else f"About {(data / 'prompts.txt').read_text().strip()}"
        assert json.loads(asked.out)["text"] == said
        # A folder from before there was a gate is read as it was; one that lost its gate is not.
        gate.unlink()
        run(*words).check_refusal("no copy gate of this model")
        fields = json.loads((data / "run" / "sandwich.json").read_text())
        del fields["is_copying"]
        (data / "run" / "sandwich.json").write_text(json.dumps(fields))
        older = run(*words, "--json")
        assert older.status == 0 and json.loads(older.out)["text"] != said
    run(*fit_words(data, server, "--always-merge")).check_refusal("--always-merge is given without --edge")
    run(*fit_words(data, server, "--no-copy")).check_refusal("--no-copy is given without --edge")
    run(*fit_words(data, server, "--refit-steps", 9)).check_refusal("--refit-steps is given without --edge")
    few = ("--edge", "starter", "--refit-steps", 2)
    run(*fit_words(data, server, *few)).check_refusal("num_steps of a refit is 2, expected at least 3")


def test_script_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    (tmp_path / "rules.json").write_text('[{"if": "hello", "say": "Hi."}]')
    words = ("-m", "cotune", "sandwich", "script", str(tmp_path / "rules.json"), "--port", "0", "--json")
    with python(*words, log=tmp_path / "log") as process:
        url = read_json(process, tmp_path / "log")["url"]
        with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=20) as client:
            asked = client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": "hello"}])
        assert asked.choices[0].message.content == "Hi."
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0, (tmp_path / "log").read_text()
    assert "answered 1 requests" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("command", ["ask", "fit", "script"])
def test_help_shows_an_example(run: Callable[..., Any], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    usage, found, examples = run("sandwich", command, "--help").out.partition("Example")
    assert found and f"cotune sandwich {command}" in usage and f"cotune sandwich {command} " in examples


@pytest.mark.parametrize(("name", "text"), [("p.json", "{}"), ("p.json", "[5]"), ("p.json", "["), ("p.txt", "\n \n")])
def test_files_without_prompts_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="holds no prompts"):
        read_prompts(tmp_path / name)


def test_what_is_no_fitted_sandwich_is_refused(tmp_path: Path) -> None:
    for text in ("[]", "{}", '{"model": 5}'):
        (tmp_path / "sandwich.json").write_text(text)
        with pytest.raises(DataError, match="no fitted sandwich"):
            Fitted.load(tmp_path)


def test_a_pool_grows_where_it_is_asked_for(run: Callable[..., Any], data: Path) -> None:
    def write_or_say(body: Mapping[str, Any]) -> str:
        is_reflection = "Write a better instruction" in body["messages"][0]["content"]
        return "Say the capital." if is_reflection else say(body)

    (data / "prompts.txt").write_text("Be brief.\n")
    with scripted_server(write_or_say) as server:
        shown = run(*fit_words(data, server, "--steps", 10, "--grow-every", 1))
        assert shown.status == 0 and "growth   up to 22 calls more" in shown.out and server.bodies == []
        done = run(
            *fit_words(data, server, "--pay", "--budget-calls", 40, "--steps", 10, "--grow-every", 1, "--pool-size", 2)
        )
        assert done.status == 0 and "'Say the capital.'" in done.out and "1 joined the pool" in done.out, done.err
        run(*fit_words(data, server, "--pool-size", 2)).check_refusal("without --grow-every")
    assert not any(b"ann" in body for body in server.bodies)


def test_a_tuned_rewriter_is_saved_and_asks_before_the_cloud(
    run: Callable[..., Any], data: Path, server: ScriptedServer
) -> None:
    few = ("--edge", "starter", "--steps", 1, "--batch-size", 1, "--rank", 1, "--max-new-tokens", 2)
    words = fit_words(data, server, *few, "--tune-rewriter", 1, "--limit", 2, "--certificate-share", 0)
    done = run(*words, "--pay", "--budget-calls", 60)
    assert done.status == 0 and "rewriter    " in done.out and "of 1 requests" in done.out, done.err
    assert Fitted.load(data / "run").is_rewriting and (data / "run" / "rewriter").is_dir()
    num_sent = len(server.bodies)
    words = ["sandwich", "ask", data / "train.jsonl", "--cloud", server.base_url, "--fitted", data / "run", *SLOW]
    shown = json.loads(run(*words, "--dry-run", "--json").out)
    assert len(server.bodies) == num_sent and shown["would_send"]
    answered = json.loads(run(*words, "--json").out)
    assert answered["edge_flops"] > 0
    run(*fit_words(data, server, "--tune-rewriter", 1)).check_refusal("without --edge")


def test_a_rewriter_learns_from_pairs_within_the_same_budget(
    run: Callable[..., Any], data: Path, server: ScriptedServer, edge: Path
) -> None:
    few = ("--edge", edge, "--steps", 1, "--batch-size", 1, "--rank", 1, "--max-new-tokens", 2)
    words = fit_words(data, server, *few, "--tune-rewriter", 1, "--limit", 2, "--certificate-share", 0)
    learn = ("--dpo-rounds", 1, "--dpo-beta", 0.2, "--dpo-leak-weight", 2, "--dpo-min-gap", 0.1)
    done = run(*words, *learn, "--pay", "--budget-calls", 60)
    # One request in each of two rounds with three rewrites of eight questions at most, and in two looks.
    assert "rewriter up to 67 calls more" in done.err
    assert done.status == 0 and "preferences " in done.out and (data / "run" / "rewriter").is_dir(), done.err
    num_sent, weights = len(server.bodies), data / "run" / "rewriter" / "adapter_model.safetensors"
    learnt = weights.read_bytes()
    again = run(*words, *learn, "--pay", "--budget-calls", 60, "--resume", "--json")
    told = json.loads(again.out)["rewriter"]["preferences"]
    assert len(server.bodies) == num_sent <= 60 and told["before"]["num_requests"] == 1, again.err
    assert weights.read_bytes() == learnt
    assert not any(b"ann" in body for body in server.bodies)
    other = run(*words, *learn[:2], "--pay", "--budget-calls", 60, "--resume")
    assert other.status == 2 and "a run with other examples, prompts or settings" in other.err.splitlines()[-1]
    run(*words[:-4], "--dpo-beta", 1).check_refusal("--dpo-beta is given without --dpo-rounds")
    run(*words, "--dpo-rounds", 1, "--dpo-beta", 0).check_refusal("--dpo-beta is 0")
    run(*words, "--dpo-rounds", 0).check_refusal("--dpo-rounds is 0, expected at least 1")
    run(*fit_words(data, server, "--dpo-rounds", 1)).check_refusal("without --tune-rewriter")


def test_another_model_reflects_with_a_key_and_prices_of_its_own(
    run: Callable[..., Any], data: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "prompts.txt").write_text("Be brief.\n")
    own, other = ({name: {"usd_per_million_in": 10}} for name in ("scripted", "large"))
    (data / "prices.json").write_text(json.dumps(own))
    (data / "other.json").write_text(json.dumps(other))
    grow = ("--prices", data / "prices.json", "--steps", 10, "--grow-every", 1, "--reflect-model", "large")
    with scripted_server(lambda body: "Say the capital.") as reflects:
        words = fit_words(data, server, *grow, "--reflect-cloud", reflects.base_url)
        run(*words).check_refusal("no price of 'large'")
        words += ["--reflect-prices", data / "other.json"]
        run(*words, "--reflect-key-env", "NO_KEY", "--pay", "--budget-usd", 1).check_refusal(
            "--reflect-key-env is NO_KEY"
        )
        monkeypatch.setenv("A_KEY", "sk-other")
        done = run(*words, "--reflect-key-env", "A_KEY", "--pay", "--budget-usd", 1, "--json", "--ledger", data / "log")
    shown = json.loads(done.out)
    assert shown["prompt"] == "Say the capital." and shown["taken"]["cloud_by_kind"]["reflection"]["usd"] > 0, done.err
    assert len(reflects.bodies) == shown["taken"]["cloud_by_kind"]["reflection"]["calls"]
    assert not any(b"Write a better" in body for body in server.bodies) and b"ann" not in b"".join(reflects.bodies)
    assert {entry.kind for entry in EgressLedger.read(data / "log")} == {"chat", "reflection"}


def test_the_edge_reflects_and_sends_nothing_for_it(
    run: Callable[..., Any], data: Path, server: ScriptedServer, edge: Path
) -> None:
    few = ("--edge", edge, "--steps", 6, "--batch-size", 1, "--rank", 1, "--max-new-tokens", 4, "--limit", 3)
    words = fit_words(data, server, *few, "--grow-every", 1, "--reflect-edge", "--certificate-share", 0)
    assert "growth   up to 10 calls more" in run(*words).out
    done = run(*words, "--pay", "--budget-calls", 40, "--json")
    shown = json.loads(done.out)
    assert shown["growths"] and shown["taken"]["cloud_by_kind"].keys() == {"chat"}, done.err
    assert not any(b"Write a better" in body for body in server.bodies)
