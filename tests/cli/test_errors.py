"""Bad input on the command line: one clear sentence, a status that is not 0, no trace, nothing half-written."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clouds import in_a_thread
from toy import toy_model
from toy_plugin import toy_plugin

import cotune
from cotune.cloud.host import HostConfig

STARTER = Path(cotune.__file__).parent / "models" / "starter" / "model.safetensors"
GOOD_LINE = json.dumps({"request": "Hi", "answer": "Hello there"}) + "\n"


def nobody() -> str:
    """An address of this machine at which nothing listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"ws://127.0.0.1:{unused.getsockname()[1]}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with good and bad files in it, where the command runs."""
    monkeypatch.chdir(tmp_path)
    files = {
        "good.jsonl": GOOD_LINE,
        "empty.jsonl": "",
        "blank.jsonl": "\n\n",
        "broken.jsonl": GOOD_LINE + "{'request': 1}\n",
        "list.jsonl": GOOD_LINE + GOOD_LINE + "[1]\n",
        "strange.jsonl": '{"colour": "red"}\n',
        "latin.jsonl": "",
        "notes.docx": "x",
        "token.txt": "\n",
        "thesis/chapter.txt": "years of work",
        "half/plugin.json": "{",
        "broken-ledger.jsonl": '{"time": 1}\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin.jsonl").write_bytes(b'{"request": "caf\xe9"}\n')
    (tmp_path / "nothing").mkdir()
    toy_plugin().save(tmp_path / "plugin")
    toy_plugin(gate=None).save(tmp_path / "gateless")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


GENERATE = "device generate plugin Hello --cloud {nobody}"
TUNE = "device tune {data} --cloud {nobody} --out fresh"
BAD_DATA = [
    ("missing.jsonl", "missing.jsonl: there is no such file or folder"),
    ("empty.jsonl", "empty.jsonl: the file holds no rows, expected at least one"),
    ("blank.jsonl", "blank.jsonl: the file holds no rows"),
    ("broken.jsonl", "broken.jsonl, line 2: the line is not JSON ("),
    ("list.jsonl", "list.jsonl, line 3: the line is a list of a number, expected a JSON object"),
    ("strange.jsonl", "strange.jsonl, line 1: no template fits the columns 'colour'; accepted are: prompt + target"),
    ("latin.jsonl", "latin.jsonl, line 1: byte 16 of the line is not UTF-8; save the file as UTF-8"),
    ("notes.docx", "notes.docx: the file name ends in '.docx', expected one of"),
    ("nothing", "nothing: the folder holds no data file"),
]


@pytest.mark.parametrize("command", [TUNE, "tune starter {data} --out fresh", "evaluate starter {data}"])
@pytest.mark.parametrize(("data", "words"), BAD_DATA)
def test_bad_data_is_refused_with_its_file_and_line(run: Any, here: Path, command: str, data: str, words: str) -> None:
    before = contents(here)
    run(*command.format(data=data, nobody=nobody()).split()).check_refusal(words)
    assert contents(here) == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (GENERATE + " --mode both", "mode is 'both', expected one of integration, separation, ladder, spa"),
        (GENERATE + " --mode ladder", "mode ladder needs a plugin of family serial, and this one is parallel"),
        (GENERATE + " --schedule never", "schedule is 'never', expected one of blocking, gated, optimistic"),
        (GENERATE + " --answer maybe", "answer is 'maybe', expected one of token, correction"),
        (GENERATE + " --temperature -1", "temperature is -1.0, expected a number from 0"),
        (GENERATE + " --top-p 0", "top_p is 0.0, expected a number above 0"),
        (GENERATE + " --seed -1", "seed is -1, expected an integer from 0"),
        (GENERATE + " --max-new-tokens 0", "max_new_tokens is 0, expected 1 to"),
        (GENERATE + " --top-k 0", "top_k is 0"),
        (GENERATE + " --window 0", "window is 0"),
        (GENERATE + " --rtt-ms -5", "--rtt-ms is -5.0, expected 0 or more"),
        (GENERATE + " --timeout-s 0", "timeout_s is 0.0, expected a number above 0"),
        (GENERATE + " --token-file token.txt", "token file token.txt is empty, expected the bearer token"),
        (GENERATE + " --token-file none.txt", "token file none.txt cannot be read"),
        (GENERATE + " --tls-ca good.jsonl", "tls_ca is given for"),
        ("device generate gateless Hello --cloud {nobody} --mode spa", "needs a gate, and the plugin has none"),
        ("device generate gateless Hello --cloud {nobody} --schedule gated", "needs a gate"),
        ("device generate plugin Hello --cloud http://127.0.0.1:1", "is no address of a cloud, expected ws://"),
        ("device generate plugin Hello --cloud nonsense", "is no address of a cloud"),
        ("device generate missing Hello --cloud {nobody}", "missing is no folder, expected a plugin; make one with"),
        ("device generate nothing Hello --cloud {nobody}", "plugin.json is missing from the plugin"),
        ("device generate thesis Hello --cloud {nobody}", "plugin.json is missing from the plugin"),
        ("device generate half Hello --cloud {nobody}", "plugin.json is no JSON"),
        ("device tune good.jsonl --cloud {nobody} --out thesis", "--out is thesis, which holds something else"),
        ("device tune good.jsonl --cloud {nobody} --out notes.docx", "--out is notes.docx, which holds something else"),
        ("device tune good.jsonl --cloud {nobody} --out fresh --limit 0", "limit is 0, expected at least 1"),
        ("device tune good.jsonl --cloud {nobody} --out fresh --share 1.5", "share is 1.5, expected a number above 0"),
        (
            "device tune good.jsonl --cloud {nobody} --out fresh --split test",
            "good.jsonl: split is 'test', but this is",
        ),
        ("tune starter good.jsonl --out fresh --share 0", "--share is 0.0, expected above 0 and at most 1"),
        (
            "tune starter good.jsonl --out fresh --template xsum",
            "line 1: data set 'xsum' has columns document + summary",
        ),
        ("evaluate starter good.jsonl --share nan", "share is nan, expected a number above 0"),
        ("evaluate starter half --split test", "half: the folder"),
        ("device tune good.jsonl --cloud {nobody} --out fresh --template no", "template is 'no', expected one of"),
        (
            "tune starter good.jsonl --out fresh --method side --side-init backbone",
            "expected --side attention, or random",
        ),
        ("tune starter good.jsonl --out fresh --side lstm", "--side is 'lstm', expected one of ladder, attention"),
        ("device tune good.jsonl --cloud {nobody} --out fresh --side lstm", "side is 'lstm', expected one of ladder"),
        (
            "tune starter good.jsonl --out fresh --side-init zeros",
            "--side-init is 'zeros', expected one of random, backbone",
        ),
        (
            "tune starter good.jsonl --out fresh --method magic",
            "--method is 'magic', expected one of full, lora, dora, rslora, ia3, vera, adapter, soft_prompt,",
        ),
        (
            "tune starter good.jsonl --out fresh --method blocks --memory-budget lots",
            "--memory-budget is 'lots', expected a positive number with a unit, such as 4GB",
        ),
        (
            "tune starter good.jsonl --out fresh --method side --rank 4",
            "--method is 'side', which has no --rank",
        ),
        ("tune starter good.jsonl --out fresh --base-bits 4 --merged new", "low-bit weights take nothing in"),
        ("tune starter good.jsonl --out fresh --merged thesis", "--merged is thesis, which holds something else"),
        ("tune starter good.jsonl --out plugin", "--out is plugin, which holds something else; give a new folder"),
        ("evaluate plugin good.jsonl --cloud {nobody} --adapter x", "plugin is a plugin, which takes no --adapter"),
        ("tune starter good.jsonl --out thesis", "--out is thesis, which holds something else; give a new folder"),
        ("evaluate plugin good.jsonl", "plugin is a plugin; give the cloud that it was tuned on with --cloud"),
        ("evaluate nothing good.jsonl --cloud {nobody}", "--cloud is given, but nothing holds no plugin.json"),
        ("evaluate plugin good.jsonl --cloud {nobody} --mode both", "mode is 'both', expected one of"),
        ("cloud starter --port 65536", "port is 65536, expected 0 to 65535"),
        ("cloud starter --port -1", "port is -1, expected 0 to 65535"),
        ("cloud starter --host 0.0.0.0", "host is '0.0.0.0', which others can reach; give --tls-cert, --tls-key and"),
        ("cloud starter --max-sessions 0", "max_sessions is 0, expected a number above 0"),
        ("ledger none.jsonl", "none.jsonl: cannot be read"),
        ("ledger nothing", "ledger.jsonl: cannot be read"),
        ("ledger broken-ledger.jsonl", "broken-ledger.jsonl, line 1: expected a JSON object with time, way, kind"),
    ],
)
def test_arguments_that_cannot_be_used(run: Any, here: Path, command: str, words: str) -> None:
    before = contents(here)
    run(*command.format(nobody=nobody()).split()).check_refusal(words)
    assert contents(here) == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("cloud none/such/model", "'none/such/model' is no folder; give a Hugging Face model folder, a hub name or"),
        ("cloud thesis", "thesis has no config.json, expected a Hugging Face causal-LM folder"),
        ("cloud starter --dtype int3", "dtype is 'int3', expected one of float32, bfloat16, float16"),
        ("cloud starter --projections good.jsonl", "good.jsonl"),
        ("cloud starter --device tpu9", "device is 'tpu9', which cannot be used here"),
        ("tune thesis good.jsonl --out fresh", "thesis has no config.json"),
        ("evaluate thesis good.jsonl", "thesis has no config.json"),
        ("evaluate starter good.jsonl --lora nothing", "nothing"),
        (
            "evaluate starter good.jsonl --adapter nothing",
            "nothing holds no adapter, expected one of adapter_config.json",
        ),
        ("tune starter good.jsonl --out fresh --method full --rank 4", "rank is 4, which method full does not have"),
        ("tune starter good.jsonl --out fresh --method blocks", "needs a memory budget"),
        ("tune starter good.jsonl --out fresh --method prefix --merged new", "is no part of the model's weights"),
        ("tune starter good.jsonl --out fresh --epochs 0", "epochs is 0, expected at least 1"),
        ("tune starter good.jsonl --out fresh --batch-size 0", "--batch-size is 0"),
        ("tune starter good.jsonl --out fresh --base-bits 3", "base bits are 3, expected 4 or 8"),
        ("evaluate starter good.jsonl --adapter a --lora b", "both --lora and --adapter are given"),
        ("device tune good.jsonl --cloud {nobody} --out fresh --family both", "family is 'both', expected one of"),
        ("device tune good.jsonl --cloud {nobody} --out fresh --epochs 0", "epochs is 0, expected at least 1"),
        ("device tune good.jsonl --cloud {nobody} --out fresh --learning-rate nan", "learning_rate is nan"),
        ("device tune good.jsonl --cloud {nobody} --out fresh --heldout-share 1", "heldout_share is 1.0"),
    ],
)
def test_what_only_the_model_room_can_tell(run: Any, here: Path, command: str, words: str) -> None:
    """As above; these load PyTorch."""
    if "starter" in command and not STARTER.is_file():
        pytest.skip("the starter model has no weights yet; make them with scripts/train_starter.py")
    before = contents(here)
    run(*command.format(nobody=nobody()).split()).check_refusal(words)
    assert contents(here) == before


