"""A tokenizer whose tokens are bytes, so that every count can be done by hand."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS = 256, 257


def byte_tokenizer(*, merges: tuple[tuple[str, str], ...] = (), bos: bool = True) -> Tokenizer:
    """One token for each byte, in the order of the alphabet, and one for each merge."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<bos>": BOS, "<eos>": EOS} | {a + b: EOS + 1 + index for index, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer


TOKENIZER = byte_tokenizer()
