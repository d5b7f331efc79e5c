"""Train `starter`, the built-in model, from generated text, reproducible from the seed.

    python scripts/train_starter.py --seed 0 --out cotune/models/starter

Writes tokenizer, weights, projections and a README with the facts. About 20 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from cotune.data.assistant_text import Exchange, generate_exchanges
from cotune.data.templates import format_answer, format_request
from cotune.models.backbone import Backbone
from cotune.models.projections import FILE_NAME, Projections

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>"]
VOCAB_SIZE = 2048
CONTEXT_LENGTH = 512
# Requests are drawn at random, answers follow from them: the loss counts the former less.
REQUEST_WEIGHT = 0.2
# Share of documents with two exchanges, so that the model has seen a conversation go on.
SHARE_OF_CONVERSATIONS = 0.06


@dataclass(frozen=True)
class Document:
    """Token ids of one conversation with `<bos>` and `<eos>`, and the loss weight of each."""

    token_ids: list[int]
    weights: list[float]


def train_tokenizer(exchanges: list[Exchange]) -> Tokenizer:
    """Byte-level BPE over the generated texts; it can encode any text and puts `<bos>` in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (format_request(each.request) + format_answer(each.answer) for each in exchanges)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)]),
        ]
    )
    return tokenizer


def encode_document(tokenizer: Tokenizer, exchanges: list[Exchange]) -> Document:
    """One conversation as token ids with loss weights."""
    token_ids, weights = [BOS], [0.0]
    for index, exchange in enumerate(exchanges):
        prompt = ("\n" if index else "") + format_request(exchange.request)
        for text, weight in ((prompt, REQUEST_WEIGHT), (format_answer(exchange.answer), 1.0)):
            piece = tokenizer.encode(text, add_special_tokens=False).ids
            token_ids += piece
            weights += [weight] * len(piece)
    return Document([*token_ids, EOS], [*weights, 1.0])


def pack_documents(
    tokenizer: Tokenizer, exchanges: list[Exchange], seq: int, rng: random.Random
) -> Iterator[tuple[list[int], list[float]]]:
    """Endless rows of `seq` tokens. A row starts with a document and what does not fit is dropped."""
    order = list(range(len(exchanges)))
    token_ids: list[int] = []
    weights: list[float] = []
    while True:
        rng.shuffle(order)
        position = 0
        while position < len(order):
            turns = 2 if rng.random() < SHARE_OF_CONVERSATIONS else 1
            chosen = [exchanges[index] for index in order[position : position + turns]]
            position += turns
            document = encode_document(tokenizer, chosen)
            token_ids += document.token_ids
            weights += document.weights
            if len(token_ids) > seq:
                yield token_ids[:seq], weights[:seq]
                token_ids, weights = [], []


