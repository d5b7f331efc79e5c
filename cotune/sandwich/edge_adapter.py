"""The edge behind the cloud as a language model with an adapter: it reads q and the cloud's answers and writes z.

Its loss is 1 - exp(-m / s), m the mean nats of the target's tokens and s `EdgeConfig.loss_nats`: for s = 1 one minus
the geometric mean of their probabilities. It lies in [0, 1], as a certificate needs, and has a gradient: that of m,
times exp(-m / s) / s, so that with s = 1 hopeless targets teach next to nothing, and a rule that the edge could learn
in dozens of examples is never begun. Gradients come by back-propagation; or, in the memory of inference, from
differences along random directions (MeZO), where there is too little memory for the first.

Unless told otherwise it has a copy gate (`cotune.tuning.copy_gate`) over c, the cloud's answers as they would be
without an edge: untrained it writes c, and what it learns is where to leave it and for what. x is the adapter's numbers
and then the gate's. Before and beside the cloud there is no c, and the gate has no part.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn

from cotune.data.batches import EncodedExample, encode_example, pad_batch
from cotune.data.templates import Example, format_request
from cotune.errors import InputError
from cotune.models.anatomy import num_multiplying
from cotune.models.backbone import Backbone
from cotune.sandwich.account import Account
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.bilevel.slopes import check_differences, estimate_slope
from cotune.sandwich.pipeline import JoinAnswers, MergeJob
from cotune.sandwich.rewrite_trials import Preference, questions_of
from cotune.sandwich.text_problem import Cell
from cotune.tuning.answer_loss import answer_nats
from cotune.tuning.attached import Attachable
from cotune.tuning.continuations import Choose, continuations, sampled
from cotune.tuning.copy_gate import CopyGate, SourcePath, copying, copying_nats
from cotune.tuning.preference_loss import preference_losses, text_log_probs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MERGE_TEMPLATE = "User: {request}\nAdvice: {answers}\nAssistant:"
DRAFT_TEMPLATE = "User: {request}\nAdvice: {answers}\nDraft: {draft}\nAssistant:"
REWRITE_TEMPLATE = "User: {request}\nWhat should be asked instead?\nAssistant:"
_NOTHING = np.zeros(0, np.int64)
_FIELD = re.compile(r"\{(request|answers|draft)\}")


@dataclass(frozen=True, kw_only=True)
class EdgeConfig:
    """How the edge reads, writes and learns."""

    template: str = MERGE_TEMPLATE
    """With {request}, {answers} and, where there is one, {draft}."""
    max_new_tokens: int = 64
    """Of an answer."""
    num_batch_sequences: int = 8
    """Read at once."""
    gradients: Literal["backprop", "zeroth_order"] = "backprop"
    """Where slopes come from."""
    smoothing_radius: float = 1e-2
    """mu, of zeroth_order."""
    num_directions: int = 4
    """q, of zeroth_order."""
    loss_nats: float = 4.0
    """s: at so many mean nats a target's loss is 1 - 1 / e."""
    copies: bool = True
    """Behind the cloud, go on with its answer or write by itself, by a gate that is learnt; else always by itself."""
    seed: int = 0
    """Of the directions."""

    def __post_init__(self) -> None:
        if "{answers}" not in self.template:
            raise InputError("the edge's template has no {answers}, expected where the cloud's answers stand")
        if self.gradients not in ("backprop", "zeroth_order"):
            raise InputError(f"gradients is {self.gradients!r}, expected backprop or zeroth_order")
        if not 0 < self.loss_nats < math.inf:
            raise InputError(f"loss_nats is {self.loss_nats}, expected a positive number")
        for name in ("max_new_tokens", "num_batch_sequences"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        check_differences(self.smoothing_radius, self.num_directions)


@dataclass(frozen=True)
class _Text:
    """What is read and learnt from, and where its target stands in the cloud's answer."""

    example: EncodedExample
    path: SourcePath


@dataclass(frozen=True)
class _Source:
    """c: its text, and its tokens as they would be written, with the end token."""

    text: str
    ids: NDArray[np.int64]

    def begins_with(self, ids: Sequence[int]) -> bool:
        """Whether these are its first tokens, or all of them."""
        return np.array_equal(self.ids[: len(ids)], ids)


@dataclass(frozen=True)
class _Weights:
    """x as tensors."""

    params: dict[str, Tensor]
    gate: CopyGate | None

    @property
    def tensors(self) -> list[Tensor]:
        """In the order of x."""
        return [*self.params.values(), *(self.gate.tensors if self.gate else [])]


@dataclass(frozen=True)
class _Batches:
    """Items in order, `size` of them at once; `losses` makes a number of each."""

    losses: Callable[[_Weights, slice], Tensor]
    num_items: int
    size: int
    num_tokens: int

    @property
    def parts(self) -> list[slice]:
        return [slice(start, min(start + self.size, self.num_items)) for start in range(0, self.num_items, self.size)]


class EdgeAdapter:
    """A backbone with an adapter, whose numbers are one vector; make it with `edge_adapter`.

    Fits `EdgeLosses`.
    """

    def __init__(
        self,
        backbone: Backbone,
        model: PreTrainedModel,
        fresh: Attachable,
        config: EdgeConfig,
        account: Account,
        gate: CopyGate | None = None,
    ) -> None:
        self._backbone, self._model, self.config = backbone, model, config
        self._gate = (gate or CopyGate.fresh(backbone.spec.hidden_size, seed=config.seed)) if config.copies else None
        self.count_in(account)
        self._shapes = {name: tensor.shape for name, tensor in fresh.params.items()}
        self._num_adapter = sum(shape.numel() for shape in self._shapes.values())
        self._start = self.numbers_of(fresh)
        self._like = next(iter(fresh.params.values()))
        self._head: nn.Module = model.get_output_embeddings()
        self._room = backbone.spec.max_context - fresh.num_virtual_tokens
        self._tokenizer = Tokenizer.from_str(backbone.tokenizer_json.decode())

    @property
    def name(self) -> str:
        """The model's digest, and how it reads, writes and learns."""
        return f"{self._backbone.spec.backbone_digest} {self.config}"

    def count_in(self, account: Account) -> None:
        """From now on, count tokens there, by this model's size; it is the account's own where no other is named."""
        self._num_parameters = num_multiplying(self._model) + (self._gate.num_parameters if self._gate else 0)
        account.num_edge_parameters = self._num_parameters
        self.account = account

    def start(self) -> Vector:
        """The untrained adapter, and the gate as it was given."""
        return self._start.copy()

    def numbers_of(self, adapter: Attachable) -> Vector:
        """Another adapter's numbers in this one's order: x where that one is to work; the gate is the untrained one.

        Raises:
            InputError: it is of another shape.
        """
        if {name: tensor.shape for name, tensor in adapter.params.items()} != self._shapes:
            raise InputError("the adapter has other tensors than the edge's own, expected the same rank and layers")
        whole = _Weights({name: adapter.params[name] for name in self._shapes}, self._gate)
        return np.concatenate([tensor.detach().double().cpu().numpy().ravel() for tensor in whole.tensors])

    def gate(self, x: Vector) -> CopyGate | None:
        """The copy gate with these numbers; None where nothing is copied."""
        if self._gate is None:
            return None
        values = torch.from_numpy(x[self._num_adapter :].copy()).to(dtype=torch.float32, device=self._model.device)
        return CopyGate.of(values, self._backbone.spec.hidden_size)

    def params(self, x: Vector) -> dict[str, Tensor]:
        """The adapter's tensors with these numbers."""
        tensors, place = {}, 0
        for name, shape in self._shapes.items():
            size = shape.numel()
            values = torch.from_numpy(x[place : place + size].copy()).reshape(shape)
            tensors[name] = values.to(dtype=self._like.dtype, device=self._model.device)
            place += size
        return tensors

    def losses(self, x: Vector, cells: Sequence[Cell]) -> Vector:
        """Without learning from them."""
        return self._forward(x, self._batches([self._encode(cell) for cell in cells], self._losses))

    def gradient(self, x: Vector, cells: Sequence[Cell], weights: Vector, step: int) -> tuple[Vector, Vector]:
        """The losses, and the slope of their weighted sum; see `EdgeConfig.gradients`."""
        return self._gradient(x, self._batches([self._encode(cell) for cell in cells], self._losses), weights, step)

    def gradient_after(
        self, x: Vector, pairs: Sequence[tuple[str, str]], weights: Vector, step: int
    ) -> tuple[Vector, Vector]:
        """As `gradient`, of texts that shall follow others.

        Args:
            pairs: what is read, and what shall be written after it.
        """
        return self._gradient(x, self._batches(self._encode_after(pairs), self._losses), weights, step)

    def log_probs_after(self, x: Vector, pairs: Sequence[tuple[str, str]]) -> Vector:
        """log p of each whole text after what is read before it, nats, its end included: float64 (pairs,)."""
        return self._forward(x, self._batches(self._encode_after(pairs), self._log_probs))

    def preference_losses(
        self, x: Vector, preferences: Sequence[Preference], reference: Vector, *, beta: float
    ) -> Vector:
        """Of each preference, without learning from them; see `cotune.tuning.preference_loss`.

        Args:
            reference: log p of the better and the worse text of each under the reference, float64 (preferences, 2).
            beta: how strongly the reference holds.
        """
        return self._forward(x, self._preferred(preferences, reference, beta))

    def preference_gradient(
        self, x: Vector, preferences: Sequence[Preference], reference: Vector, step: int, *, beta: float
    ) -> tuple[Vector, Vector]:
        """The same losses, and the slope of their mean; at least two texts are read at once."""
        weights = np.full(len(preferences), 1 / len(preferences))
        return self._gradient(x, self._preferred(preferences, reference, beta), weights, step)

    def _preferred(self, preferences: Sequence[Preference], reference: Vector, beta: float) -> _Batches:
        texts = [(each.read, text) for each in preferences for text in (each.better, each.worse)]
        encoded = self._encode_after(texts)

        def losses(weights: _Weights, part: slice) -> Tensor:
            log_probs = self._log_probs(weights, encoded[2 * part.start : 2 * part.stop]).reshape(-1, 2)
            return preference_losses(log_probs, torch.from_numpy(reference[part]).to(log_probs), beta=beta)

        size = max(1, self.config.num_batch_sequences // 2)
        return _Batches(losses, len(preferences), size, sum(len(each.example.input_ids) for each in encoded))

    def _batches(self, encoded: Sequence[_Text], losses: Callable[[_Weights, Sequence[_Text]], Tensor]) -> _Batches:
        """A text is an item."""
        num_tokens, size = sum(len(each.example.input_ids) for each in encoded), self.config.num_batch_sequences
        return _Batches(lambda weights, part: losses(weights, encoded[part]), len(encoded), size, num_tokens)

    def _forward(self, x: Vector, batches: _Batches) -> Vector:
        self.account.edge(forward_tokens=batches.num_tokens, num_parameters=self._num_parameters)
        whole = self._weights(x)
        with torch.no_grad():
            return torch.cat([batches.losses(whole, part) for part in batches.parts]).double().cpu().numpy()

    def _gradient(self, x: Vector, batches: _Batches, weights: Vector, step: int) -> tuple[Vector, Vector]:
        if self.config.gradients == "zeroth_order":
            losses = self._forward(x, batches)
            slope = estimate_slope(
                lambda z: float(weights @ self._forward(z, batches)),
                x,
                smoothing_radius=self.config.smoothing_radius,
                num_directions=self.config.num_directions,
                generator=np.random.default_rng((self.config.seed, step)),
            )
            return losses, slope
        self.account.edge(backward_tokens=batches.num_tokens, num_parameters=self._num_parameters)
        whole, found = self._weights(x), list[Tensor]()
        for tensor in whole.tensors:
            tensor.requires_grad_()
        for part in batches.parts:
            losses_here = batches.losses(whole, part)
            torch.autograd.backward(torch.dot(torch.from_numpy(weights[part]).to(losses_here), losses_here))
            found.append(losses_here.detach())
        slope = np.concatenate(
            [
                np.zeros(tensor.numel()) if tensor.grad is None else tensor.grad.double().cpu().numpy().ravel()
                for tensor in whole.tensors
            ]
        )
        return torch.cat(found).double().cpu().numpy(), slope

    def write(self, x: Vector, jobs: Sequence[MergeJob]) -> list[str]:
        """z of each job, greedily, not yet restored; c as it is where all that was written is c.

        So an answer of the cloud that is longer than `max_new_tokens` is not cut: these are the edge's own.
        """
        prompts = [self._prompt(job) for job in jobs]
        sources = [self._source(prompt, job) for prompt, job in zip(prompts, jobs, strict=True)]
        return self._write(x, prompts, _greedy, sources)

    def write_after(self, x: Vector, prompts_as_text: Sequence[str]) -> list[str]:
        """What the edge writes after each text, greedily; of a text that is too long its end is read.

        Raises:
            InputError: no room is left for a text beside what shall be written.
        """
        return self._write(x, prompts_as_text, _greedy)

    def sample_after(self, x: Vector, prompts_as_text: Sequence[str], *, temperature: float, seed: int) -> list[str]:
        """As `write_after`, drawn at a temperature above 0; the same seed gives the same texts."""
        return self._write(x, prompts_as_text, sampled(torch.Generator().manual_seed(seed), temperature))

    def _write(
        self, x: Vector, prompts_as_text: Sequence[str], choose: Choose, sources: Sequence[_Source | None] | None = None
    ) -> list[str]:
        whole, texts, size = self._weights(x), list[str](), self.config.num_batch_sequences
        prompts, stops = [self._ids(text) for text in prompts_as_text], self._backbone.spec.eos_token_ids
        sources = sources or [None] * len(prompts)
        for start in range(0, len(prompts), size):
            batch, behind = prompts[start : start + size], sources[start : start + size]
            num_tokens = sum(map(len, batch))
            with self._choice(whole.gate, behind, choose) as mixed:
                written = continuations(
                    self._model,
                    whole.params,
                    batch,
                    mixed,
                    max_new_tokens=self.config.max_new_tokens,
                    stop_token_ids=stops,
                )
            for ids, source in zip(written, behind, strict=True):
                own = ids[:-1] if ids[-1] in stops else ids
                num_tokens += len(own)
                if source is not None and source.begins_with(ids):
                    texts.append(source.text)
                else:
                    texts.append(self._tokenizer.decode(own, skip_special_tokens=True).strip())
            self.account.edge(forward_tokens=num_tokens, num_parameters=self._num_parameters)
        return texts

    def _choice(
        self, gate: CopyGate | None, sources: Sequence[_Source | None], choose: Choose
    ) -> AbstractContextManager[Choose]:
        if gate is None or not any(sources):
            return nullcontext(choose)
        return copying(self._model, gate, [each.ids if each else _NOTHING for each in sources], choose)

    def _losses(self, weights: _Weights, batch: Sequence[_Text]) -> Tensor:
        nats, lengths = self._nats(weights, batch)
        return 1 - torch.exp(-torch.stack([each.mean() for each in torch.split(nats, lengths)]) / self.config.loss_nats)

    def _log_probs(self, weights: _Weights, batch: Sequence[_Text]) -> Tensor:
        return text_log_probs(*self._nats(weights, batch))

    def _nats(self, weights: _Weights, batch: Sequence[_Text]) -> tuple[Tensor, list[int]]:
        """-log p of all target tokens, read at once, and how many each text has."""
        padded = pad_batch([each.example for each in batch], self._backbone.spec.pad_token_id)
        lengths, path = [len(each.path) for each in batch], SourcePath.joined([each.path for each in batch])
        if weights.gate is None or path.is_empty:
            return answer_nats(self._model, self._head, weights.params, padded), lengths
        return copying_nats(self._model, self._head, weights.params, weights.gate, padded, path), lengths

    def _weights(self, x: Vector) -> _Weights:
        return _Weights(self.params(x), self.gate(x))

    def _encode_after(self, pairs: Sequence[tuple[str, str]]) -> list[_Text]:
        encoded = [self._encode_pair(Example(before, f" {after}")) for before, after in pairs]
        return [self._text(each, None) for each in encoded]

    def _encode(self, cell: Cell) -> _Text:
        prompt = self._prompt(cell.job)
        encoded = self._encode_pair(Example(prompt, f" {cell.example.target}"))
        return self._text(encoded, self._source(prompt, cell.job))

    def _text(self, encoded: EncodedExample, source: _Source | None) -> _Text:
        target = encoded.input_ids[encoded.first_target :]
        return _Text(encoded, SourcePath.of(target, source.ids if source else _NOTHING))

    def _source(self, prompt: str, job: MergeJob) -> _Source | None:
        """c, in the tokens in which a target of the same text would be learnt; None where there is none."""
        if self._gate is None or not (job.answers or job.tool_runs):
            return None
        # What is written is stripped, so that the spaces around c are of no use.
        text = JoinAnswers().merge(job).strip()
        encoded = self._encode_pair(Example(prompt, f" {text}"), max_length=sys.maxsize)
        return _Source(text, encoded.input_ids[encoded.first_target :])

    def _encode_pair(self, example: Example, max_length: int | None = None) -> EncodedExample:
        eos, length = self._backbone.spec.eos_token_ids, max_length or self._room
        return encode_example(self._tokenizer, example, eos_token_id=eos[0], max_length=length)

    def _prompt(self, job: MergeJob) -> str:
        fields = {"request": job.request, "answers": "\n".join(job.answers), "draft": job.draft or ""}
        return _FIELD.sub(lambda match: fields[match[1]], self.config.template)

    def _ids(self, text: str) -> NDArray[np.int64]:
        ids = np.array(self._tokenizer.encode(text).ids, np.int64)
        room = self._room - self.config.max_new_tokens
        if room < 1:
            raise InputError(f"max_new_tokens is {self.config.max_new_tokens}, which leaves no room for a prompt")
        return ids[-room:]


def _greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


@contextmanager
def edge_adapter(
    backbone: Backbone,
    fresh: Attachable,
    config: EdgeConfig,
    *,
    account: Account | None = None,
    gate: CopyGate | None = None,
) -> Iterator[EdgeAdapter]:
    """Inside, the backbone has the adapter attached; afterwards it is as before.

    Args:
        backbone: serves nobody else meanwhile.
        fresh: an adapter of its own, such as LoRA; its numbers are x to begin with.
        config: how it reads, writes and learns.
        account: counts its tokens; None: a new one.
        gate: its numbers are x too, where something is copied; None: an untrained one.

    Example:
        >>> fresh = LoraAdapter.fresh(backbone.model, LoraShape())  # doctest: +SKIP
        >>> with edge_adapter(backbone, fresh, EdgeConfig()) as edge:  # doctest: +SKIP
        ...     edge.write(edge.start(), [MergeJob("Hi", ("Be kind.",))])
    """
    with fresh.attach(backbone.model) as model:
        yield EdgeAdapter(backbone, model, fresh, config, account or Account(), gate)


@dataclass(frozen=True)
class EdgeRewriter:
    """The stage before the cloud with these numbers: one question a line; an empty answer leaves the request as it is.

    Example:
        >>> Pipeline(redactor, gate, config, rewriter=EdgeRewriter(edge, edge.start()))  # doctest: +SKIP
    """

    edge: EdgeAdapter
    x: Vector
    template: str = REWRITE_TEMPLATE

    def rewrite(self, redacted: str) -> list[str]:
        """What to ask instead; it goes through the redactor again."""
        (written,) = self.edge.write_after(self.x, [self.template.replace("{request}", redacted)])
        return questions_of(written)


@dataclass(frozen=True)
class EdgeDrafter:
    """The stage beside the cloud with these numbers."""

    edge: EdgeAdapter
    x: Vector

    def draft(self, request: str) -> str:
        """Its own answer to q."""
        return self.edge.write_after(self.x, [format_request(request)])[0]


@dataclass(frozen=True)
class EdgeMerger:
    """The last stage of a pipeline with these numbers."""

    edge: EdgeAdapter
    x: Vector

    def merge(self, job: MergeJob) -> str:
        """z, not yet restored."""
        return self.edge.write(self.x, [job])[0]
