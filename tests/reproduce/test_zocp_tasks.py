"""The sandwich's tasks, arms and verdicts by hand; the whole command once, with every arm, on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dspy_arms import DSPY_ARMS
from sandwich_arms import ARMS, LEARNING, WITH_FLOPS, WITHOUT_ADVICE, best_threshold, medoid
from sandwich_bench import Arm, Bench, Learnt
from sandwich_tasks import TASKS, Sizes, call_score, examples_of, load_task, made_examples, tool_graph_f1
from study_command import Command
from zocp_cloud import GOOD, OPTIONS, label_of
from zocp_study import Study, Where, column, digest_of, finished, make_parser
from zocp_tasks import break_even, bytes_against_split, equal_inference, growth_table, verdict_lines, verdicts

from cotune.errors import InputError, RefusedError
from cotune.sandwich.scripted_cloud import scripted_server

SIZES = Sizes(num_train=2, num_unlabelled=1, num_validation=1, num_test=1, seed=0)


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir()
    for part in ("train", "validation", "test"):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_requests_of_the_public_sets(tmp_path: Path) -> None:
    write(tmp_path / "ultratool_planning", [{"instruction": f"{n} a", "tools": ["a", "b"]} for n in range(3)])
    write(
        tmp_path / "api_bank",
        [
            {
                "instruction": f"I am Ann Lee, {n}.",
                "tools": [{"name": "Find", "input_parameters": {"name": {}}}],
                "calls": ["API-Request: [Find(name='Ann Lee')]"],
            }
            for n in range(3)
        ],
    )
    turns = [{"speaker": "A", "text": "Hi"}, {"speaker": "B", "text": "Ho"}]
    write(tmp_path / "dailydialog", [{"turns": turns}] * 3)
    write(tmp_path / "trec", [{"text": f"{n}?", "label": label} for n, label in enumerate(("x", "y", "x"))])
    found = {name: load_task(name, tmp_path, SIZES, source={"nlu": "trec"}.get(name)) for name in TASKS}
    assert found["decomposition"].test[0].target == "a, b"
    assert found["decomposition"].test[0].request.startswith("Tools: ")
    tools = found["tools"]
    assert (tools.test[0].target, tools.test[0].private) == ("Find(name='Ann Lee')", ("ann lee",))
    assert tools.test[0].public == ("Find(name)",)
    assert "APIs: Find(name)" in tools.test[0].request and tools.own_words[0].forms == ("ann lee",)
    assert {"id", "dictionary"} <= set(tools.detectors) and "dictionary" not in found["nlu"].detectors
    assert found["dialogue"].test[0].request == "A: Hi\nB:" and found["dialogue"].test[0].target == "Ho"
    assert found["nlu"].test[0].request.endswith("\nOne of: x, y") and len(found["nlu"].unlabelled) == 1
    with pytest.raises(InputError, match="has 3 examples to train"):
        load_task("nlu", tmp_path, Sizes(**{**vars(SIZES), "num_train": 4}), source="trec")
    with pytest.raises(InputError, match="is not there"):
        load_task("nlu", tmp_path / "none", SIZES)
    own = load_task("nlu", tmp_path, SIZES, source="trec", own_words={"x": "ex"})
    assert [each.target for each in own.test] == [
        {"x": "ex"}.get(each.target, each.target) for each in found["nlu"].test
    ]
    assert "x" not in {each.target for each in own.train} and "ex" in {each.target for each in own.train}
    # The user's word is told to nobody.
    assert own.test[0].request.endswith("\nOne of: x, y")
    with pytest.raises(InputError, match="own words rename 'z', which no answer has, expected one of x, y"):
        load_task("nlu", tmp_path, SIZES, source="trec", own_words={"z": "ex"})


def test_calls_of_dialogues_name_what_the_services_can_do(tmp_path: Path) -> None:
    call = {"service": "Food_1", "method": "FindTables", "parameters": {"city": "Bern", "seats": "2"}}
    other = {"service": "Food_1", "method": "BookTable", "parameters": {}}
    turns = [{"speaker": "user", "text": "A table for two in Bern"}, {"speaker": "system", "text": "Ok", "call": call}]
    later = [*turns, {"speaker": "system", "text": "Done", "call": other}]
    silent = {"services": ["Food_1"], "turns": turns[:1]}
    write(tmp_path / "sgd", [silent, *[{"services": ["Food_1"], "turns": later}] * 8])
    task = load_task("dialogue", tmp_path, Sizes(**{**vars(SIZES), "num_train": 7}), source="sgd")
    start = "Calls: BookTable, FindTables\nUser: A table for two in Bern"
    # One call of each dialogue, with the turns before it; a dialogue without a call is none.
    assert {(each.request, each.target) for each in task.train} == {
        (start, "FindTables(city='Bern', seats='2')"),
        (f"{start}\nSystem: Ok", "BookTable()"),
    }
    assert task.metric("FindTables(city='Bern', seats='3')", ["FindTables(city='Bern', seats='2')"]) == 0.5
    own = load_task("dialogue", tmp_path, SIZES, source="sgd", own_words={"Book": "Reserve"})
    assert {each.target for each in (*own.train, *own.test)} <= {"FindTables(city='Bern', seats='2')", "ReserveTable()"}
    with pytest.raises(InputError, match="data set of dialogue is 'trec', expected one of dailydialog, sgd"):
        load_task("dialogue", tmp_path, SIZES, source="trec")


def test_variants_of_a_script_are_in_one_part(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"Script{script}-level-1-{variant}.jsonl#0",
            "level": "level-1-api",
            "instruction": f"{script} {variant}",
            "tools": [],
            "calls": ["[Find()]"],
        }
        for script in range(60)
        for variant in range(2)
    ]
    rows.append({**rows[0], "id": "level-3#1", "level": "level-3", "instruction": "other"})
    write(tmp_path / "api_bank", rows)
    found = {
        part: {
            each.request.split("\n")[1] for each in examples_of("tools", tmp_path, part, source="api_bank_by_script")
        }
        for part in ("train", "validation", "test")
    }
    assert sum(map(len, found.values())) == 120
    assert all(
        {f"{one.split()[0]} {variant}" for variant in range(2)} <= part for part in found.values() for one in part
    )
    assert 20 < len(found["test"]) < 80 and found["validation"]


def test_strict_tasks_send_common_and_public_words_alone() -> None:
    sizes = Sizes(**{**vars(SIZES), "num_train": 20})
    plain, strict = (load_task("nlu", None, sizes, is_strict=is_strict) for is_strict in (False, True))
    assert plain.allow_list == () and digest_of(plain) != digest_of(strict)
    # Words of requests and of prompts, and labels; names are in no small letters.
    assert {"writes", "classify", "lamp"} <= set(strict.allow_list) and "ann" not in strict.allow_list
    bench: Any = SimpleNamespace(task=strict)
    with Bench.redactor(bench) as redactor:
        sent = redactor.request().redact("Zoe (zoe@example.org) writes: item 5, a lamp with 2 horns.").text
    assert re.fullmatch(r"<WORD_\d+> \(<EMAIL_\d+>\) writes: item <WORD_\d+>, a lamp with <WORD_\d+> <WORD_\d+>.", sent)


def test_a_test_part_is_the_same_for_all_seeds_and_a_training_part_is_not() -> None:
    one, other = (load_task("nlu", None, Sizes(**{**vars(SIZES), "seed": seed, "num_train": 8})) for seed in (0, 1))
    assert one.test == other.test and one.train != other.train and digest_of(one) != digest_of(other)
    requests = {each.request for part in ("train", "validation", "test") for each in made_examples("nlu", part)}
    assert len(requests) == 360


@pytest.mark.parametrize(
    ("text", "score"), [("a, b, c", 1.0), ("a -> c", 0.4), ("c, b, a", 0.5), ("", 0.0), ("a, b, c, d", 29 / 35)]
)
def test_graphs_of_tools_by_hand(text: str, score: float) -> None:
    # Of a, b, c, d: nodes 6/7, edges 4/5.
    assert tool_graph_f1(text, ["a, b, c"]) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "score"),
    [("F(a='X', b='2')", 1.0), ("[F(a='x')]", 0.5), ("F(a='x', b='2', c='3')", 2 / 3), ("G(a='x', b='2')", 0), ("", 0)],
)
def test_calls_by_hand(text: str, score: float) -> None:
    assert call_score(text, ["F(a='x', b='2')"]) == pytest.approx(score)


def test_choices_by_hand() -> None:
    assert medoid(["x", "a b", "a b c"]) == "a b" and medoid(["only"]) == "only"
    # The edge is right where it is sure; never asking it costs a point, always asking it too.
    assert best_threshold([(0.9, 1, 0), (0.5, 1, 1), (0.1, 0, 1)]) == 0.5
    assert best_threshold([(0.9, 0, 1), (0.5, 0, 1)]) is None  # the cloud is always better
    assert best_threshold([]) == 0.0


def run_of(score: float, **changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = {
        "scores": [score, score],
        "serve": {"tokens_in": 5, "tokens_out": 5},
        "latency_s": {"p50": 0.2, "p95": 0.3},
        "stages_s": {"merge": 0.1},
        "leaks": {"leak_rate": 0.25, "leak_rate_own": 0.0, "leak_words": 0.0, "units": 4},
        "notes": {},
    }
    return {**value, **changes}


def test_verdicts_by_hand() -> None:
    runs = {"H cuts": [run_of(0.5)], "G penalty": [run_of(0.5)], "A zero_shot": [run_of(0.75)], "raw": [run_of(0.5)]}
    found = verdicts(runs)
    assert (found["best rival"]["name"], found["best rival"]["holds"]) == ("A zero_shot", False)
    assert found["best rival"]["difference"].mean == -25 and found["cuts less penalty"]["is_tie"]
    assert found["utility against raw"]["holds"] and not found["no unit leaks"]["holds"]
    assert found["no unit leaks beside what is public"]["holds"]
    lines = verdict_lines(found)
    assert any("cannot be told apart" in line for line in lines)
    assert "no unit leaks: 25.00 % of 4 units, missed" in lines
    assert "no unit leaks beside what is public: 0.00 % of 4 units, holds" in lines
    nothing = verdicts({"H cuts": [run_of(0.0)], "A zero_shot": [run_of(0.0)], "raw": [run_of(0.0)]})
    assert not nothing["best rival"]["holds"] and not nothing["utility against raw"]["holds"]
    assert verdicts({"H cuts": [{"refused": "no room"}]}) == {} and not finished([])


def test_parity_counts_the_clouds_tokens_of_an_answer() -> None:
    dear = run_of(1.0, serve={"tokens_in": 50, "tokens_out": 5})
    _, rows = equal_inference("nlu", {"H cuts": [run_of(0.5)], "A zero_shot": [run_of(0.25)], "icl": [dear]})
    assert rows["A zero_shot"]["is_within"] and rows["A zero_shot"]["difference"].mean == 25
    assert not rows["icl"]["is_within"] and column([dear], "serve", "tokens_in") == 50


def test_split_learning_would_send_a_vector_there_and_back_for_each_token() -> None:
    # 10 tokens of 4 numbers of 2 bytes, twice.
    said = bytes_against_split([run_of(1.0, serve={"bytes": 16, "tokens_in": 5, "tokens_out": 5})], 4)
    assert "takes 16 bytes" in said and "160, which is 10 times" in said


def test_the_break_even_by_hand() -> None:
    alone = [run_of(1.0, serve={"tokens_in": 5, "tokens_out": 15}, latency_s={"p50": 0.1, "p95": 0.1})]
    # 0.1 s of the edge against 10 tokens that the cloud does not write.
    assert "faster from 10.0 ms for a token" in break_even(alone, [run_of(1.0)])
    assert "which writes as many tokens" in break_even([run_of(1.0, latency_s={"p50": 0.1, "p95": 0.1})], [run_of(1.0)])
    assert "never faster" in break_even([run_of(1.0, latency_s={"p50": 0.1, "p95": 0.1})], [run_of(1.0)])
    assert break_even([run_of(1.0)], [run_of(1.0, latency_s={"p50": 0.1, "p95": 1})]).startswith("faster here")


def test_every_learning_arm_is_one_of_the_arms() -> None:
    assert set(LEARNING) | set(WITH_FLOPS) <= set(ARMS)
    assert {name[0] for name in ARMS if name[1] == " "} == set("ABCDEFGHIJK")
    assert set(WITHOUT_ADVICE) <= set(ARMS) | set(DSPY_ARMS)


def test_cells_of_edges_that_copy_are_others(tmp_path: Path, tiny_model: Path) -> None:
    words = [*OPTIONS, "--model", tiny_model, "--cloud", "http://127.0.0.1:9/v1", "--cells", tmp_path / "cells"]
    study = Study(make_parser("x", "", "").parse_args([*map(str, words)]), Where("http://127.0.0.1:9/v1", "m"), "x")

    def asked(name: str, copies: bool) -> dict[str, Any]:
        return study.cell("nlu", 0, 5, {"arm": name}, lambda bench: {"copies": bench.edge.config.copies}, copies=copies)

    assert [asked("H cuts", copies)["copies"] for copies in (False, True, False)] == [False, True, False]
    # Where no edge reads advice, a cell from before there was a gate is still true.
    assert asked("A zero_shot", False) == asked("A zero_shot", True)


def test_an_arm_whose_requests_are_too_long_is_refused_and_others_go_on(tmp_path: Path, tiny_model: Path) -> None:
    words = [*OPTIONS, "--model", tiny_model, "--cloud", "http://127.0.0.1:9/v1", "--cells", tmp_path / "cells"]
    study = Study(make_parser("x", "", "").parse_args([*map(str, words)]), Where("http://127.0.0.1:9/v1", "m"), "x")

    def refusing(code: int) -> Arm:
        def arm(bench: Bench) -> Learnt:
            raise RefusedError(code, "the prompt has 574 tokens")

        return arm

    assert study.run("nlu", "icl", refusing(400), 0, 5)["refused"] == "the prompt has 574 tokens"
    # A wrong key may be right tomorrow: nothing is kept.
    with pytest.raises(RefusedError):
        study.run("nlu", "random", refusing(401), 0, 5)
    assert study.run("nlu", "random", refusing(400), 0, 5)["refused"]


@pytest.mark.integration
def test_the_command_runs_every_arm_and_never_repeats_a_cell(
    tmp_path: Path, tiny_model: Path, command: Command
) -> None:
    with scripted_server(label_of) as server:
        options = [*OPTIONS, "--model", tiny_model, "--cloud", server.base_url, "--budget-tokens", 6000]
        options += [
            "--arms",
            *ARMS,
            "--samples",
            2,
            "--shots",
            1,
            "--cells",
            tmp_path / "cells",
            "--out",
            tmp_path / "out",
        ]
        status, said = command("zocp_tasks", options)
        assert status == 0, said
        num_asked = len(server.bodies)
        measured = json.loads((tmp_path / "out" / "measured.json").read_text())["nlu"]
        assert set(ARMS) | {"I consistent, 2", "icl, 1"} == set(measured["arms"]) and not measured["refused"]
        arms = measured["arms"]
        # The search finds the one good prompt; nothing private left anybody but the one that sends everything.
        assert arms["B search"]["score"]["mean"] == 100 and arms["B search"]["prompts"] == [GOOD]
        assert arms["raw"]["leaks"]["leak_rate"] > 0 and arms["H cuts"]["leaks"]["leak_rate"] == 0
        assert all(arm["train"]["tokens_in"] + arm["train"]["tokens_out"] <= 6000 for arm in arms.values())
        assert all(arm["peak_memory_mb"] is None or arm["peak_memory_mb"] >= 0 for arm in arms.values())
        assert arms["I consistent"]["serve"]["calls"] == 3 and arms["edge"]["serve"]["calls"] == 0
        flops = {name: arms[name]["train"]["edge_flops"] for name in ("H cuts", "C sft", "D distilled")}
        assert flops["C sft"] >= flops["H cuts"] > 0 and flops["D distilled"] >= flops["H cuts"]
        assert set(measured["bilevel"]) == {"F joint", "G penalty", "H cuts", "H grown"} and measured[
            "curve"
        ].keys() == {"6000"}
        page = (tmp_path / "out" / "report.html").read_text()
        assert "is it faster than the cloud alone" in page and "at the sandwich" in page
        assert "the rewriter that is tuned" in page and "most memory, MB" in page
        assert command("zocp_tasks", options)[0] == 0 and len(server.bodies) == num_asked


@pytest.mark.integration
def test_a_budget_that_buys_nothing_is_told_and_no_score(tmp_path: Path, tiny_model: Path) -> None:
    with scripted_server(label_of) as server:
        words = [*OPTIONS, "--model", tiny_model, "--cloud", server.base_url, "--cells", tmp_path / "cells"]
        study = Study(make_parser("x", "", "").parse_args([*map(str, words)]), Where(server.base_url, "scripted"), "x")
        value = study.run("nlu", "B search", ARMS["B search"], 0, 10)
    assert "no room" in value["refused"] and server.bodies == [] and not finished([value])


@pytest.mark.integration
def test_pools_grow_and_rewriters_are_tuned_within_the_budget(tmp_path: Path, tiny_model: Path) -> None:
    def answer(body: Any) -> str:
        is_reflection = "Write a better instruction" in body["messages"][0]["content"]
        return "Name the thing." if is_reflection else label_of(body)

    with scripted_server(answer) as server:
        words = [*OPTIONS, "--model", tiny_model, "--cloud", server.base_url, "--cells", tmp_path / "cells"]
        words += ["--num-steps", 6, "--grow-every", 1, "--num-train", 4]
        study = Study(make_parser("x", "", "").parse_args([*map(str, words)]), Where(server.base_url, "scripted"), "x")
        grown = study.run("nlu", "H grown", ARMS["H grown"], 0, 20_000)
        tuned = study.run("nlu", "J tuned", ARMS["J tuned"], 0, 20_000)
        preferred = study.run("nlu", "J preferred", ARMS["J preferred"], 0, 20_000)
    (growth,) = grown["notes"]["growths"]
    assert growth["num_written"] == 1 and growth["joined"] in (["Name the thing."], [])
    assert tuned["notes"]["rewriter"]["rounds"][0]["num_requests"] == 2
    assert all(run["train"]["tokens_in"] + run["train"]["tokens_out"] <= 20_000 for run in (grown, tuned, preferred))
    assert grown["leaks"]["leak_rate"] == tuned["leaks"]["leak_rate"] == preferred["leaks"]["leak_rate"] == 0
    # The same supervised rounds come first; then pairs, judged before and after.
    rewriter = preferred["notes"]["rewriter"]
    assert rewriter["rounds"] == tuned["notes"]["rewriter"]["rounds"]
    assert rewriter["preferences"]["before"]["num_requests"] == 2
    judged = {**rewriter["preferences"], "num_pairs": 3, "loss": 0.5, "is_kept": True}
    judged["after"] = {**judged["before"], "num_accepted": 2}
    rows = growth_table("nlu", {"J preferred": [{"notes": {"rewriter": {"preferences": judged}}}]})
    assert "2 of 2" in rows and "1 of 1" in rows