def weighted_loss(model: LlamaForCausalLM, input_ids: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token, weighted; both arguments (batch, seq)."""
    logits = model(input_ids=input_ids).logits[:, :-1].float()  # (batch, seq - 1, vocab)
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), input_ids[:, 1:].reshape(-1), reduction="none"
    )
    kept = weights[:, 1:].reshape(-1)
    return (losses * kept).sum() / kept.sum()


@torch.no_grad()
def measure_answers(model: LlamaForCausalLM, tokenizer: Tokenizer, exchanges: list[Exchange]) -> tuple[float, float]:
    """Held-out loss in nats per answer token, and the share of answer tokens that are the model's first choice."""
    model.eval()
    total, right, num_tokens = 0.0, 0, 0
    for exchange in exchanges:
        document = encode_document(tokenizer, [exchange])
        first = document.weights.index(1.0)
        input_ids = torch.tensor([document.token_ids])
        logits = model(input_ids=input_ids).logits[0, first - 1 : -1].float()
        targets = input_ids[0, first:]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        right += int((logits.argmax(-1) == targets).sum())
        num_tokens += len(targets)
    model.train()
    return total / num_tokens, right / num_tokens


def build_model(seed: int) -> LlamaForCausalLM:
    """An untrained starter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, num_steps: int, peak: float, num_warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to a twentieth of the peak."""
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train_model(
    tokenizer: Tokenizer, exchanges: list[Exchange], held_out: list[Exchange], args: argparse.Namespace
) -> LlamaForCausalLM:
    """The training loop: AdamW, gradient clipping, one line of progress every 100 steps."""
    model = build_model(args.seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
    )
    rows = pack_documents(tokenizer, exchanges, args.seq, random.Random(args.seed))
    started = time.monotonic()
    running = 0.0
    for step in range(args.steps):
        batch = [next(rows) for _ in range(args.batch)]
        input_ids = torch.from_numpy(np.array([row for row, _ in batch], dtype=np.int64))
        weights = torch.from_numpy(np.array([row for _, row in batch], dtype=np.float32))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = weighted_loss(model, input_ids, weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += loss.item() / 100
        if (step + 1) % 100 == 0:
            rate = (step + 1) * args.batch * args.seq / (time.monotonic() - started)
            line = f"step {step + 1}/{args.steps}  loss {running:.4f}  {rate:.0f} tokens/s"
            if (step + 1) % 500 == 0:
                line += "  held-out loss {:.4f}, first choice {:.3f}".format(
                    *measure_answers(model, tokenizer, held_out[:100])
                )
            print(line, flush=True)
            running = 0.0
    return model


README = """# starter

The model that comes with cotune: a small Llama ({num_params:,} parameters) that writes short messages, does small
tasks and answers simple questions in a little world of its own. It is there to try cotune without a download, not to
be clever.

| fact | value |
|---|---|
| text | `cotune.data.assistant_text`, {num_exchanges:,} exchanges, {num_tokens:,} tokens read |
| script | `python scripts/train_starter.py --seed {seed} --steps {steps}` |
| tokenizer | byte-level BPE, {vocab:,} entries, `<pad>` 0, `<bos>` 1, `<eos>` 2 |
| shape | hidden 192, 6 layers, 6 heads of 32, 2 key-value heads, MLP 512, context {context} |
| trained | {seconds:.0f} s in float32 on the CPU with torch {torch_version}; saved in float16 |
| held-out loss | {loss:.4f} nats per answer token (perplexity {perplexity:.2f}) over {num_held_out} exchanges |
| first choice right | {accuracy:.1%} of held-out answer tokens |
| projections | `projections.safetensors`: principal directions over {num_held_out} of the training texts |
| prompt | `User: {{request}}\\nAssistant:` and the answer after a space, then `<eos>` |

The text holds no real person's data; licence as the rest of cotune (Apache-2.0).
"""


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Weights in float16, which load as float32; config, tokenizer and generation defaults."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.float32
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(out)
    GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD).save_pretrained(out)
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]  # tied to the embedding
    (out / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")


def fit_projections(tokenizer: Tokenizer, exchanges: list[Exchange], out: Path) -> None:
    """The shared frozen projections, fitted on texts that the model was trained on."""
    backbone = Backbone.from_pretrained(str(out))
    sequences = (np.array(encode_document(tokenizer, [each]).token_ids, dtype=np.int64) for each in exchanges)
    # A basis as wide as the model: with a hidden size of 192 that costs little, and the head is as free as SPA's own.
    Projections.fit(backbone, sequences, basis_dim=backbone.spec.hidden_size).save(out / FILE_NAME)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=12, help="rows in a step")
    parser.add_argument("--seq", type=int, default=160, help="tokens in a row")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--exchanges", type=int, default=120_000, help="how many to generate")
    parser.add_argument("--held-out", type=int, default=400, help="exchanges that the model is measured on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("cotune/models/starter"))
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    exchanges = generate_exchanges(args.exchanges, args.seed)
    seen = {each.request for each in exchanges}
    fresh = (each for each in generate_exchanges(4 * args.held_out, args.seed + 1) if each.request not in seen)
    held_out = [each for each, _ in zip(fresh, range(args.held_out), strict=False)]
    tokenizer = train_tokenizer(exchanges[:20_000])
    print(f"{len(exchanges)} exchanges, {len(seen)} different requests, {len(held_out)} held out", flush=True)

    started = time.monotonic()
    model = train_model(tokenizer, exchanges, held_out, args)
    seconds = time.monotonic() - started
    save_model(model, tokenizer, args.out)

    fit_projections(tokenizer, exchanges[: args.held_out], args.out)

    saved = LlamaForCausalLM.from_pretrained(args.out)  # what users get, after rounding to float16
    loss, accuracy = measure_answers(saved, tokenizer, held_out)
    facts = README.format(
        num_params=saved.num_parameters(),
        num_exchanges=len(exchanges),
        num_tokens=args.steps * args.batch * args.seq,
        seed=args.seed,
        steps=args.steps,
        vocab=VOCAB_SIZE,
        context=CONTEXT_LENGTH,
        seconds=seconds,
        torch_version=torch.__version__,
        loss=loss,
        perplexity=math.exp(loss),
        num_held_out=len(held_out),
        accuracy=accuracy,
    )
    (args.out / "README.md").write_text(facts, encoding="utf-8")
    print(f"held-out loss {loss:.4f} nats per answer token, first choice right {accuracy:.3f}")


if __name__ == "__main__":
    main()