@pytest.mark.parametrize(
    "command",
    [GENERATE, TUNE.format(data="good.jsonl", nobody="{nobody}"), "evaluate plugin good.jsonl --cloud {nobody}"],
)
def test_a_cloud_that_is_not_there(run: Any, here: Path, command: str) -> None:
    before, url = contents(here), nobody()
    run(*command.format(nobody=url).split()).check_refusal(
        f"no cloud answers at {url}: connection refused; start one with `cotune cloud MODEL`", status=1
    )
    assert contents(here) == before


@pytest.fixture(scope="module")
def toy_cloud() -> Iterator[str]:
    with in_a_thread(toy_model()) as url:
        yield url


@pytest.mark.integration
@pytest.mark.parametrize("what", ["backbone", "tokenizer", "projections"])
@pytest.mark.parametrize(
    "command", ["device generate other w5 --cloud {url}", "evaluate other good.jsonl --cloud {url}"]
)
def test_a_wrong_digest(run: Any, here: Path, toy_cloud: str, what: str, command: str) -> None:
    toy_plugin(**{f"{what}_digest": "f" * 64}).save(here / "other")
    before = contents(here)
    run(*command.split(), "--cloud", toy_cloud).check_refusal(
        f"the plugin was tuned on {what} ffffffffffff but the cloud hosts toy with {what} "
    )
    assert contents(here) == before


