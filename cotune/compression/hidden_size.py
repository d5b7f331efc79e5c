"""Width of the residual stream: rotate it to its principal axes, then cut the weakest off.

SliceGPT (Ashkboos et al., arXiv 2401.15024) rests on this: a model with RMSNorm computes the same with its residual
stream x replaced by Q^T x, Q orthogonal, once the norms' scales are folded into the layers behind them. SliceGPT takes
a Q for each block and pays with a product between blocks. Here one Q serves all blocks, so that the result is a plain
model of the same architecture with a smaller `hidden_size`:

    readers W (query, key, value, gate, up, head)    W diag(g) Q[:, :k]
    writers W (output, down), embedding E            Q[:, :k]^T W,   E Q[:, :k]

with g the scales of the norm in front. Q's columns are the eigenvectors of the sum, over all norms and tokens, of
n n^T, n = x / rms(x): of what the readers read.

A norm over k numbers divides by sqrt(|x_k|^2 / k + eps), the original one by sqrt(|x|^2 / d + eps). Its scale becomes
sqrt(d / k) and its eps becomes eps d / k, so that it divides as the original one would with zeros for what was cut off,
as in SliceGPT. (To make up for the mean share of |x|^2 that is cut off was tried too, and was worse.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from cotune.compression.calibration import LayerProgress, check_walk
from cotune.compression.llama_blocks import MULTIPLE, kept_size, llama_blocks, set_weight
from cotune.compression.pruner import Amount, Facts, refuse_skip, share_of, texts_of
from cotune.errors import InputError
from cotune.models.anatomy import output_embedding


def slice_hidden(model: PreTrainedModel, input_ids: NDArray[np.int64], num_kept: int, *, batch_size: int = 4) -> None:
    """Make the residual stream `num_kept` numbers wide, in place. Heads keep their number and dimension.

    A head that shares its weight with the embedding gets one of its own, since the last norm's scales go into the head
    alone; in a small model with many words that may cost more numbers than the narrower blocks save. All products are
    computed in float64 and stored in the model's number type: take float32 where the number type is free.

    Args:
        model: of Llama's form; its config gets the new `hidden_size` and `rms_norm_eps`, and the old `head_dim`.
        input_ids: int64 (num_texts, length), as in `CalibrationTexts`.
        num_kept: width, 1 to what it is; a multiple of the number of heads. With all kept the model is only rotated,
            and its logits stay as they are up to rounding.
        batch_size: texts in one pass.

    Raises:
        InputError: another architecture, a width that does not go, or texts that cannot be used.

    Example:
        >>> slice_hidden(model, texts.input_ids, 192)  # doctest: +SKIP
    """
    check_walk(model, input_ids, batch_size=batch_size)
    check_hidden(model, num_kept)
    hidden = int(model.config.hidden_size)
    fold_norms(model)
    norms = _norms(model)
    rotation = principal_axes(_gram_behind(model, norms, input_ids, batch_size))[:, :num_kept]
    eps = float(model.config.rms_norm_eps) * hidden / num_kept
    for norm in norms:
        scales = torch.full((num_kept,), (hidden / num_kept) ** 0.5).to(norm.weight)
        norm.weight = nn.Parameter(scales, requires_grad=norm.weight.requires_grad)
        norm.variance_epsilon = eps
    _rotate(model, rotation)
    config = model.config
    # Set before the hidden size, from which transformers derives it otherwise.
    config.head_dim = _head_dim(model)
    config.hidden_size = num_kept
    config.rms_norm_eps = eps


@torch.no_grad()
def fold_norms(model: PreTrainedModel) -> None:
    """Move the scales of all RMSNorms into the layers behind them, in place; tied head and embedding are parted first.

    Raises:
        InputError: an architecture that is not of Llama's form.
    """
    untie_head(model)
    for block in llama_blocks(model):
        for norm, readers in block.readers.items():
            _fold(norm, readers)
    _fold(_final_norm(model), (output_embedding(model),))


def untie_head(model: PreTrainedModel) -> None:
    """Give the head a weight of its own, if it shares the embedding's; in place."""
    embedding, head = model.get_input_embeddings(), output_embedding(model)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
    model.config.tie_word_embeddings = False
    # Else transformers would leave the head out of what it saves.
    model.all_tied_weights_keys = {}


