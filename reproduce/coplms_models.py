"""Models for the study of co-tuning, made by cotune from nothing: a cloud's, two proxies distilled from it, and three
small ones of three architectures with three tokenizers. All went to the same school, whose facts no device has.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from cotune.compression.distil import DistilSettings, distil
from cotune.compression.fewer_layers import spread_layers, with_fewer_layers
from cotune.data.domain_questions import generate_domains, generate_public
from cotune.data.templates import Example
from cotune.distillation.divergences import ForwardKl
from cotune.distillation.teacher import LocalTeacher
from cotune.durable import new_folder
from cotune.federation.causal_model import CausalModel
from cotune.federation.comparison.party import Party, teach
from cotune.federation.local_model import LocalSteps
from cotune.models.backbone import Backbone
from cotune.models.seeded import seeded
from cotune.models.weights import quiet
from cotune.tuning.loop import LoopConfig
from cotune.tuning.personal import encode_examples

CLOUD, PROXY, SMALLER_PROXY = "cloud", "proxy", "proxy-smaller"
FAMILIES = ("llama", "gpt2", "mamba2")
SPECIAL = ["<pad>", "<bos>", "<eos>"]
PAD, BOS, EOS = range(3)
MAX_TOKENS = 96
# How often a piece has to occur in the school's texts to be a token, and how many a unigram tokenizer may have: so that
# names are spelt in the same short pieces there and on devices, where others would be tokens that no model has met.
RARE = {CLOUD: 30, "llama": 60, "gpt2": 20}
NUM_UNIGRAMS = 100

# Only answers are learnt, and where embedding and head are one matrix the softmax pushes all tokens that are in none to
# one place: things' names then read alike, which no adapter can mend.
UNTIED = {"tie_word_embeddings": False}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the models are and how long they learn.

    Attributes:
        cloud_width, cloud_layers: of the cloud's model.
        proxy_layers: that the proxy and the smaller one keep.
        small_width: of the devices' models, which have two layers.
        school: things of the school's domains.
        skills: questions of skills that it asks, where there are so many different ones.
        cloud_steps, small_steps, distil_epochs: of 16 texts each.
    """

    cloud_width: int
    cloud_layers: int
    proxy_layers: tuple[int, int]
    small_width: int
    school: int
    skills: int
    cloud_steps: int
    small_steps: int
    distil_epochs: int


SIZES = {
    "toy": Size(
        cloud_width=32,
        cloud_layers=3,
        proxy_layers=(2, 1),
        small_width=32,
        school=8,
        skills=160,
        cloud_steps=6,
        small_steps=4,
        distil_epochs=1,
    ),
    "small": Size(
        cloud_width=128,
        cloud_layers=6,
        proxy_layers=(3, 2),
        small_width=96,
        school=60,
        skills=2400,
        cloud_steps=4000,
        small_steps=1200,
        distil_epochs=4,
    ),
}


