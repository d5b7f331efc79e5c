"""FedMKT (Fan et al., arXiv 2406.02224): devices and cloud exchange what they say of a shared public set.

In each round, with top-k logits of every party at the positions that predict the public answers:

    device    L = CE on its own texts
              sends its top-k logits on the public texts, and its CE on each
    server    maps them to the cloud's tokens; for each text the target P is that of the party with the least CE, the
              cloud's own stale logits among them;  L = alpha CE + (1 - alpha) CE(P, p), in the cloud's adapter
              sends the cloud's top-k logits and its CE
    device    maps them to its tokens, chooses between them and its own the same way, and learns from the choice

`cotune.distillation.mapped_targets` holds the mapping, with the released code's off-by-one and
without. A CE is a mean over a party's own tokens, so that tokenizers with shorter tokens win; that is as
published. The public texts are downloaded once by every device, without those that some party has to cut where others
need not; logits go as float16 with int32 ids, at the answers' positions alone: fewer bytes than the whole data set that
the released code sends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.data.templates import Example
from cotune.distillation.mapped_targets import SparseTargets, TokenMap, WarpedText
from cotune.distillation.paired_texts import PairedText, pair_texts
from cotune.errors import InputError
from cotune.federation.comparison.party import BatchLoss, Party, target_logits
from cotune.federation.comparison.scene import CLOUD, Account, Scene, learn_at
from cotune.federation.comparison.seqkd import to_arrays as texts_to_arrays
from cotune.federation.mutual_descent import SideBatch
from cotune.federation.number_ranges import check_at_least

IDS, LOGITS, LOSSES = "ids", "logits", "losses"


@dataclass(frozen=True, eq=False)
class Said:
    """What a party says of the public texts.

    Attributes:
        ids: of each text int64 (targets, k), its likeliest tokens, by logit.
        logits: of each text float32 (targets, k).
        losses: float32 (texts,), its CE, nats per token.
    """

    ids: list[NDArray[np.int64]]
    logits: list[NDArray[np.float32]]
    losses: NDArray[np.float32]

    def as_arrays(self) -> dict[str, NDArray[Any]]:
        """As a message carries it: 6 bytes for each token, and 4 for each text."""
        return {
            IDS: np.concatenate(self.ids).astype("<i4").reshape(-1).view(np.uint8),
            LOGITS: np.concatenate(self.logits).astype("<f2").reshape(-1).view(np.uint8),
            LOSSES: self.losses,
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]], sizes: Sequence[int]) -> Said:
        """What `as_arrays` gave; `sizes` are the targets of each text."""
        ends, num = np.cumsum(sizes)[:-1], sum(sizes)
        ids, logits = arrays[IDS].view("<i4").reshape(num, -1), arrays[LOGITS].view("<f2").reshape(num, -1)
        return cls(
            list(np.split(ids.astype(np.int64), ends)), list(np.split(logits.astype(np.float32), ends)), arrays[LOSSES]
        )

    def own_targets(self) -> list[SparseTargets]:
        """As distributions over the party's own tokens."""
        return [SparseTargets.of_logits(ids, logits) for ids, logits in zip(self.ids, self.logits, strict=True)]


@dataclass(frozen=True, kw_only=True)
class FedMkt:
    """Mutual transfer by logits on public texts."""

    is_fixed: bool = True
    """Without the off-by-one of the released code."""
    top_k: int = 128
    """k."""
    ce_weight: float = 0.9
    """alpha."""

    def __post_init__(self) -> None:
        check_at_least(1, top_k=self.top_k)
        if not 0 <= self.ce_weight < 1:
            raise InputError(f"ce_weight is {self.ce_weight}, expected 0 to below 1; at 1 nothing is transferred")

    def rounds(self, scene: Scene, account: Account) -> Iterator[Mapping[str, Party]]:
        """As `Contestant`."""
        parties, most = scene.start(), scene.max_tokens
        own = {name: parties[name].read(site.examples, max_tokens=most) for name, site in scene.sites.items()}
        examples = whole_for_all(scene, parties)
        public = {name: parties[name].read(examples, max_tokens=most) for name in parties}
        ways = {name: _Way.between(scene, name, examples, self.is_fixed) for name in scene.sites}
        yield parties
        for number in range(1, scene.num_rounds + 1):
            learnt = {
                name: learn_at(scene, account, name, number, parties[name], own[name]) for name in scene.sites
            } | {CLOUD: parties[CLOUD]}
            said = {}
            for name in parties:
                with account.at(name):
                    said[name] = read_public(learnt[name], public[name], self.top_k)
            for name in scene.sites:
                if number == 1:
                    account.send_down(name, number, texts_to_arrays(examples), digest=scene.cloud.digest)
                came = account.send_up(name, number, said[name].as_arrays(), digest=scene.cloud.digest)
                said[name] = Said.of_arrays(came, [len(ids) for ids in said[name].ids])
            offers = {name: way.to_cloud(said[name]) for name, way in ways.items()}
            chosen = choose(said[CLOUD], [(offers[name], said[name].losses) for name in ways])
            learnt[CLOUD] = self._learn(scene, account, CLOUD, number, learnt[CLOUD], public[CLOUD], chosen)
            with account.at(CLOUD):
                told = read_public(learnt[CLOUD], public[CLOUD], self.top_k)
            for name, way in ways.items():
                came = account.send_down(name, number, told.as_arrays(), digest=scene.cloud.digest)
                heard = Said.of_arrays(came, [len(ids) for ids in told.ids])
                chosen = choose(said[name], [(way.from_cloud(heard), heard.losses)])
                learnt[name] = self._learn(scene, account, name, number, learnt[name], public[name], chosen)
            parties = learnt
            yield parties

    def _learn(
        self,
        scene: Scene,
        account: Account,
        name: str,
        number: int,
        party: Party,
        texts: Sequence[PairedText],
        chosen: Sequence[SparseTargets],
    ) -> Party:
        return learn_at(scene, account, name, number, party, texts, part=1, loss=self.loss(chosen))

    def loss(self, chosen: Sequence[SparseTargets]) -> BatchLoss:
        """alpha CE + (1 - alpha) CE(P, p), both as means over the batch's targets; `chosen` is by text."""

        def of_batch(numbers: Sequence[int], batch: SideBatch, logits: torch.Tensor) -> torch.Tensor:
            told = SparseTargets.joined([chosen[number] for number in numbers]).cross_entropy(logits)
            plain = torch.nn.functional.cross_entropy(logits.float(), batch.targets)
            return self.ce_weight * plain + (1 - self.ce_weight) * told

        return of_batch


