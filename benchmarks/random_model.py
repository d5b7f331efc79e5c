"""A model folder with random weights in a real architecture, and the tokenizer of `starter`.

For measurements that depend on the cost of a step and not on what the model says. The default is Qwen2's layer at the
width of Qwen2.5-0.5B, six layers and a small vocabulary: 97 M parameters, about 25 ms a token on one core. With
`--shape` one of `model_shapes`, in bfloat16.

Weights are made and written a piece at a time: a folder takes two bytes of disk for a number, and a few megabytes of
memory, whatever its size.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from model_shapes import DEVICE_CONFIGS, named_config, random_model
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen2Config

from cotune.durable import new_sized_folder
from cotune.evaluation.model_shape import KNOWN_CONFIGS
from cotune.models.backbone import Backbone
from cotune.models.weights import STARTER, find_model_folder

_NUMBERS_AT_A_TIME = 2**20
_SCALE = 0.02  # standard deviation of weights, as Llama's are initialised


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


def write_random_folder(folder: Path, config: PreTrainedConfig, *, seed: int = 0) -> None:
    """Write a random model of any shape in bfloat16, a piece at a time.

    Args:
        folder: is not there yet; it is there whole or not at all.
        config: with a vocabulary at least that of `starter`; the tokens beyond have no text.
        seed: of the weights.

    Raises:
        InputError: there is something at `folder`, or the disk has too little room.
    """
    shapes = _stored_shapes(config)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    tokenizer_json = (find_model_folder(STARTER) / "tokenizer.json").read_bytes()
    with new_sized_folder(folder, num_bytes=end + len(header) + len(tokenizer_json)) as unfinished:
        with (unfinished / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for index, (name, shape) in enumerate(shapes.items()):
                for piece in _pieces(name, shape, np.random.default_rng((seed, index))):
                    file.write(piece.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        written = {**config.to_dict(), "architectures": [_architecture(config)], "dtype": "bfloat16"}
        (unfinished / "config.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        (unfinished / "tokenizer.json").write_bytes(tokenizer_json)


def _stored_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """What a file of such a model holds, tied ones once."""
    model = random_model(config, "meta", torch.float32, 0)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _architecture(config: PreTrainedConfig) -> str:
    return type(random_model(config, "meta", torch.float32, 0)).__name__


def _pieces(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """A tensor's numbers in order: norms are one, biases zero."""
    left = int(np.prod(shape))
    while left:
        num = min(left, _NUMBERS_AT_A_TIME)
        left -= num
        if len(shape) == 1:
            yield torch.full((num,), 0.0 if name.endswith("bias") else 1.0)
        else:
            yield torch.from_numpy(rng.standard_normal(num, np.float32) * np.float32(_SCALE))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=[*DEVICE_CONFIGS, *KNOWN_CONFIGS], help="instead of layers and vocabulary")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.shape is not None:
        write_random_folder(args.folder, named_config(args.shape), seed=args.seed)
        return
    make_model(args.folder, num_layers=args.layers, vocab_size=args.vocab_size, seed=args.seed)
    backbone = Backbone.from_pretrained(str(args.folder))
    print(f"{args.folder}: {sum(p.numel() for p in backbone.model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
