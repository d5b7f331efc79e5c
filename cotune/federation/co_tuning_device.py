"""A device of co-tuning: a proxy and a small model of its own that teach each other, one of them in memory at a time.

In a round, with w the private domain adapter, t_G the shared one, and h the small model:

    the proxy      DST: w learns the device's texts, t_G frozen
                   what the proxy, with both, says of the texts goes to disk
    the small one  SAML: h learns the texts and the server's public ones, and from the proxy where that is better
                   what h now says of the device's texts goes to disk
    the proxy      SAML: t_G learns the texts, and from h where that is better; w is attached and frozen

so that what is special about the device's texts has its place in w, and t_G has what others can use. Of public texts
the proxy speaks without w: on the device's own ones it has only learnt what the texts say, on public ones it says what
the cloud's model and other devices taught it, and public questions without an answer it answers itself
(`cotune.federation.open_questions`). Between the lines the model is unloaded: never are two in memory, and optimiser
state is there for one alone. Both could learn in each step from the other as it is; here each learns from the other as
it was left.

What is sent is the change of t_G alone. w, h and the texts stay; `cotune.federation.device_store` keeps the first two.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.data.templates import Example
from cotune.distillation.byte_spans import ByteSpans
from cotune.distillation.chunk_gate import ChunkGate
from cotune.distillation.chunk_index import ChunkIndex
from cotune.distillation.chunk_likelihood import chunk_log_likelihoods
from cotune.distillation.mutual_loss import ChunkReadings, MutualLoss, MutualLossConfig
from cotune.distillation.paired_texts import PairedText, pair_texts
from cotune.errors import InputError
from cotune.federation.algorithm import Done, Job, Setting, Work
from cotune.federation.array_layout import from_layout
from cotune.federation.arrays import AnyArrays, Arrays, difference, digest
from cotune.federation.backbone_model import to_arrays
from cotune.federation.catch_up import under
from cotune.federation.causal_model import CausalModel
from cotune.federation.device_store import ROUNDS, DeviceStore
from cotune.federation.flora import fresh_adapter
from cotune.federation.folds import folds_in
from cotune.federation.local_model import LocalSteps
from cotune.federation.lora_factors import layer_names
from cotune.federation.mutual_descent import batches_of, descend_on, held_bytes, read_chunks
from cotune.federation.open_questions import Answering
from cotune.federation.open_questions import from_arrays as questions_from_arrays
from cotune.federation.public_chunks import TEXTS, from_arrays
from cotune.federation.reading_cache import ReadingCache
from cotune.federation.row_codes import RowCodes, dither_seed
from cotune.federation.small_model import SMALL, loaded_with, save_small_model
from cotune.file_cache import DEFAULT_MAX_BYTES
from cotune.models.low_rank_terms import LowRankTerm, Term, fold_low_rank, low_rank_terms
from cotune.tuning.answer_loss import only_rows
from cotune.tuning.gradient import GradientState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CO_TUNE, TELL = "co_tune", "tell_likelihoods"
LIKELIHOODS = "likelihoods"
# Settings: by whose name the change that is sent is dithered.
DITHER = "dither"
DOWN, UP = "down", "up"
PRIVATE = "private/"
PROXY_SIDE, SMALL_SIDE = 0, 1
_IN_PEFT = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class CoTuningSteps:
    """What a device does in a round; travels as settings of the task."""

    dst: LocalSteps
    """Of the private adapter."""
    proxy: LocalSteps
    """Of the shared adapter."""
    small: LocalSteps
    """Of the small model."""
    private_rank: int
    """Of the private adapter; 0: none, and no DST."""
    loss: MutualLossConfig
    """Of the small model, learning from the proxy."""
    proxy_mix: float
    """b, the share of the small model's word in what the proxy learns."""
    public_share: float
    """Of the texts in a step of the small model, those of the server, where it has any."""
    answering: Answering
    """Of the server's open questions, where it has any."""
    bits: int
    """Of a number of the adapter on the wire, see `RowCodes`."""

    @property
    def num_public(self) -> int:
        """Texts of the server in a step of the small model, where it has any."""
        return round(self.public_share * self.small.batch_size)

    def as_settings(self) -> dict[str, Setting]:
        """As a plan carries them."""
        found: dict[str, Setting] = {
            "private_rank": self.private_rank,
            "proxy_mix": self.proxy_mix,
            "public_share": self.public_share,
            "bits": self.bits,
            "gated": self.loss.gate is not None,
        }
        for part in ("dst", "proxy", "small"):
            found |= {f"{part}.{name}": value for name, value in asdict(getattr(self, part)).items()}
        found |= {f"loss.{name}": value for name, value in asdict(self.loss).items() if name != "gate"}
        found |= {f"answering.{name}": value for name, value in asdict(self.answering).items()}
        if self.loss.gate is not None:
            found |= {f"gate.{name}": value for name, value in asdict(self.loss.gate).items()}
        return found

    @classmethod
    def of_settings(cls, settings: Mapping[str, Setting]) -> CoTuningSteps:
        """Out of a plan.

        Raises:
            InputError: a value is missing or makes no sense.
        """

        def part(kind: Callable[..., Any], name: str) -> Any:
            own = {one.name for one in fields(kind)} - {"gate"}  # type: ignore[arg-type]
            return {each: settings[f"{name}.{each}"] for each in own}

        try:
            gate = ChunkGate(**part(ChunkGate, "gate")) if settings["gated"] else None
            return cls(
                dst=LocalSteps(**part(LocalSteps, "dst")),
                proxy=LocalSteps(**part(LocalSteps, "proxy")),
                small=LocalSteps(**part(LocalSteps, "small")),
                private_rank=int(settings["private_rank"]),
                loss=MutualLossConfig(gate=gate, **part(MutualLossConfig, "loss")),
                proxy_mix=float(settings["proxy_mix"]),
                public_share=float(settings["public_share"]),
                answering=Answering(**part(Answering, "answering")),
                bits=int(settings["bits"]),
            )
        except KeyError as error:
            raise InputError(
                f"the plan says nothing of {error}, expected it in its settings; use one version"
            ) from None