@pytest.mark.integration
def test_what_the_cloud_refuses_is_said_in_its_words(run: Any, here: Path, toy_cloud: str) -> None:
    run("device", "generate", "plugin", "w5 w6", "--cloud", toy_cloud, "--max-new-tokens", 600).check_refusal(
        "the cloud refused: the prompt has 4 tokens and 600 new ones are asked for, expected at most 512", status=1
    )
    run("device", "generate", "plugin", "", "--cloud", toy_cloud).check_refusal("PROMPT is empty")
    run("device", "tune", "good.jsonl", "--cloud", toy_cloud, "--out", "fresh").check_refusal(
        "the tokenizer of toy cannot be read"
    )


@pytest.mark.integration
def test_a_wrong_token(run: Any, here: Path) -> None:
    (here / "tokens.txt").write_text("right\n", encoding="utf-8")
    (here / "mine.txt").write_text("wrong\n", encoding="utf-8")
    with in_a_thread(toy_model(), HostConfig(port=0, token_file=here / "tokens.txt")) as url:
        command = ["device", "generate", "plugin", "w5", "--cloud", url]
        run(*command, "--token-file", "mine.txt").check_refusal("does not accept the token; ask its host", status=1)
        run(*command).check_refusal("does not accept the token", status=1)
        assert run(*command, "--token-file", "tokens.txt", "--json").status == 0