def principal_axes(gram: Tensor) -> Tensor:
    """Orthonormal eigenvectors in columns, those of the largest eigenvalues first, each with a positive largest entry.

    Args:
        gram: symmetric, float64 (hidden, hidden).

    Example:
        >>> principal_axes(torch.diag(torch.tensor([1.0, 3.0])).double()).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    axes: Tensor = torch.linalg.eigh(gram).eigenvectors.flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * largest.sign()


def check_hidden(model: PreTrainedModel, num_kept: int) -> None:
    """Raise `InputError` where a model's residual stream cannot be `num_kept` wide."""
    llama_blocks(model)
    hidden, heads = int(model.config.hidden_size), int(model.config.num_attention_heads)
    if not 1 <= num_kept <= hidden or num_kept % heads:
        raise InputError(
            f"the hidden size is to be {num_kept}, expected a multiple of {heads}, the number of heads, up to {hidden}"
        )


def _norms(model: PreTrainedModel) -> list[Any]:
    return [*(norm for block in llama_blocks(model) for norm in block.readers), _final_norm(model)]


def _final_norm(model: PreTrainedModel) -> Any:
    return model.base_model.norm


def _head_dim(model: PreTrainedModel) -> int:
    return int(model.base_model.layers[0].self_attn.head_dim)


def _fold(norm: Any, readers: tuple[nn.Linear, ...]) -> None:
    for reader in readers:
        reader.weight.copy_(reader.weight.double() * norm.weight.double())
    norm.weight.fill_(1)


@torch.no_grad()
def _gram_behind(model: PreTrainedModel, norms: list[Any], input_ids: NDArray[np.int64], batch_size: int) -> Tensor:
    """Sum of n n^T over all tokens and all that the norms put out, float64 (hidden, hidden)."""
    hidden = int(model.config.hidden_size)
    gram = torch.zeros(hidden, hidden, dtype=torch.float64, device=model.device)

    def add(norm: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        normed = output.reshape(-1, hidden).double()  # (tokens, hidden)
        gram.add_(normed.T @ normed)

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(add).remove)
        for ids in torch.split(torch.from_numpy(input_ids), batch_size):
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
    return gram


@torch.no_grad()
def _rotate(model: PreTrainedModel, rotation: Tensor) -> None:
    """Into the axes of `rotation`, float64 (hidden, kept): embedding, readers and writers."""
    embedding: Any = model.get_input_embeddings()
    embedding.weight = nn.Parameter(
        (embedding.weight.double() @ rotation).to(embedding.weight), requires_grad=embedding.weight.requires_grad
    )
    embedding.embedding_dim = rotation.shape[1]
    readers = [reader for block in llama_blocks(model) for group in block.readers.values() for reader in group]
    for reader in (*readers, output_embedding(model)):
        set_weight(reader, reader.weight.detach().double() @ rotation)
    for block in llama_blocks(model):
        for writer in block.writers:
            set_weight(writer, rotation.T @ writer.weight.detach().double())
            if writer.bias is not None:
                writer.bias = nn.Parameter(
                    (rotation.T @ writer.bias.double()).to(writer.bias), requires_grad=writer.bias.requires_grad
                )


@dataclass(frozen=True, kw_only=True)
class HiddenSize:
    """`slice_hidden` by a share of the width."""

    multiple: int = MULTIPLE
    """The new width is a multiple of this (see `llama_blocks.MULTIPLE`) and of the number of heads."""

    def prune(
        self,
        model: PreTrainedModel,
        amount: Amount,
        input_ids: NDArray[np.int64] | None,
        *,
        skip: Collection[str] = (),
        batch_size: int = 4,
        on_layer: Callable[[LayerProgress], None] | None = None,
    ) -> Facts:
        """See `Pruner`. `amount` is a share; `on_layer` is not called."""
        refuse_skip(skip)
        share, ids = share_of(amount), texts_of(input_ids)
        step = math.lcm(self.multiple, int(model.config.num_attention_heads))
        num_kept = kept_size(int(model.config.hidden_size), share, multiple=step)
        slice_hidden(model, ids, num_kept, batch_size=batch_size)
        return {"hidden_size": num_kept}
