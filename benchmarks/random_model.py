"""A model folder with random weights in a real architecture, and the tokenizer of `starter`.

For measurements that depend on the cost of a step and not on what the model says. The default is Qwen2's layer at the
width of Qwen2.5-0.5B, six layers and a small vocabulary: 97 M parameters, about 25 ms a token on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from cotune.models.backbone import Backbone
from cotune.models.weights import STARTER, find_model_folder


def make_model(folder: Path, *, num_layers: int = 6, vocab_size: int = 8192, seed: int = 0) -> None:
    """Write a random model into `folder`, unless it is there.

    Args:
        folder: for config.json, model.safetensors and tokenizer.json.
        num_layers: of Qwen2.5-0.5B's width, 15 M parameters each.
        vocab_size: at least that of `starter`; the tokens beyond have no text.
        seed: of the weights.
    """
    if (folder / "model.safetensors").is_file():
        return
    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=num_layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((find_model_folder(STARTER) / "tokenizer.json").read_bytes())


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_model(args.folder, num_layers=args.layers, vocab_size=args.vocab_size, seed=args.seed)
    backbone = Backbone.from_pretrained(str(args.folder))
    print(f"{args.folder}: {sum(p.numel() for p in backbone.model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
