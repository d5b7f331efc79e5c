"""Small tokenizers of every kind that occurs, trained on the spot, and texts that are hard for them."""

from __future__ import annotations

import json
from functools import cache

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from cotune.distillation.byte_spans import ByteSpans
from cotune.distillation.token_bytes import TokenBytes

TEXTS = [
    "hello world, the cat 😀 sat on naïve mats. 日本語のテキスト ﬁne \uff26ull",
    "the dog  ran\nfar  away; the other one did not.",
    "the theory of these others: 日本 and 語, e\u0301t\u00e9 👩‍👩‍👧",
] * 3
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
END = {"byte_level": 0, "unigram": 2, "nfkc": 2, "word_piece": 2, "trimmed": 0}

PIECES = [
    *"the catsor ,.\n",
    "😀",
    "🤖",
    "👩‍👩‍👧",
    "🇯🇵",
    "日本",
    "語",
    "龘",
    "ï",
    "é",
    "e\u0301",
    "ﬁ",
    "\uff26",
    "ⅷ",
    "½",
    "T",
    "\u3000",
]
HARD_TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.characters(exclude_categories=["Cs"])), max_size=24).map(
    "".join
)


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    """By kind: byte_level, trimmed (byte level whose offsets leave out spaces), unigram (byte fallback, metaspace),
    nfkc (BPE like Llama's, byte fallback, a normaliser that loses), word_piece (lower case, no accents)."""
    tokenizer = globals()[f"_{kind}"]()
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


@cache
def table_of(kind: str, *, with_end: bool = True) -> TokenBytes:
    return TokenBytes.of_tokenizer(tokenizer_of(kind), end_ids=[END[kind]] if with_end else [])


def spans_of(kind: str, text: str, *, has_end: bool = False, max_tokens: int | None = None) -> ByteSpans:
    end_id = END[kind] if has_end else None
    return ByteSpans.of_text(tokenizer_of(kind), text, table_of(kind), end_id=end_id, max_tokens=max_tokens)


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _trimmed() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=340, special_tokens=SPECIAL + FALLBACK, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _begun(_with_fallback(tokenizer))


def _nfkc() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL + FALLBACK, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _begun(_with_fallback(tokenizer))


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", tokenizer.token_to_id("[CLS]"))]
    )
    return tokenizer


def _with_fallback(tokenizer: Tokenizer) -> Tokenizer:
    """The trainer takes byte tokens as special ones; a converted SentencePiece model has them in its vocabulary."""
    parts = json.loads(tokenizer.to_str())
    parts["model"]["byte_fallback"] = True
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(parts))


def _begun(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
