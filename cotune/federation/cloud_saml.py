"""SAML on the server: the cloud's model and the proxy, which have one tokenizer, teach each other on public texts.

With KL over the teacher's top k tokens and the rest as one event:

    L_cloud = (1 - a_0) CE + a_0 T^2 KL(p_proxy || p_cloud) + l sum_c g (L_chunk of what device c told) / chunks
    L_proxy = (1 - b_0) CE + b_0 T^2 KL(p_cloud || p_proxy) + the same

With `gated`, the divergence at each target token has the weight of `cotune.distillation.chunk_gate`, the token being
the chunk, so that a weak proxy cannot pull the cloud's model. The teacher's side is a constant in each. Both learn in
every step, from the other one as it is: a server has room for both. What devices of the second channel told counts
where they are better, by the same gate.

Open questions are answered by the proxy as it came from the devices, see `cotune.federation.open_questions`. From those
that it is sure of the cloud's model learns, answer and KL. The proxy, whose own words they are, learns them only with
`rehearses`, so that public texts do not make it forget what devices taught it (learning without forgetting, Li and
Hoiem, arXiv 1606.09282; by its answers here, not by all its probabilities).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cotune.data.templates import Example
from cotune.distillation.chunk_gate import ChunkGate
from cotune.distillation.chunk_index import ChunkIndex
from cotune.distillation.chunk_likelihood import chunk_divergence, chunk_log_likelihoods
from cotune.distillation.paired_texts import PairedText, pair_texts
from cotune.distillation.token_kl import token_divergence
from cotune.errors import MismatchError
from cotune.federation.annealed import at_rate
from cotune.federation.arrays import Arrays
from cotune.federation.backbone_model import MAX_GRAD_NORM, to_arrays
from cotune.federation.causal_model import CausalModel
from cotune.federation.co_tuning_device import fold_all, term_of
from cotune.federation.coplms import CloudSettings, CloudTuned
from cotune.federation.local_model import LocalSteps
from cotune.federation.mutual_descent import SideBatch, batches_of, take
from cotune.federation.open_questions import Answering
from cotune.federation.public_chunks import PublicText, Told, told_of
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.low_rank_terms import low_rank_terms
from cotune.tuning.gradient import GradientState

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CloudSaml:
    """The server's models and texts; each is loaded while it works.

    Args:
        settings: how they learn.
        cloud: the large model.
        proxy: as it was downloaded by the devices.
        examples: public texts.
        proxy_scale: s of the proxy's adapter.
        max_tokens: of one text.
        loss_tau: tau of the chunks that devices told.
        questions: that the proxy is asked.
        answering: of these; by default as `Answering`.
        gate: of chunks that devices told, None counts every chunk fully; and of the two models, where the settings are
            gated.
        seed: of the order of texts and of the cloud's adapter.

    Raises:
        MismatchError: the two models have different tokenizers or vocabularies.
        InputError: a text has no answer.

    Example:
        >>> half = CloudSaml(settings.cloud, cloud=CausalModel("big"), proxy=CausalModel("proxy"), examples=public,
        ...                  proxy_scale=2.0)  # doctest: +SKIP
    """

    def __init__(
        self,
        settings: CloudSettings,
        *,
        cloud: CausalModel,
        proxy: CausalModel,
        examples: Sequence[Example],
        proxy_scale: float,
        max_tokens: int = 256,
        loss_tau: float = 2.0,
        gate: ChunkGate | None = None,
        questions: Sequence[str] = (),
        answering: Answering | None = None,
        seed: int = 0,
    ) -> None:
        self.questions, self._answering = questions, answering or Answering()
        self._settings, self._cloud, self._proxy = settings, cloud, proxy
        self._proxy_scale, self._tau, self._gate, self._seed = proxy_scale, loss_tau, gate, seed
        sizes = [len(one.reader.table) for one in (cloud, proxy)]
        if cloud.tokenizer_digest != proxy.tokenizer_digest or sizes[0] != sizes[1]:
            raise MismatchError(
                f"the cloud's model {cloud.name} has tokenizer {cloud.tokenizer_digest[:12]} with {sizes[0]} tokens "
                f"and the proxy {proxy.name} {proxy.tokenizer_digest[:12]} with {sizes[1]}, expected the same; make "
                "the proxy from the cloud's model with cotune compress --distill"
            )
        most = proxy.fitting(cloud.fitting(max_tokens))
        self._sizes = torch.tensor([len(piece or b"") for piece in proxy.reader.table.pieces])
        self._texts, self._most = pair_texts(examples, proxy.reader, proxy.reader, max_tokens=most), most
        self._shape = LoraShape(rank=settings.rank, alpha=settings.alpha)

    @cached_property
    def public(self) -> list[PublicText]:
        """What devices of the second channel are given."""
        return [PublicText.of(one) for one in self._texts]

    def start(self) -> dict[str, NDArray[np.float32]]:
        """A fresh adapter of the cloud's model."""
        with self._cloud.loaded() as model:
            return to_arrays(LoraAdapter.fresh(model, self._shape, seed=self._seed).params)

    def tune(
        self,
        *,
        proxy: Arrays,
        cloud: Arrays,
        folds: Mapping[int, Arrays],
        told: Sequence[NDArray[np.float32]],
        round_number: int,
        rate_share: float = 1.0,
    ) -> CloudTuned:
        """As `cotune.federation.coplms.CloudHalf` says."""
        own, ends = at_rate(self._settings, rate_share), np.cumsum([0, *(one.num_slots for one in self.public)])
        by_text = [
            [told_of(text, values[ends[i] : ends[i + 1]]) for values in told] for i, text in enumerate(self._texts)
        ]
        seed = int(np.random.SeedSequence((self._seed, round_number)).generate_state(1)[0])
        with self._cloud.loaded() as large, self._proxy.loaded() as small:
            fold_all(small, folds, scale=self._proxy_scale)
            sides = [
                _Learner(large, _state_of(cloud, large, own.steps), self._shape.scale, own.mix),
                _Learner(small, _state_of(proxy, small, own.steps), self._proxy_scale, own.proxy_mix),
            ]
            answered = self._answered(sides[1], seed)
            num_answered = self._answering.part_of(own.steps.batch_size, self._texts, answered)
            batches = batches_of(self._texts, _of_size(own.steps, own.steps.batch_size - num_answered), seed=seed)
            asked = batches_of(answered, _of_size(own.steps, num_answered), seed=seed) if num_answered else []
            totals = np.zeros(2)
            for place, numbers in enumerate(batches):
                others = [answered[number] for number in asked[place]] if asked else []
                totals += self._step(sides, numbers, by_text, others)
            after = [to_arrays(one.state.params) for one in sides]
        means = totals / len(batches)
        return CloudTuned(
            proxy=after[1],
            cloud=after[0],
            shown={
                "cloud_loss": float(means[0]),
                "proxy_loss": float(means[1]),
                **({"answered": float(len(answered))} if self.questions else {}),
            },
        )

    def _answered(self, proxy: _Learner, seed: int) -> list[PairedText]:
        """The open questions of this round that the proxy is sure of."""
        chosen, reader = self._answering.chosen(self.questions, seed=seed), self._proxy.reader
        if not chosen:
            return []
        with torch.no_grad(), proxy.attached():
            answered = self._answering.answered(proxy.model, reader, chosen, max_tokens=self._most)
        return pair_texts(answered, reader, reader, max_tokens=self._most) if answered else []

    def _step(
        self,
        sides: Sequence[_Learner],
        numbers: Sequence[int],
        by_text: Sequence[Sequence[Told]],
        answered: Sequence[PairedText],
    ) -> NDArray[np.float64]:
        """One step of both on public texts, and of who learns them on answered questions; their losses, nats."""
        batch = SideBatch.of([self._texts[number] for number in numbers], 0, sides[0].model.device)
        logits = [one.logits(batch) for one in sides]
        losses = []
        for own, other, side in ((0, 1, sides[0]), (1, 0, sides[1])):
            value = self._mutual_loss(side, batch, logits[own], logits[other], gated=self._settings.gated)
            if self._settings.told_weight > 0:
                value = value + self._settings.told_weight * self._told_loss(batch, logits[own], numbers, by_text)
            losses.append(value)
        if answered:
            asked = SideBatch.of(answered, 0, sides[0].model.device)
            rehearses = self._settings.rehearses
            with torch.set_grad_enabled(rehearses):
                theirs = sides[1].logits(asked)
            share = len(answered) / (len(numbers) + len(answered))
            # No gate: what would tell which of the two is better is what the proxy said.
            value = self._mutual_loss(sides[0], asked, sides[0].logits(asked), theirs, gated=False)
            losses[0] = (1 - share) * losses[0] + share * value
            if rehearses:
                losses[1] = (1 - share) * losses[1] + share * asked.answer_loss(theirs)
        for side, value in zip(sides, losses, strict=True):
            side.state.descend(value, max_grad_norm=MAX_GRAD_NORM)
        return np.array([float(value.detach()) for value in losses])

    def _mutual_loss(self, side: _Learner, batch: SideBatch, own: Tensor, other: Tensor, *, gated: bool) -> Tensor:
        """(1 - a) CE + a T^2 KL of one model, whose logits are `own`, by the other one's, nats."""
        value = (1 - side.mix) * batch.answer_loss(own)
        if side.mix > 0:
            mine, theirs = (one[batch.target_places] for one in (own, other))
            told = token_divergence(
                theirs.detach().to(mine.device),
                mine,
                top_k=self._settings.top_k,
                temperature=self._settings.temperature,
            )
            if gated:
                told = told * self._gates(theirs, mine, batch.targets)
            value = value + side.mix * told.mean()
        return value

    @torch.no_grad()
    def _gates(self, theirs: Tensor, mine: Tensor, targets: Tensor) -> Tensor:
        """g of each target, by how likely both find it."""
        told, own = (
            -F.cross_entropy(one.float(), targets.to(one.device), reduction="none").to(mine.device)
            for one in (theirs, mine)
        )
        gate = self._gate or ChunkGate()
        return gate(told, own, self._sizes.to(mine.device)[targets.to(mine.device)])

    def _told_loss(
        self, batch: SideBatch, logits: Tensor, numbers: Sequence[int], by_text: Sequence[Sequence[Told]]
    ) -> Tensor:
        """The mean over devices of the gated L_chunk; zero without any."""
        total = logits.sum() * 0.0
        num_devices = len(by_text[0])
        for device in range(num_devices):
            said = [by_text[number][device] for number in numbers]
            index = ChunkIndex.of_batch([one.alignment for one in said], 0).to(logits.device).among(batch.wanted)
            if not len(index):
                continue
            own = chunk_log_likelihoods(logits[None], index)
            theirs = torch.from_numpy(np.concatenate([one.log_likelihoods for one in said])).to(own)
            gates = torch.ones_like(own) if self._gate is None else self._gate(theirs, own, index.num_bytes)
            total = total + (gates.detach() * chunk_divergence(theirs, own, tau=self._tau)).mean()
        return total / max(num_devices, 1)


@dataclass
class _Learner:
    """One of the two models."""

    model: PreTrainedModel
    state: GradientState
    scale: float
    mix: float

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model with its adapter as it is now."""
        with low_rank_terms(self.model, [term_of(self.state.params)], scale=self.scale):
            yield

    def logits(self, batch: SideBatch) -> Tensor:
        with self.attached():
            return batch.logits(self.model)


def _of_size(steps: LocalSteps, batch_size: int) -> LocalSteps:
    # Public texts are in every step, as the proxy learns from nothing else.
    return replace(steps, batch_size=max(1, batch_size))


def _state_of(adapter: Arrays, model: PreTrainedModel, steps: LocalSteps) -> GradientState:
    # Sorted, as the norm that gradients are clipped to is a sum, and a state from a checkpoint has another order.
    leaves = {name: torch.from_numpy(np.array(adapter[name])).to(model.device) for name in sorted(adapter)}
    state = GradientState.start(leaves, weight_decay=0.0)
    take(state, steps)
    return state
