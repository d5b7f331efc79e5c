"""A copy gate: a model that has a source in front of it goes on with it, rewrites it, or writes a token of its own.

A pointer-generator (See, Liu and Manning, arXiv 1704.04368, equation 9) that points at the next tokens of one source:

    p(z_t | z_<t) = (1 - g_t) p_x(z_t | z_<t) + g_t sum_k alpha_k 1[z_t = c_(j+k)]          k = 0 .. AHEAD - 1
    g_t = sigmoid(w . u_t + v . a_t + b_o)            alpha = softmax_k(s_o . e(c_(j+k)) + r_(o,k))
    p_x = softmax(W_out (u_t + U D a_t))              a_t = [e(c_j); e(c_(j+1)); ...; e(c_(j+AHEAD-1))]

c is the source, its end token included; u_t the model's last hidden state, W_out its output embedding, e its input
embedding. j is where z stands in c: behind the token that z followed last. A token that is not c_j is looked for among
the `REACH` tokens from j on, and z stands behind it where it is found; where it is not, z is off c (o = 1, else 0)
and j stays, until z writes one of them. So a text may replace words of its source, insert some, leave some out, and go
on with the rest. Where c is over g_t is 0. What is learnt is w, v, b, s, r, U and D, beside the model's own. At the
start w, v, s and U are 0, and b and r such that what is written greedily is c.

Why a_t: where to leave a source, what for and where to go on is mostly a matter of what would be copied, and u_t only
tells what the model would write, which in a small model knows little of what comes next in c. With it a rule such as
"the user says person for human" takes some dozens of examples.

Why u_t and e have length 1 in all but W_out: the slope along w is then never longer than that along b, and a step of
Adam, which moves each number by its rate, moves the gate's logit by about sqrt(hidden) rates. That is enough to turn it
round in some dozens of steps at an adapter's rate; with vectors of numbers of size 1 it would be sqrt(hidden) times
that, and one step could throw it over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
"""Stands for a token of c where there is none."""
AHEAD = 8
"""Tokens of c from j on that may be copied, and that are looked at: about two words."""
REACH = 16
"""Tokens of c from j on among which z is looked for again: further on a word is likely another one."""
EDIT_RANK = 8
START_TRUST = (0.9, 0.5)
"""g at the start, on c and off it: above one half, so that what is written greedily is c, and below 1, so that the
model learns."""
START_NEXT = 6.0
"""r of c_j at the start, on c: e^6 times as likely as another place."""
GATE_FILE = "copy_gate.safetensors"
_FORMAT = "cotune copy gate 2"
# A logit that nothing outweighs, and that has slopes where all are like it.
_NEVER = -1e9


@dataclass(frozen=True)
class CopyGate:
    """What is learnt; the first dimension of `bias`, `place_weight` and `place_bias` is o: on c, off it.

    Attributes:
        weight: w, float32 (hidden,).
        ahead_weight: v, float32 (AHEAD hidden,).
        bias: b, float32 (2,).
        place_weight: s, float32 (2, hidden).
        place_bias: r, float32 (2, AHEAD).
        down, up: D and U, float32 (EDIT_RANK, AHEAD hidden) and (hidden, EDIT_RANK).

    Example:
        >>> CopyGate.fresh(4).num_parameters
        342
    """

    weight: Tensor
    ahead_weight: Tensor
    bias: Tensor
    place_weight: Tensor
    place_bias: Tensor
    down: Tensor
    up: Tensor

    @classmethod
    def fresh(cls, hidden_size: int, *, seed: int = 0) -> CopyGate:
        """What writes c; D is drawn."""
        tensors = {name: torch.zeros(shape) for name, shape in _shapes(hidden_size).items()}
        tensors["bias"] = torch.tensor(START_TRUST).logit()
        tensors["place_bias"][0, 0] = START_NEXT
        # D a_t has numbers of size 1, as a_t is sqrt(AHEAD) long.
        tensors["down"].normal_(0, 1 / math.sqrt(AHEAD), generator=torch.Generator().manual_seed(seed))
        return cls(**tensors)

    @classmethod
    def of(cls, numbers: Tensor, hidden_size: int) -> CopyGate:
        """The gate whose `tensors`, one behind the other, are these, float32 (num_parameters,)."""
        shapes = _shapes(hidden_size)
        parts = torch.split(numbers, [math.prod(shape) for shape in shapes.values()])
        return cls(**{name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)})

    @property
    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in _shapes(0)]

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors)

    def scores(self, hidden: Tensor, ahead: Tensor, is_off: Tensor) -> Tensor:
        """The logit of g: float32 (rows,).

        Args:
            hidden: u, float (rows, hidden), of any length.
            ahead: the embeddings in a, float32 (rows, AHEAD, hidden).
            is_off: o, int64 (rows,).
        """
        return (
            F.normalize(hidden.float(), dim=-1) @ self.weight + ahead.flatten(1) @ self.ahead_weight + self.bias[is_off]
        )

    def places(self, ahead: Tensor, is_off: Tensor, is_there: Tensor) -> Tensor:
        """log alpha, float32 (rows, AHEAD); `is_there`: bool (rows, AHEAD), where c has a token."""
        found = torch.einsum("rkh,rh->rk", ahead, self.place_weight[is_off]) + self.place_bias[is_off]
        return found.masked_fill(~is_there, _NEVER).log_softmax(-1)

    def edits(self, ahead: Tensor) -> Tensor:
        """U D a, float32 (rows, hidden)."""
        return ahead.flatten(1) @ self.down.T @ self.up.T

    def save(self, folder: Path) -> None:
        """Write `copy_gate.safetensors` into a folder that is there.

        Raises:
            InputError: it cannot be written.
        """
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _shapes(0)}
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
        shapes = {name: list(shape) for name, shape in _shapes(hidden_size).items()}
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


def _shapes(hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a gate, in their order."""
    return {
        "weight": (hidden_size,),
        "ahead_weight": (AHEAD * hidden_size,),
        "bias": (2,),
        "place_weight": (2, hidden_size),
        "place_bias": (2, AHEAD),
        "down": (EDIT_RANK, AHEAD * hidden_size),
        "up": (hidden_size, EDIT_RANK),
    }