def read_public(party: Party, texts: Sequence[PairedText], top_k: int) -> Said:
    """What a party says of the public texts now."""
    ids, values, losses = [], [], []
    with party.loaded() as model:
        for text in texts:
            logits, targets = target_logits(model, text, 0)
            top = logits.topk(min(top_k, logits.shape[1]))
            ids.append(top.indices.cpu().numpy())
            values.append(top.values.cpu().numpy())
            losses.append(float(torch.nn.functional.cross_entropy(logits, targets)))
    return Said(ids, values, np.array(losses, np.float32))


def whole_for_all(scene: Scene, parties: Mapping[str, Party]) -> list[Example]:
    """The public texts that no party has to cut where others need not; what is said of the others would not match.

    Raises:
        InputError: none is left.
    """
    most, examples = scene.max_tokens, scene.public
    readings = [parties[name].read(examples, max_tokens=most) for name in (CLOUD, *scene.sites)]
    readings += [_paired(scene, name, examples) for name in scene.sites]
    found = [
        example for example, *told in zip(examples, *readings, strict=True) if len({one.text for one in told}) == 1
    ]
    if not found:
        raise InputError(
            f"none of {len(examples)} public texts is read alike by all models, which cut them at {most} tokens of "
            "their own; raise max_tokens, or take shorter texts"
        )
    return found


def _paired(scene: Scene, name: str, examples: Sequence[Example]) -> list[PairedText]:
    """As the cloud's model and a device's read them."""
    cloud, small = scene.cloud, scene.sites[name].small
    return pair_texts(examples, cloud.reader, small.reader, max_tokens=cloud.fitting(small.fitting(scene.max_tokens)))


def choose(own: Said, offers: Sequence[tuple[Sequence[SparseTargets], NDArray[np.float32]]]) -> list[SparseTargets]:
    """For each text the targets of whoever has the least loss on it; the own ones where losses tie.

    Args:
        own: of the party itself, as it was before this round's transfer.
        offers: of each other party, mapped targets and its losses.
    """
    losses = np.stack([own.losses, *(told for _, told in offers)])
    candidates = [own.own_targets(), *(targets for targets, _ in offers)]
    # `argmin` takes the first of equals.
    return [candidates[who][number] for number, who in enumerate(losses.argmin(axis=0))]


@dataclass(frozen=True, eq=False)
class _Way:
    """Both ways between the cloud's tokens and one device's."""

    up: TokenMap
    down: TokenMap
    up_texts: list[WarpedText]
    down_texts: list[WarpedText]
    is_fixed: bool

    @classmethod
    def between(cls, scene: Scene, name: str, examples: Sequence[Example], is_fixed: bool) -> _Way:
        small = scene.sites[name].small
        texts = _paired(scene, name, examples)
        up, down = (TokenMap(a.reader.table, b.reader.table) for a, b in ((small, scene.cloud), (scene.cloud, small)))
        return cls(
            up,
            down,
            [up.warped(one, teacher=1) for one in texts],
            [down.warped(one, teacher=0) for one in texts],
            is_fixed,
        )

    def to_cloud(self, said: Said) -> list[SparseTargets]:
        return _matched(self.up, self.up_texts, said, self.is_fixed)

    def from_cloud(self, said: Said) -> list[SparseTargets]:
        return _matched(self.down, self.down_texts, said, self.is_fixed)


def _matched(mapped: TokenMap, texts: Sequence[WarpedText], said: Said, is_fixed: bool) -> list[SparseTargets]:
    return [
        mapped.matched(one, ids, logits, is_fixed=is_fixed)
        for one, ids, logits in zip(texts, said.ids, said.logits, strict=True)
    ]