class CoTuningDevice:
    """The works of one device.

    Args:
        examples: its texts; they stay here.
        small: its own model, of any architecture and tokenizer.
        proxy: the model that all share; None on a device that has no room for it and tells likelihoods.
        folder: what it learns for itself, and readings; nobody else's.
        scale: s of the shared adapter.
        max_tokens: of one text, on either side; a model with a smaller context has the last word.
        max_cache_bytes: of readings on disk.

    Raises:
        InputError: a text has no answer, or a model or tokenizer cannot be used.

    Example:
        >>> device = CoTuningDevice(texts, small=CausalModel("my-model"), proxy=CausalModel("proxy"),
        ...                         folder=Path("kitchen"), scale=2.0)  # doctest: +SKIP
        >>> agent = DeviceAgent("kitchen", device, works=device.works, ...)  # doctest: +SKIP
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        small: CausalModel,
        proxy: CausalModel | None,
        folder: Path,
        scale: float,
        max_tokens: int = 256,
        max_cache_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        self._examples, self._small, self._proxy = list(examples), small, proxy
        self._scale, self._max_tokens, self._max_cache_bytes = scale, max_tokens, max_cache_bytes
        self.store = DeviceStore(folder / ROUNDS)
        self._readings_folder = folder / "readings"
        self._held = 0

    @property
    def num_examples(self) -> int:
        """Texts to learn from."""
        return len(self._examples)

    @property
    def works(self) -> Mapping[str, Work]:
        """By the names that plans of `coplms` carry."""
        return {CO_TUNE: self.co_tune, TELL: self.tell_likelihoods}

    @cached_property
    def texts(self) -> list[PairedText]:
        """Its texts, as the proxy and as the small model read them."""
        return self._paired(self._examples)

    @cached_property
    def _own_texts(self) -> list[PairedText]:
        """Its texts, as the small model reads them."""
        reader = self._small.reader
        return pair_texts(self._examples, reader, reader, max_tokens=self._small.fitting(self._max_tokens))

    def check(self) -> None:
        """Read all texts with both tokenizers, without loading a model.

        Raises:
            InputError: a text has no answer, or a model or tokenizer cannot be used.
        """
        _ = self._own_texts if self._proxy is None else self.texts

    @property
    def _own_proxy(self) -> CausalModel:
        if self._proxy is None:
            raise InputError(
                "the task asks for work with the proxy, which this device does not have; set its channel to "
                "'likelihoods', or give it the proxy"
            )
        return self._proxy

    def co_tune(self, job: Job) -> Done:
        """A round: DST, and SAML both ways."""
        steps = CoTuningSteps.of_settings(job.settings)
        codes, shapes = RowCodes(steps.bits), from_layout(job.arrays)
        shared = codes.decode(job.arrays, shapes, dither_seed(job.round_number, DOWN))
        folds = folds_in(job.arrays, shapes, codes)
        known = self.store.before(job.run_id, job.round_number) or {}
        private = self._private_before(known, shared, steps, job.batch_seed)
        small = under(SMALL, known)
        proxy_batches = batches_of(self.texts, steps.proxy, seed=job.batch_seed)
        self._held = 0
        ways = self._ways(steps)
        losses: dict[str, float] = {}

        from_proxy = None
        with self._loaded_proxy(folds) as proxy:
            if private:
                private, losses["dst_loss"] = self._dst(proxy, shared, private, steps, job.batch_seed)
            texts, batches = self._small_batches(job, steps, self._answered(proxy, shared, job, steps))
            if ways.to_small is not None:
                who = f"proxy {self._own_proxy.digest} {digest(job.arrays)} {digest(private)} {self._scale!r}"
                from_proxy = self._cache(who, ways.to_small)
                wanted = {number for batch in batches for number in batch}
                own = {number for number in wanted if number < len(self.texts)}
                for adapters, numbers in (([shared, private], own), ([shared], wanted - own)):
                    if numbers:
                        with self._with_terms(proxy, adapters):
                            self._fill(from_proxy, proxy, PROXY_SIDE, ways.to_small, texts, numbers, steps.proxy)
        from_small, readings = None, None if from_proxy is None else _readings_from(from_proxy, texts)
        with self._trained_small(
            small, texts, SMALL_SIDE, batches, steps.small, loss=ways.to_small, readings=readings
        ) as (model, small, losses["small_loss"]):
            if ways.to_proxy is not None:
                from_small = self._cache(f"small {self._small.digest} {digest(_as_numpy(small))}", ways.to_proxy)
                wanted = {number for batch in proxy_batches for number in batch}
                self._fill(from_small, model, SMALL_SIDE, ways.to_proxy, self.texts, wanted, steps.small)
        with self._loaded_proxy(folds) as proxy:
            after, losses["proxy_loss"] = self._descend_proxy(
                proxy,
                learning=shared,
                frozen=private,
                steps=steps.proxy,
                batches=proxy_batches,
                loss=ways.to_proxy,
                readings=None if from_small is None else _readings_from(from_small, self.texts),
            )
        kept = {PRIVATE + name: torch.from_numpy(array) for name, array in private.items()}
        self.store.save(job.run_id, job.round_number, kept | {SMALL + name: one for name, one in small.items()})
        # Everybody has moved: no reading is of any use any more.
        shutil.rmtree(self._readings_folder, ignore_errors=True)
        change = difference(after, shared)
        return Done(
            arrays=codes.encode(change, dither_seed(job.round_number, f"{UP} {job.settings[DITHER]}")),
            loss=losses["proxy_loss"],
            metrics={"held_bytes": float(self._held), **losses},
        )

    def tell_likelihoods(self, job: Job) -> Done:
        """The second channel: what the small model, which learns alone, says of public texts."""
        steps = CoTuningSteps.of_settings(job.settings)
        public, reader = from_arrays(job.arrays), self._small.reader
        known = self.store.before(job.run_id, job.round_number) or {}
        small = under(SMALL, known)
        most = self._small.fitting(self._max_tokens)
        batches = batches_of(self._own_texts, steps.small, seed=job.batch_seed)
        self._held, codes = 0, []
        with self._trained_small(small, self._own_texts, 0, batches, steps.small) as (model, small, loss):
            for text in public:
                spans = ByteSpans.of_text(
                    reader.tokenizer, text.text, reader.table, end_id=reader.end_id, max_tokens=most
                )
                aligned = text.aligned(spans)
                index = ChunkIndex.of_batch([aligned], 1).to(model.device)
                codes.append(text.codes(aligned, _likelihoods(model, spans, index)))
        self.store.save(job.run_id, job.round_number, {SMALL + name: one for name, one in small.items()})
        return Done(arrays={LIKELIHOODS: np.concatenate(codes)}, loss=loss, metrics={"held_bytes": float(self._held)})

    def save_small(self, run_id: str, folder: Path) -> None:
        """As `cotune.federation.small_model.save_small_model`."""
        save_small_model(self._small, self.store, run_id, folder)

    def _private_before(
        self, known: Mapping[str, Tensor], shared: Arrays, steps: CoTuningSteps, seed: int
    ) -> dict[str, NDArray[np.float32]]:
        """The private adapter: as it was, fresh, or none."""
        if steps.private_rank == 0:
            return {}
        found = {name: one.numpy() for name, one in under(PRIVATE, known).items()}
        return found or fresh_adapter(shared, steps.private_rank, seed)

    def _dst(
        self, proxy: PreTrainedModel, shared: Arrays, private: Arrays, steps: CoTuningSteps, seed: int
    ) -> tuple[dict[str, NDArray[np.float32]], float]:
        batches = batches_of(self.texts, steps.dst, seed=seed)
        return self._descend_proxy(
            proxy, learning=private, frozen=shared, steps=steps.dst, batches=batches, loss=None, readings=None
        )

    def _descend_proxy(
        self,
        proxy: PreTrainedModel,
        *,
        learning: Arrays,
        frozen: Arrays,
        steps: LocalSteps,
        batches: Sequence[Sequence[int]],
        loss: MutualLoss | None,
        readings: Callable[[int], ChunkReadings] | None,
    ) -> tuple[dict[str, NDArray[np.float32]], float]:
        """One of the two adapters learns, the other one is attached and frozen."""
        leaves = {name: torch.from_numpy(np.array(learning[name])).to(proxy.device) for name in sorted(learning)}
        state = GradientState.start(leaves, weight_decay=0.0)
        terms = [term_of(state.params)] + ([self._frozen_term(frozen, proxy)] if frozen else [])
        with low_rank_terms(proxy, terms, scale=self._scale):
            told = descend_on(proxy, state, self.texts, PROXY_SIDE, batches, steps, loss=loss, readings=readings)
        self._hold(proxy, state)
        return to_arrays(state.params), told

    def _ways(self, steps: CoTuningSteps) -> _Ways:
        """The losses of both directions; None where nothing is learnt from the other one."""
        tables = (self._own_proxy.reader.table, self._small.reader.table)
        own = {one.name: getattr(steps.loss, one.name) for one in fields(MutualLossConfig)}
        back = MutualLossConfig(**{**own, "mix": steps.proxy_mix})
        return _Ways(
            to_small=MutualLoss(steps.loss, tables[0], tables[1]) if steps.loss.mix > 0 else None,
            to_proxy=MutualLoss(back, tables[1], tables[0]) if back.mix > 0 else None,
        )

    def _cache(self, who: str, loss: MutualLoss) -> ReadingCache:
        both = f"{self._own_proxy.tokenizer_digest} {self._small.tokenizer_digest}"
        return ReadingCache(
            self._readings_folder, teacher=f"{who}\n{both}", config=loss.config, max_bytes=self._max_cache_bytes
        )

    def _fill(
        self,
        cache: ReadingCache,
        model: PreTrainedModel,
        side: int,
        loss: MutualLoss,
        texts: Sequence[PairedText],
        wanted: Collection[int],
        steps: LocalSteps,
    ) -> None:
        # Together as many as the model learns at once, which takes more memory than reading them.
        cache.fill(texts, wanted, lambda some: read_chunks(model, some, side, loss), at_once=steps.batch_size)
        self._hold(model)

    def _answered(self, proxy: PreTrainedModel, shared: Arrays, job: Job, steps: CoTuningSteps) -> list[PairedText]:
        """The open questions of this round that the proxy, without what is private, is sure of."""
        questions = questions_from_arrays(job.arrays) if steps.public_share else []
        if not questions:
            return []
        with self._with_terms(proxy, [shared]):
            chosen = steps.answering.chosen(questions, seed=job.batch_seed)
            own = self._own_proxy
            most = own.fitting(self._max_tokens)
            answered = steps.answering.answered(proxy, own.reader, chosen, max_tokens=most)
        return self._paired(answered) if answered else []

    def _small_batches(
        self, job: Job, steps: CoTuningSteps, answered: Sequence[PairedText]
    ) -> tuple[list[PairedText], list[list[int]]]:
        """What the small model learns: its own texts, public ones and answered questions, some of all in each step."""
        size, num_public = steps.small.batch_size, steps.num_public
        public = self._public(job.arrays) if num_public and TEXTS in job.arrays else []
        if not public and not answered:
            num_public = 0
        num_answered = steps.answering.part_of(num_public, public, answered)
        parts = ((self.texts, size - num_public), (public, num_public - num_answered), (answered, num_answered))
        texts: list[PairedText] = []
        batches: list[list[int]] = [[] for _ in range(steps.small.num_steps)]
        for own, num in parts:
            if own and num:
                drawn = batches_of(own, replace(steps.small, batch_size=num), seed=job.batch_seed)
                for batch, more in zip(batches, drawn, strict=True):
                    batch += [len(texts) + number for number in more]
            texts += own
        return texts, batches

    def _public(self, arrays: AnyArrays) -> list[PairedText]:
        """The server's texts, as the proxy and as the small model read them."""
        examples = [one.example() for one in from_arrays(arrays) if len(one.sizes)]
        return self._paired(examples) if examples else []

    def _paired(self, examples: Sequence[Example]) -> list[PairedText]:
        most = self._own_proxy.fitting(self._small.fitting(self._max_tokens))
        return pair_texts(examples, self._own_proxy.reader, self._small.reader, max_tokens=most)

    def _hold(self, model: PreTrainedModel, state: GradientState | None = None) -> None:
        self._held = max(self._held, held_bytes(model, state))

    @contextmanager
    def _loaded_proxy(self, folds: Mapping[int, Arrays]) -> Iterator[PreTrainedModel]:
        """The proxy with all that was folded into it, in the order of the rounds."""
        with self._own_proxy.loaded() as proxy:
            fold_all(proxy, folds, scale=self._scale)
            yield proxy

    def _loaded_small(self, own: Mapping[str, Tensor]) -> AbstractContextManager[PreTrainedModel]:
        """The small model with what it has learnt so far."""
        return loaded_with(self._small, own, of=self.store.folder)

    @contextmanager
    def _with_terms(self, proxy: PreTrainedModel, adapters: Sequence[Arrays]) -> Iterator[None]:
        terms = [self._frozen_term(one, proxy) for one in adapters if one]
        with low_rank_terms(proxy, terms, scale=self._scale):
            yield

    @contextmanager
    def _trained_small(
        self,
        own: Mapping[str, Tensor],
        texts: Sequence[PairedText],
        side: int,
        batches: Sequence[Sequence[int]],
        steps: LocalSteps,
        *,
        loss: MutualLoss | None = None,
        readings: Callable[[int], ChunkReadings] | None = None,
    ) -> Iterator[tuple[PreTrainedModel, dict[str, Tensor], float]]:
        """The small model after these steps, frozen and without optimiser state; its parameters, and the mean loss."""
        with self._loaded_small(own) as model:
            told = self._descend_small(model, texts, side, batches, steps, loss, readings)
            yield model, {n: one.detach().to("cpu", copy=True) for n, one in model.named_parameters()}, told

    def _descend_small(
        self,
        model: PreTrainedModel,
        texts: Sequence[PairedText],
        side: int,
        batches: Sequence[Sequence[int]],
        steps: LocalSteps,
        loss: MutualLoss | None,
        readings: Callable[[int], ChunkReadings] | None,
    ) -> float:
        """All of its parameters learn."""
        state = GradientState.inside(model, dict(model.named_parameters()), weight_decay=0.0)
        told = descend_on(model, state, texts, side, batches, steps, loss=loss, readings=readings)
        self._hold(model, state)
        model.requires_grad_(False)
        return told

    def _frozen_term(self, adapter: Arrays, model: PreTrainedModel) -> Term:
        return term_of({n: torch.from_numpy(np.array(array)).to(model.device) for n, array in adapter.items()})