def school_texts(size: Size, *, known: Sequence[Example]) -> list[Example]:
    """What all models have read: facts about things that no device knows, and skills.

    Args:
        size: how much.
        known: facts of devices, and texts of tests; what asks the same, or names one of their things, is left out.

    Example:
        >>> texts = school_texts(SIZES["toy"], known=[])
        >>> len({one.prompt for one in texts}) == len(texts) > 100
        True
    """
    (school,) = generate_domains(["school"], num_things=size.school, num_skills=size.skills, seed=10**6)
    asked = {one.prompt for one in known}
    words = {word.strip("?.,") for one in known for word in one.prompt.split()}
    taken = {thing.name for thing in school.things} & words
    texts = [*school.train, *school.facts, *school.mixed, *generate_public(size.skills // 2, seed=10**6)]
    free = {
        one.prompt: one
        for one in texts
        if one.prompt not in asked and not taken & {word.strip("?.,") for word in one.prompt.split()}
    }
    return list(free.values())


def make_models(
    made: Path,
    size: Size,
    texts: Sequence[Example],
    *,
    max_tokens: int = MAX_TOKENS,
    tell: Callable[[str], None] = print,
) -> Path:
    """All models, in folders of one; there whole or not at all, and never made twice of the same texts.

    Args:
        made: where the folder goes, whose name says what was made of what.
        size: how large.
        texts: what all of them read, for instance `school_texts`.
        max_tokens: of one text.
        tell: told what is made.

    Returns:
        The folder.
    """
    read = [(one.prompt, one.target) for one in texts]
    what = json.dumps([repr(size), RARE, NUM_UNIGRAMS, UNTIED, max_tokens, read])
    folder = made / f"models-{hashlib.sha256(what.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    made.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as unfinished, quiet():
        tell(f"models: the cloud's, {size.cloud_steps} steps on {len(texts)} texts")
        tokenizer = _byte_level(texts, RARE[CLOUD])
        school = _School(texts, max_tokens)
        school.teach(unfinished / CLOUD, tokenizer, _llama(size.cloud_width, size.cloud_layers), size.cloud_steps)
        for name, kept in zip((PROXY, SMALLER_PROXY), size.proxy_layers, strict=True):
            tell(f"models: {name}, {kept} of {size.cloud_layers} layers, distilled")
            school.distil(unfinished / CLOUD, unfinished / name, kept, size)
        width = size.small_width
        for name, shape in zip(FAMILIES, (_llama(width, 2), _gpt2(width, 2), _mamba2(width, 2)), strict=True):
            tell(f"models: {name}, {size.small_steps} steps")
            tokenizer = _byte_level(texts, RARE[name]) if name in RARE else _unigram(texts)
            school.teach(unfinished / name, tokenizer, shape, size.small_steps)
        about = {"size": repr(size), "num_texts": len(texts)}
        (unfinished / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class _School:
    texts: Sequence[Example]
    max_tokens: int

    def teach(self, folder: Path, tokenizer: Tokenizer, shape: Mapping[str, Any], steps: int) -> None:
        """A fresh model that learns the school's texts."""
        fresh = folder.with_name(f"{folder.name}.fresh")
        own = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": tokenizer.get_vocab_size()}
        with seeded(len(folder.name), tokenizer.get_vocab_size()):
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape, **own)).save_pretrained(fresh)
        (fresh / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        party = Party(CausalModel(str(fresh)))
        read = party.read(self.texts, max_tokens=self.max_tokens)
        # Half of the steps at a third of the rate: the end is what counts. At three times these rates a Llama of six
        # layers ends with twice the loss.
        for part, rate in enumerate((1e-3, 3e-4)):
            how = LocalSteps(num_steps=max(1, steps // 2), batch_size=16, learning_rate=rate)
            party = teach(party, read, how, seed=part)
        with party.loaded() as model:
            model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
        shutil.rmtree(fresh)

    def distil(self, cloud: Path, folder: Path, kept: int, size: Size) -> None:
        """A proxy of the cloud's model, with some of its layers."""
        backbone = Backbone.from_pretrained(str(cloud))
        student = with_fewer_layers(backbone, spread_layers(size.cloud_layers, kept))
        encoded = encode_examples(backbone.tokenizer_json, self.texts, backbone.description, self.max_tokens)
        settings = DistilSettings(
            divergence=ForwardKl(),
            loop=LoopConfig(epochs=size.distil_epochs, learning_rate=1e-3),
            num_batch_sequences=16,
        )
        distil(student, LocalTeacher(backbone), encoded, settings).save_model(folder, student)


def _llama(width: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": 3 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        **UNTIED,
    }


def _gpt2(width: int, layers: int) -> dict[str, Any]:
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return {
        "model_type": "gpt2",
        "n_embd": width,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 256,
        **dropouts,
        **UNTIED,
    }


def _mamba2(width: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "mamba2",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "state_size": 16,
        "num_heads": 8,
        "head_dim": width // 4,
        "n_groups": 1,
        "chunk_size": 16,
    }


def _byte_level(texts: Sequence[Example], rare: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        min_frequency=rare,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    return _with_begin(tokenizer, texts, trainer)


def _unigram(texts: Sequence[Example]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    letters = sorted({letter for one in texts for letter in one.prompt + one.target if not letter.isspace()})
    trainer = trainers.UnigramTrainer(
        vocab_size=NUM_UNIGRAMS,
        special_tokens=[*SPECIAL, "<unk>"],
        unk_token="<unk>",
        initial_alphabet=[*letters, "\n"],
        show_progress=False,
    )
    return _with_begin(tokenizer, texts, trainer)


def _with_begin(tokenizer: Tokenizer, texts: Sequence[Example], trainer: trainers.Trainer) -> Tokenizer:
    tokenizer.train_from_iterator((one.prompt + one.target for one in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer
