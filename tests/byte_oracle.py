"""A language over bytes of which the next byte depends on the last one, and token models that say exactly the same.

With a tokenizer that takes the longest token that fits, let a model draw the text that follows from the language and
say its first token:

    P(v | last byte) = P(the text goes on with v) - sum over w of P(the text goes on with w)

over the shortest longer tokens w that begin with v. All tokens that begin with one byte then have exactly that byte's
probability together. Where no token begins with another one, P(v) is the probability of its bytes, and then any two
such models also find every text as likely.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from tokenizers import Tokenizer, models, processors
from torch import Tensor

from cotune.distillation.byte_spans import ByteSpans
from cotune.distillation.token_bytes import TokenBytes


class ByteOracle:
    """Log-probabilities of the next event, float64 (257 last bytes, 257 events); row 256 is for the begin of a text."""

    def __init__(self, log_probs: np.ndarray) -> None:
        self.log_probs = log_probs

    @classmethod
    def drawn(cls, seed: int) -> ByteOracle:
        """Over all bytes."""
        weights = np.random.default_rng(seed).exponential(size=(257, 257)) + 1e-3
        return cls(np.log(weights / weights.sum(1, keepdims=True)))

    @classmethod
    def of_abc(cls) -> ByteOracle:
        """Over a, b and c; only after c a text can end."""
        weights = np.zeros((257, 257))
        for last, row in {256: "532", 97: "253", 98: "415", 99: "361"}.items():
            weights[last, 97:100] = [int(digit) for digit in row]
        weights[99, 256] = 2
        with np.errstate(divide="ignore", invalid="ignore"):
            return cls(np.log(weights / weights.sum(1, keepdims=True)))

    def log_prob(self, piece: bytes, last: int) -> float:
        total = 0.0
        for byte in piece:
            total += float(self.log_probs[last, byte])
            last = byte
        return total

    def token_logits(self, table: TokenBytes, last: int) -> np.ndarray:
        """float64 (vocab,), log P(v | last byte)."""
        known = table.ids_by_bytes
        shares = {piece: math.exp(self.log_prob(piece, last)) for piece in known}
        rest = dict(shares)
        for piece, share in shares.items():
            shorter = next((piece[:size] for size in range(len(piece) - 1, 0, -1) if piece[:size] in known), None)
            if shorter is not None:
                rest[shorter] -= share
        logits = np.full(len(table), -np.inf)
        for piece, token_id in known.items():
            logits[token_id] = math.log(rest[piece]) if rest[piece] > 0 else -np.inf
        for token_id in table.end_ids:
            logits[token_id] = self.log_probs[last, 256]
        return logits

    def logits(self, spans: ByteSpans, table: TokenBytes, text: str) -> Tensor:
        """float64 (1, tokens, vocab) at the tokens of a text; zero in front of tokens that are not the text's."""
        raw, result = text.encode(), np.zeros((1, len(spans.input_ids), len(table)))
        starts = [spans.start, *spans.ends.tolist()][: len(spans.ends)]
        places = dict(zip(spans.first_tokens.tolist(), starts, strict=True))
        if spans.end_token is not None:
            places[spans.end_token] = len(raw)
        for token, start in places.items():
            if token > 0:
                result[0, token - 1] = self.token_logits(table, raw[start - 1] if start else 256)
        return torch.from_numpy(result)


def longest_match(*tokens: str) -> tuple[Tokenizer, TokenBytes]:
    """A tokenizer that takes the longest token that fits, after a begin token, and its table; `>` ends a text."""
    vocab = {token: index for index, token in enumerate(["<", ">", "?", *tokens])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="?", continuing_subword_prefix=""))
    tokenizer.add_special_tokens(["<", ">", "?"])
    tokenizer.post_processor = processors.TemplateProcessing(single="< $A", special_tokens=[("<", 0)])
    return tokenizer, TokenBytes.of_tokenizer(tokenizer, end_ids=[1])