def _readings_from(cache: ReadingCache, texts: Sequence[PairedText]) -> Callable[[int], ChunkReadings]:
    return lambda number: cache.get(texts[number])


@dataclass(frozen=True)
class _Ways:
    to_small: MutualLoss | None
    to_proxy: MutualLoss | None


def term_of(tensors: Mapping[str, Tensor]) -> dict[str, LowRankTerm]:
    """An adapter's tensors, named as in peft, as a term of the model itself.

    Example:
        >>> term_of({"base_model.model.h.q.lora_A.default.weight": torch.zeros(1, 2),
        ...          "base_model.model.h.q.lora_B.default.weight": torch.zeros(3, 1)})["h.q"].b.shape
        torch.Size([3, 1])
    """
    return {
        layer.removeprefix(_IN_PEFT): LowRankTerm(tensors[names.a], tensors[names.b])
        for layer, names in layer_names(sorted(tensors)).items()
    }


def fold_all(model: PreTrainedModel, folds: Mapping[int, Arrays], *, scale: float) -> None:
    """Fold what the rounds left out into the proxy's weights, one round after the other.

    Args:
        model: the proxy as it was downloaded.
        folds: by round, factors whose product counts s times.
        scale: s.
    """
    for _, factors in sorted(folds.items()):
        own = {name: torch.from_numpy(np.array(array)) for name, array in factors.items()}
        fold_low_rank(model, term_of(own), scale=scale)


@torch.no_grad()
def _likelihoods(model: PreTrainedModel, spans: ByteSpans, index: ChunkIndex) -> NDArray[np.float32]:
    ids = torch.from_numpy(spans.input_ids)[None, :-1].to(model.device)
    wanted = index.wanted((1, ids.shape[1]))
    if not len(index):
        return np.zeros(0, np.float32)
    with only_rows(model.get_output_embeddings(), wanted):
        logits = model(input_ids=ids, use_cache=False).logits
    found: NDArray[np.float32] = chunk_log_likelihoods(logits[None], index.among(wanted)).float().cpu().numpy()
    return found


def _as_numpy(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: one.float().numpy() for name, one in tensors.items()}
