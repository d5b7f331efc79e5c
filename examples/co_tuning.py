"""Three devices of three architectures and a cloud teach each other; then a device's two models answer together.

Leaves a folder in which the commands of docs/cotuning.md run: `python examples/co_tuning.py [FOLDER]`, by default a
folder that goes afterwards. The models are tiny and new, so that what they answer is nothing to be proud of.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from cotune.data.domain_questions import generate_domains, generate_public, open_questions
from cotune.data.templates import Example
from cotune.models.seeded import seeded
from cotune.models.weights import quiet

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
    },
}
SETTINGS = """
algorithm = "coplms"
model = "proxy"

[data]
path = "domains"
split = "domains"
num_judge = 8

[adapter]
rank = 4

[steps]
num_steps = 10
batch_size = 8
learning_rate = 2e-3

[rounds]
num_rounds = 2

[options.coplms]
private_rank = 0                # what devices know shall cross
devices = { desk = "small-llama", kitchen = "small-gpt2", "*" = "small-mamba2" }

[options.coplms.cloud]
model = "starter"
public = "public.jsonl"
questions = "questions.jsonl"
steps = { num_steps = 5, batch_size = 8, learning_rate = 5e-4 }
"""


def small_model(folder: Path, family: str, texts: Sequence[Example]) -> None:
    """A new model with a tokenizer of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = 300 + 10 * list(SHAPES).index(family)
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<pad>", "<end>"], show_progress=False
    )
    tokenizer.train_from_iterator((one.prompt + one.target for one in texts), trainer)
    ids = {"vocab_size": tokenizer.get_vocab_size(), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    with seeded(0, size), quiet():
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPES[family], **ids)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")


def write(path: Path, texts: Sequence[Example]) -> None:
    """One row for each."""
    rows = [json.dumps({"prompt": one.prompt, "completion": one.target}) for one in texts]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def cotune(folder: Path, *arguments: str) -> None:
    """A command, as in a terminal in that folder."""
    print("$ cotune", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "cotune", *arguments], cwd=folder, check=True)


def main(folder: Path) -> None:
    """Everything."""
    domains = generate_domains(["desk", "kitchen", "watch"], num_things=4, num_skills=8, num_test=4, seed=0)
    public = generate_public(48, seed=0)
    (folder / "domains").mkdir(parents=True)
    for one in domains:
        write(folder / "domains" / f"{one.name}.jsonl", one.train)
    write(folder / "public.jsonl", public)
    asked = [question for one in domains for question in open_questions(one)]
    (folder / "questions.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in asked), "utf-8")
    write(folder / "heldout.jsonl", domains[0].facts[:4])
    (folder / "co.toml").write_text(SETTINGS, encoding="utf-8")
    for family in SHAPES:
        small_model(folder / f"small-{family}", family, public)
    distilled = ("--prune", "depth:1", "--distill", "forward", "--rounds", "0")
    texts = ("--calibration", "public.jsonl", "--train-data", "public.jsonl")
    cotune(folder, "compress", "starter", "--out", "proxy", *distilled, *texts)
    cotune(folder, "federate", "co.toml", "--out", "together")
    both = ("--small", "together.run/devices/kitchen/model", "--proxy", "proxy", "--adapter", "together")
    # The questions are of the desk, of which the kitchen's own model knows little: so the proxy counts more.
    domain = ("--own", "domains/kitchen.jsonl", "--others", "public.jsonl", "--others", "questions.jsonl")
    cotune(folder, "federate", "answer", "heldout.jsonl", *both, *domain, "--score")


if len(sys.argv) > 1:
    main(Path(sys.argv[1]))
else:
    with tempfile.TemporaryDirectory() as name:
        main(Path(name))
