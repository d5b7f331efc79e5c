"""A byte-level BPE tokenizer as llama.cpp reads it from a GGUF file.

llama.cpp splits text into words with rules of its own, chosen by a name. Only tokenizers whose rules it is known to
have are written; another one would turn text into other tokens without a word.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from cotune.errors import InputError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""GGUF's types of tokens."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_NAMES = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}
_KNOWN = "GPT-2's byte level rule, or those of Llama 3, Qwen 2 and SmolLM"


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """What goes into the file.

    Attributes:
        pre: llama.cpp's name for the rules that split text into words.
        tokens: by their ids; ids that stand for nothing are filled.
        types: of each token.
        merges: pairs with a space between them, first to last.
        adds_bos: whether every text begins with the token that begins texts.
    """

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    adds_bos: bool


def read_gguf_tokenizer(tokenizer_json: bytes, *, vocab_size: int, bos_id: int | None) -> GgufTokenizer:
    """Look through a `tokenizer.json`.

    Args:
        tokenizer_json: its bytes.
        vocab_size: rows of the model's embedding.
        bos_id: the token that begins a text, where the model has one.

    Raises:
        InputError: it is no byte-level BPE tokenizer that llama.cpp has the rules for; says what differs.
    """
    try:
        data = json.loads(tokenizer_json)
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        model = data["model"]
        kind = model["type"]
    except Exception as error:  # tokenizers raises bare ones
        raise InputError(f"the tokenizer cannot be read ({error}); copy tokenizer.json again") from error
    if kind != "BPE" or model.get("byte_fallback"):
        fallback = " with byte fallback" if model.get("byte_fallback") else ""
        raise _refused(f"is a {kind} model{fallback}", "byte-level BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refused(f"has {name} {model[name]!r}", "none")
    pre = _pre_name(data.get("pre_tokenizer"), data.get("normalizer"))
    if bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        raise _refused(f"has ignore_merges {model.get('ignore_merges')!r}", f"{pre == 'llama-bpe'} with {pre}'s rules")
    words = {index: word for word, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    if max(words) >= vocab_size:
        raise InputError(f"the tokenizer has the token {max(words)}, the model {vocab_size}; expected one made for it")
    added = {entry["id"]: CONTROL if entry["special"] else USER_DEFINED for entry in data.get("added_tokens", [])}
    return GgufTokenizer(
        pre=pre,
        tokens=tuple(words.get(i, f"[PAD{i}]") for i in range(vocab_size)),
        types=tuple(added.get(i, NORMAL if i in words else UNUSED) for i in range(vocab_size)),
        merges=tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]),
        adds_bos=_adds_bos(tokenizer, bos_id),
    )


def _pre_name(pre_tokenizer: Any, normalizer: Any) -> str:
    """llama.cpp's name of these rules."""
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise _refused(f"normalises text by {normalizer.get('type')}", "no normaliser")
    steps = pre_tokenizer or {}
    steps = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space"):
        prefix = " with a space in front of texts" if kinds[-1:] == ["ByteLevel"] else ""
        raise _refused(f"splits text by {', '.join(map(str, kinds))}{prefix}", _KNOWN)
    name = None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        split = steps[0]
        if split.get("behavior") == "Isolated" and not split.get("invert"):
            name = _SPLIT_NAMES.get(split.get("pattern", {}).get("Regex"))
    if name is None or (normalizer is not None and name != "qwen2"):
        raise _refused(f"splits text by {json.dumps(steps)[:120]}", _KNOWN)
    return name


def _adds_bos(tokenizer: Tokenizer, bos_id: int | None) -> bool:
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    if whole == plain:
        return False
    if bos_id is not None and whole == [bos_id, *plain]:
        return True
    raise _refused(f"adds tokens around texts ({whole} for {plain})", "at most the one that begins a text")


def _refused(found: str, expected: str) -> InputError:
    return InputError(
        f"the tokenizer {found}, expected {expected}, to be written to GGUF; export the model to ONNX instead, if its "
        "heads are a multiple of 16 numbers"
    )