class SourceTrail:
    """Where a text stands in its source, while the text is written.

    Args:
        source: c, int64, with its end token; an empty one is nothing to copy.

    Example:
        >>> trail = SourceTrail(np.array([5, 6, 7, 1]))
        >>> trail.take(5), trail.take(9), trail.is_off, trail.ahead[:3], trail.take(7), trail.ahead[:2]
        (None, None, True, [6, 7, 1], None, [1, -1])
    """

    def __init__(self, source: NDArray[np.int64]) -> None:
        self._source, self._place, self.is_off = source, 0, False

    @property
    def ahead(self) -> list[int]:
        """The next `AHEAD` tokens of c from j on, filled up with `OFF_PATH`."""
        found: list[int] = self._source[self._place : self._place + AHEAD].tolist()
        return found + [OFF_PATH] * (AHEAD - len(found))

    def take(self, token: int) -> None:
        """The text goes on with this token."""
        found = np.flatnonzero(self._source[self._place : self._place + REACH] == token)
        self.is_off = not len(found)
        if not self.is_off:
            self._place += int(found[0]) + 1


@dataclass(frozen=True)
class SourcePath:
    """Where the tokens of written texts stand in their sources, before each of them.

    Attributes:
        ahead: see `SourceTrail`, int64 (tokens, AHEAD).
        is_off: o, int64 (tokens,).

    Example:
        >>> path = SourcePath.of(np.array([5, 9, 7, 1]), np.array([5, 6, 7, 1]))
        >>> path.ahead[:, :2].tolist(), path.is_off.tolist()
        ([[5, 6], [6, 7], [6, 7], [1, -1]], [0, 0, 1, 0])
    """

    ahead: NDArray[np.int64]
    is_off: NDArray[np.int64]

    @classmethod
    def of(cls, written: NDArray[np.int64], source: NDArray[np.int64]) -> SourcePath:
        """Of one text, int64 (tokens,), and its source, with the end token."""
        trail, ahead, is_off = SourceTrail(source), list[list[int]](), list[bool]()
        for token in written.tolist():
            ahead.append(trail.ahead)
            is_off.append(trail.is_off)
            trail.take(token)
        return cls(np.array(ahead, np.int64).reshape(-1, AHEAD), np.array(is_off, np.int64))

    @classmethod
    def joined(cls, paths: Sequence[SourcePath]) -> SourcePath:
        """Of several texts, one behind the other."""
        return cls(np.concatenate([path.ahead for path in paths]), np.concatenate([path.is_off for path in paths]))

    def __len__(self) -> int:
        return len(self.is_off)

    @property
    def is_empty(self) -> bool:
        """Whether no text has a source."""
        return bool((self.ahead == OFF_PATH).all())