def test_messages_with_brackets_are_printed_as_they_are(run: Any, here: Path) -> None:
    """Brackets mean colours to the library that prints."""
    for name in ("[bold]", "x[/]", "a[/b]c", "back\\[slash]"):
        run("device", "generate", name, "Hello", "--cloud", nobody()).check_refusal(f"{name} is no folder")


@pytest.mark.parametrize("command", ["", "frobnicate", "device", "device generate", "cloud starter --colour red"])
def test_misspelt_commands_are_explained(run: Any, command: str) -> None:
    outcome = run(*command.split())
    assert outcome.status == 2
    assert "Usage: " in outcome.out + outcome.err and "Traceback" not in outcome.err


def test_only_advice_on_an_optional_kernel_is_silenced(
    run: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--version")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    # Other tests, and servers in them, set up logging anew, which silences loggers that were there.
    monkeypatch.setattr(logger, "disabled", False)
    caplog.set_level(logging.WARNING, logger=logger.name)
    above: logging.Logger | None = logger
    while above is not None:
        monkeypatch.setattr(above, "propagate", True)
        above = above.parent
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("Failed to load anything else")
    assert [record.getMessage() for record in caplog.records] == ["Failed to load anything else"]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("command", "words", "status"),
    [
        ("tune starter good.jsonl --out fresh --method magic", "--method is 'magic'", 2),
        (TUNE.format(data="broken.jsonl", nobody="ws://127.0.0.1:9"), "broken.jsonl, line 2: the line is not JSON", 2),
        (GENERATE, "no cloud answers at ws://127.0.0.1:", 1),
        ("cloud starter --host 0.0.0.0", "which others can reach", 2),
    ],
)
def test_as_a_process_of_its_own(here: Path, command: str, words: str, status: int) -> None:
    before = contents(here)
    arguments = command.format(nobody=nobody()).split()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "cotune", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1
    assert contents(here) == before
