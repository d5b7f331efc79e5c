"""A copy gate: a model that has a source in front of it goes on with it, or writes a token of its own.

Pointer-generator (See, Liu and Manning, arXiv 1704.04368), equation 9, with one place to copy from and no attention:

    p(z_t | z_<t) = (1 - g_t) p_x(z_t | z_<t) + g_t 1[z_t = c_t]        g_t = sigmoid(w . u_t + v . e(c_t) + b)

c is the source, its end token included; p_x the model; u_t its last hidden state and e its input embedding, both of
Euclidean length 1. c_t is where z stands in c: the token behind the one that z followed last. After a token that is
not c's, c_t is the one behind the next place, among the `REACH` tokens to come, where c has that token; where it has
none, g_t counts as 0 and the model writes alone until it writes one of them. So a text may replace words of its source,
insert some and leave some out, and goes on with the rest. What is learnt is w, v and b, beside the model's own.

Why e(c_t): where to leave is mostly a matter of what would be copied, and u_t, which only tells what the model would
write, need not know it. Why length 1: the slope along w is then never longer than that along b, and a step of Adam,
which moves each number by its rate, moves the gate's logit by about sqrt(hidden) rates. That is enough to turn it round
in some dozens of steps at an adapter's rate; with vectors of numbers of size 1 it would be sqrt(hidden) times that, and
one step could throw it over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cotune.data.batches import TokenBatch
from cotune.errors import InputError
from cotune.tuning.answer_loss import answer_logits
from cotune.tuning.continuations import Choose

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OFF_PATH = -1
"""Stands for c_t where there is none."""
REACH = 16
"""Tokens of c, from where z left it, among which z is looked for again: further on a word is likely another one."""
START_TRUST = 0.9
"""g at the start: above one half, so that what is written greedily is c, and below 1, so that the model learns."""
GATE_FILE = "copy_gate.safetensors"
_FORMAT = "cotune copy gate 2"


@dataclass(frozen=True)
class CopyGate:
    """w, v and b.

    Attributes:
        weight, source_weight: w and v, float32 (hidden,).
        bias: float32 (1,).

    Example:
        >>> CopyGate.fresh(4).trust(torch.ones(1, 4), torch.ones(1, 4))
        tensor([0.9000])
    """

    weight: Tensor
    source_weight: Tensor
    bias: Tensor

    @classmethod
    def fresh(cls, hidden_size: int) -> CopyGate:
        """The same trust everywhere: w and v are 0, g is `START_TRUST`."""
        start = math.log(START_TRUST / (1 - START_TRUST))
        return cls(torch.zeros(hidden_size), torch.zeros(hidden_size), torch.full((1,), start))

    @classmethod
    def of(cls, numbers: Tensor) -> CopyGate:
        """The gate whose `tensors`, one behind the other, are these, float32 (num_parameters,)."""
        hidden_size = len(numbers) // 2
        return cls(numbers[:hidden_size], numbers[hidden_size:-1], numbers[-1:])

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight, self.source_weight, self.bias]

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors)

    def scores(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """w . u + v . e(c) + b, the logit of g: float32 (rows,).

        Args:
            hidden: what the output embedding reads, float (rows, hidden), of any length.
            embedded: the input embedding of c_t, likewise.
        """
        return (
            F.normalize(hidden.float(), dim=-1) @ self.weight
            + F.normalize(embedded.float(), dim=-1) @ self.source_weight
            + self.bias
        )

    def trust(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """g, float32 (rows,); arguments as of `scores`."""
        return self.scores(hidden, embedded).sigmoid()

    def save(self, folder: Path) -> None:
        """Write `copy_gate.safetensors` into a folder that is there.

        Raises:
            InputError: it cannot be written.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in vars(self).items()}
        try:
            save_file(tensors, folder / GATE_FILE, metadata={"format": _FORMAT})
        except (OSError, SafetensorError) as error:
            raise InputError(f"the copy gate cannot be written to {folder}: {error}; choose another folder") from error

    @classmethod
    def load(cls, folder: Path, hidden_size: int) -> CopyGate:
        """Read what `save` wrote.

        Args:
            folder: with the file.
            hidden_size: of the model that it stands behind.

        Raises:
            InputError: the file is missing or damaged, or of a model with another hidden size.
        """
        shapes = {"weight": [hidden_size], "source_weight": [hidden_size], "bias": [1]}
        try:
            with safe_open(folder / GATE_FILE, framework="pt") as file:
                found = {name: file.get_slice(name).get_shape() for name in file.offset_keys()}
                if (file.metadata() or {}).get("format") != _FORMAT or found != shapes:
                    raise ValueError(f"it has {found}, expected {shapes} of the format {_FORMAT!r}")
                return cls(**{name: file.get_tensor(name).float() for name in shapes})
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(
                f"{folder / GATE_FILE} is no copy gate of this model ({error}); take the model that it was tuned on"
            ) from error