def log_mixture(own: Tensor, scores: Tensor, copied: Tensor, has_source: Tensor) -> Tensor:
    """log p of some tokens under the mixture, in logs throughout; all arguments broadcast together.

    Args:
        own: log p_x of the tokens, float.
        scores: logits of g there, float.
        copied: log of the alphas that point at them, float.
        has_source: bool; elsewhere p is p_x.

    Example:
        >>> own, copied = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
        >>> log_mixture(own, torch.tensor([3.0]).log(), copied, torch.tensor([True])).exp()
        tensor([0.8750, 0.1250])
    """
    mixed = torch.logaddexp(F.logsigmoid(-scores) + own, F.logsigmoid(scores) + copied)
    return torch.where(has_source, mixed, own)


def copying_nats(
    model: PreTrainedModel,
    head: nn.Module,
    params: dict[str, Tensor],
    gate: CopyGate,
    batch: TokenBatch,
    path: SourcePath,
) -> Tensor:
    """-log p of each target token under the mixture, float32 (targets,).

    Args:
        model, head, params, batch: as of `cotune.tuning.answer_loss.answer_nats`.
        gate: on the device of `params`.
        path: of all target tokens, rows one after the other.

    Raises:
        InputError: all labels are ignored.
    """
    view = _View.of(model, gate, path)
    with edited_head(head, lambda: gate.edits(view.embedded)) as hidden:
        logits, targets = answer_logits(model, head, params, batch)
    own = -F.cross_entropy(logits, targets, reduction="none")
    points = (view.ahead == targets[:, None]) & view.is_there
    copied = view.places(gate).masked_fill(~points, _NEVER).logsumexp(-1)
    return -log_mixture(own, view.scores(gate, hidden[-1]), copied, view.is_there[:, 0])


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

    def look() -> _View:
        ahead, is_off = [trail.ahead for trail in trails], [trail.is_off for trail in trails]
        return _View.of(model, gate, SourcePath(np.array(ahead, np.int64), np.array(is_off, np.int64)))

    with edited_head(model.get_output_embeddings(), lambda: gate.edits(look().embedded)) as hidden:

        def next_tokens(logits: Tensor) -> Tensor:
            view, own = look(), logits.float().log_softmax(-1)
            alphas = view.places(gate).exp() * view.is_there
            copied = torch.zeros_like(own).scatter_add(1, view.ahead.clamp(min=0), alphas).log()
            scores = view.scores(gate, hidden[-1].flatten(0, -2))[:, None]
            chosen = choose(log_mixture(own, scores, copied, view.is_there[:, :1]))
            for trail, token in zip(trails, chosen.tolist(), strict=True):
                trail.take(token)
            return chosen

        yield next_tokens


@dataclass(frozen=True)
class _View:
    """What a gate looks at, on its device: a path, and e of the tokens ahead, of length 1, or 0 where there is none."""

    ahead: Tensor
    is_off: Tensor
    is_there: Tensor
    embedded: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, gate: CopyGate, path: SourcePath) -> _View:
        ahead, is_off = (torch.from_numpy(each).to(gate.bias.device) for each in (path.ahead, path.is_off))
        is_there = ahead != OFF_PATH
        with torch.no_grad():
            vectors = model.get_input_embeddings()(ahead.clamp(min=0)).float()
            return cls(ahead, is_off, is_there, F.normalize(vectors, dim=-1) * is_there[..., None])

    def scores(self, gate: CopyGate, hidden: Tensor) -> Tensor:
        return gate.scores(hidden, self.embedded, self.is_off)

    def places(self, gate: CopyGate) -> Tensor:
        return gate.places(self.embedded, self.is_off, self.is_there)


@contextmanager
def edited_head(head: nn.Module, edits: Callable[[], Tensor]) -> Iterator[list[Tensor]]:
    """Inside, something is added to what an output embedding reads.

    Args:
        head: the output embedding.
        edits: of each pass, as many numbers as the head reads.

    Returns:
        What it would have read last: a list of that one tensor, (..., hidden).
    """
    read: list[Tensor] = []

    def edit(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read[:] = [args[0]]
        return (args[0] + edits().view_as(args[0]).to(args[0].dtype), *args[1:])

    handle = head.register_forward_pre_hook(edit)
    try:
        yield read
    finally:
        handle.remove()