class SourceTrail:
    """Where a text stands in its source, while the text is written.

    Args:
        source: c, int64, with its end token; an empty one is nothing to copy.

    Example:
        >>> trail = SourceTrail(np.array([5, 6, 7, 1]))
        >>> [trail.token, trail.take(5), trail.take(9), trail.take(7)]
        [5, 6, -1, 1]
    """

    def __init__(self, source: NDArray[np.int64]) -> None:
        self._source, self._place, self._is_on = source, 0, True

    @property
    def token(self) -> int:
        """c_t, or `OFF_PATH`."""
        return int(self._source[self._place]) if self._is_on and self._place < len(self._source) else OFF_PATH

    def take(self, token: int) -> int:
        """The text goes on with this token; the next c_t."""
        found = np.flatnonzero(self._source[self._place : self._place + REACH] == token)
        self._is_on = bool(len(found))
        if self._is_on:
            self._place += int(found[0]) + 1
        return self.token


def copied_tokens(written: NDArray[np.int64], source: NDArray[np.int64]) -> NDArray[np.int64]:
    """c_t at each place of a text, `OFF_PATH` where it stands nowhere in c or c is over.

    Args:
        written: z, int64 (tokens,).
        source: c, int64, with its end token.

    Example:
        >>> copied_tokens(np.array([5, 7, 9, 8, 1]), np.array([5, 6, 9, 8, 1])).tolist()
        [5, 6, -1, 8, 1]
    """
    trail = SourceTrail(source)
    return np.array([trail.token, *(trail.take(token) for token in written[:-1].tolist())][: len(written)], np.int64)


def log_mixture(own: Tensor, scores: Tensor, tokens: Tensor, copied: Tensor) -> Tensor:
    """log p(z_t | z_<t) of this module's head, in logs throughout; all arguments broadcast together.

    Args:
        own: log p_x of some tokens, float.
        scores: logits of g there, float.
        tokens: which tokens, int64.
        copied: c_t there, int64, or `OFF_PATH`.

    Example:
        >>> half = torch.tensor([0.5]).log()  # p_x of tokens 7 and 8, where the source says 7 and g is 0.75
        >>> log_mixture(half, torch.tensor([3.0]).log(), torch.tensor([7, 8]), torch.tensor([7])).exp()
        tensor([0.8750, 0.1250])
    """
    copies = torch.where(tokens == copied, F.logsigmoid(scores), -torch.inf)
    mixed = torch.logaddexp(F.logsigmoid(-scores) + own, copies)
    return torch.where(copied == OFF_PATH, own, mixed)


def copying_nats(
    model: PreTrainedModel,
    head: nn.Module,
    params: dict[str, Tensor],
    gate: CopyGate,
    batch: TokenBatch,
    copied: Tensor,
) -> Tensor:
    """-log p of each target token under the mixture, float32 (targets,).

    Args:
        model, head, params, batch: as of `cotune.tuning.answer_loss.answer_nats`.
        gate: on the device of `params`.
        copied: of each target token, int64 (targets,), rows one after the other; see `copied_tokens`.

    Raises:
        InputError: all labels are ignored.
    """
    with last_hidden(head) as hidden:
        logits, targets = answer_logits(model, head, params, batch)
    own, copied = -F.cross_entropy(logits, targets, reduction="none"), copied.to(targets.device)
    return -log_mixture(own, gate.scores(hidden[-1], _embedded(model, copied)), targets, copied)


@contextmanager
def copying(
    model: PreTrainedModel, gate: CopyGate, sources: Sequence[NDArray[np.int64]], choose: Choose
) -> Iterator[Choose]:
    """Inside, the next tokens of texts under the mixture, for `cotune.tuning.continuations`.

    Args:
        model: that writes.
        gate: on its device.
        sources: c of each text, with its end token; an empty one is nothing to copy.
        choose: takes log p of the mixture in the place of logits: its argmax, or `sampled`.

    Example:
        >>> with copying(model, gate, sources, lambda logits: logits.argmax(-1)) as choose:  # doctest: +SKIP
        ...     continuations(model, params, prompts, choose, max_new_tokens=64)
    """
    trails = [SourceTrail(source) for source in sources]
    with last_hidden(model.get_output_embeddings()) as hidden:

        def next_tokens(logits: Tensor) -> Tensor:
            copied = torch.tensor([trail.token for trail in trails], device=logits.device)
            scores = gate.scores(hidden[-1].flatten(0, -2), _embedded(model, copied))[:, None]
            tokens = torch.arange(logits.shape[-1], device=logits.device)
            own = logits.float().log_softmax(-1)
            chosen = choose(log_mixture(own, scores, tokens, copied[:, None]))
            for trail, token in zip(trails, chosen.tolist(), strict=True):
                trail.take(token)
            return chosen

        yield next_tokens


def _embedded(model: PreTrainedModel, copied: Tensor) -> Tensor:
    # Where there is no c_t any token does, as its score is not looked at.
    with torch.no_grad():
        embedded: Tensor = model.get_input_embeddings()(copied.clamp(min=0))
    return embedded


@contextmanager
def last_hidden(head: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, what the output embedding read last: a list of that one tensor, (..., hidden)."""
    read: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        read[:] = [args[0]]

    handle = head.register_forward_hook(keep)
    try:
        yield read
    finally:
        handle.remove()
