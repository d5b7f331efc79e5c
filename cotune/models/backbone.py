"""The frozen backbone: one forward pass gives the next token's logits and the taps that side networks read.

Hooks watch the residual stream, so that any decoder of Hugging Face transformers works unchanged: y_0 is the
input of its first layer, y_i the output of layer i, f the input of its output embedding. Nothing here ever has a
gradient. A backbone serves one thread at a time: the hooks write to one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.errors import InputError
from cotune.generation.output_basis import OutputBasis
from cotune.generation.protocols import RowWork, StepFeatures
from cotune.models.anatomy import BackboneSpec, attention_shape, decoder_layers, describe, output_embedding
from cotune.models.kv_pool import BLOCK_SIZE, KVPool
from cotune.models.largest import largest_ids
from cotune.models.lean_decoder import LeanDecoder
from cotune.models.low_bit import keep_differentiable, low_bit_placement
from cotune.models.packed_linear import PackedLinears
from cotune.models.packed_pass import (
    PROMPT_CHUNK,
    KVSequence,
    PackedPass,
    Piece,
    check_attention,
    packed_attention,
    pieces_of,
)
from cotune.models.projections import FILE_NAME, Projections
from cotune.models.row_invariance import attention_is_invariant, min_invariant_rows, padded_rows, products
from cotune.models.taps import Rows, StateRecorder, TapProjector
from cotune.models.weights import digest_folder, digest_model, find_model_folder, load_model, read_tokenizer
from cotune.wire.codec import quantise
from cotune.wire.description import CloudDescription
from cotune.wire.features import SequenceFeatures

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOAT16_MAX = 65504.0


@dataclass(frozen=True, kw_only=True)
class ForwardStates:
    """Everything about each position of a batch.

    Attributes:
        logits: float32 (batch, seq, vocab).
        hidden: f, float32 (batch, seq, hidden).
        taps: float32 (batch, seq, taps, tap_dim), not quantised.
        states: y at the tapped layers, float32 (batch, seq, taps, hidden).
    """

    logits: Tensor
    hidden: Tensor
    taps: Tensor
    states: Tensor


# Codes, int8 (..., taps, tap_dim), and scales, float16 (..., taps), of float32 taps.
QuantiseTaps = Callable[[NDArray[np.float32]], tuple[NDArray[np.int8], NDArray[np.float16]]]


class PassLeader(Protocol):
    """Tells other processes, which hold the other parts of the model, what to compute; see `tensor_parallel`."""

    def packed(
        self, pieces: Sequence[Piece], input_ids: NDArray[np.int64], rows: Sequence[int]
    ) -> AbstractContextManager[None]:
        """Within it all do this packed pass."""
        ...

    def batch(
        self, input_ids: NDArray[np.int64], is_target: NDArray[np.bool_], attention_mask: NDArray[np.int64] | None
    ) -> AbstractContextManager[None]:
        """Within it all do this pass over whole sequences."""
        ...


class Backbone:
    """A frozen causal language model with taps. Fits `DecodingBackbone` and `FeatureSource`.

    Attributes:
        model: the model, in evaluation mode, without gradients.
        spec: what it is.
        projections: the shared frozen matrices.
        tokenizer_json: the bytes of its `tokenizer.json`.
        kv_pool: keys and values of all sequences that decode.
        rows_are_independent: whether sequences in one pass leave each other's features alone to the last bit; known
            after the first.
        quantise_taps: int8, as served; another function, such as `quantise_int4`, is for studies.
        leader: tells other processes of each pass, where this one holds a part of the model only.

    Example:
        >>> backbone = Backbone.from_pretrained("starter")  # doctest: +SKIP
        >>> features = backbone.cursor().extend(np.array([1, 17, 4]))  # doctest: +SKIP
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer_json: bytes, projections: Projections | None, *, name: str, digest: str
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer_json = tokenizer_json
        self._head = output_embedding(model)
        self._made_lean: LeanDecoder | None = None
        self.spec = describe(model, self._head, tokenizer_json, name=name, digest=digest)
        if projections is None:
            projections = Projections.random(
                tap_layers=range(self.spec.num_layers + 1), hidden_size=self.spec.hidden_size
            )
        _check_fit(projections, self.spec)
        self.projections = projections
        self._recorder = StateRecorder(decoder_layers(model), self._head, projections.tap_layers)
        self._projector = TapProjector(projections, model.device)
        self.kv_pool = KVPool()
        self.quantise_taps: QuantiseTaps = quantise
        *_, self._narrowest = attention_shape(model)
        self.rows_are_independent = True
        self.leader: PassLeader | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        projections: Path | None = None,
        device_map: str | None = None,
        base_bits: int | None = None,
    ) -> Backbone:
        """Load a model folder, a hub name, or `starter`, the built-in model.

        Args:
            model: folders hold `config.json`, safetensors weights and `tokenizer.json`.
            dtype: `float32`, `bfloat16` or `float16`, of the weights in memory.
            device: a PyTorch device.
            projections: a file of `Projections.save`. Without it `projections.safetensors` in the model's folder
                is used, and without that random ones of seed 0.
            device_map: how accelerate spreads the layers over several devices, such as `auto`; None for one device.
            base_bits: 4 or 8 bits for each weight of the linear layers, see `models.low_bit`; None for whole ones.

        Raises:
            InputError: the model or the projections cannot be used; says why and what to do.
        """
        folder = find_model_folder(model)
        if projections is None and (folder / FILE_NAME).is_file():
            projections = folder / FILE_NAME
        digest = digest_folder(folder)
        if base_bits is not None and device_map is not None:
            raise InputError(f"base_bits is {base_bits} and device_map {device_map!r}, expected one of them; drop one")
        placement = None if device_map is None else {"device_map": device_map}
        if base_bits is not None:
            placement = low_bit_placement(base_bits, dtype=dtype, device=device)
        loaded = load_model(folder, dtype=dtype, device=device, placement=placement)
        if base_bits is not None:
            keep_differentiable(loaded)
        return cls(
            loaded,
            read_tokenizer(folder),
            None if projections is None else Projections.load(projections),
            name=model,
            digest=digest,
        )

    @classmethod
    def from_model(
        cls, model: PreTrainedModel, tokenizer_json: bytes, *, projections: Projections | None = None
    ) -> Backbone:
        """Wrap a model in memory. It is frozen and put into evaluation mode."""
        return cls(model, tokenizer_json, projections, name=type(model).__name__, digest=digest_model(model))

    @property
    def tap_layers(self) -> tuple[int, ...]:
        return self.projections.tap_layers

    @cached_property
    def output_basis(self) -> OutputBasis:
        """The shared output basis, Q = W_lm B."""
        return self._basis_of(self._head.weight.detach())

    def use_head(self, weight: Tensor) -> None:
        """Take the output basis from this head (vocab, hidden), where the model holds a part of its own only."""
        self.output_basis = self._basis_of(weight)

    def _basis_of(self, head: Tensor) -> OutputBasis:
        weight: NDArray[np.float32] = head.float().cpu().numpy()
        return self.projections.output_basis(weight)

    @cached_property
    def description(self) -> CloudDescription:
        """What a cloud tells devices about this model."""
        num_taps, tap_dim, _ = self.projections.taps.shape
        return CloudDescription(
            # The last part only: the path to it is the host's own business.
            model=self.spec.name.rstrip("/").rsplit("/", 1)[-1],
            backbone_digest=self.spec.backbone_digest,
            tokenizer_digest=self.spec.tokenizer_digest,
            projections_digest=self.projections.digest,
            basis_digest=self.output_basis.digest,
            vocab_size=self.spec.vocab_size,
            hidden_size=self.spec.hidden_size,
            num_taps=num_taps,
            tap_dim=tap_dim,
            basis_dim=self.output_basis.dim,
            max_context=self.spec.max_context,
            stop_token_ids=self.spec.eos_token_ids,
        )

    def cursor(self, num_prompt: int | None = None) -> BackboneCursor:
        """An empty sequence.

        Args:
            num_prompt: how many tokens are its prompt; None for those of the first `extend`.
        """
        return BackboneCursor(self, KVSequence(self.kv_pool, num_prompt))

    @property
    def prompt_chunk(self) -> int:
        """Prompts are read in pieces that end at multiples of this many tokens."""
        return PROMPT_CHUNK

    @property
    def block_size(self) -> int:
        """Tokens in a block of keys and values."""
        return BLOCK_SIZE

    @cached_property
    def _packed_linears(self) -> PackedLinears:
        return PackedLinears(self.model)

    @property
    def _lean(self) -> LeanDecoder | None:
        # None is not remembered: an adapter that is in the model now may leave it later, as other weights may.
        if self._made_lean is None or not self._made_lean.fits:
            self._made_lean = LeanDecoder.of(self.model, self.tap_layers) or self._made_lean
        return self._made_lean

    @cached_property
    def row_floor(self) -> int:
        """The fewest rows that a pass has, so that rows do not disturb each other; see `cotune.models.row_invariance`.

        Measured at the first use.

        Raises:
            InputError: this model's attention is of a kind that they do not compute.
        """
        check_attention(self.model)
        like = self._head.weight
        lean = self._lean
        if lean is not None and lean.fits:
            measured = min_invariant_rows([*lean.products, *self._projector.products(like)], like)
        else:
            with self._packed_linears.active():
                measured = min_invariant_rows([*products(self.model), *self._projector.products(like)], like)
        heads = attention_shape(self.model)
        self.rows_are_independent = measured is not None and attention_is_invariant(*heads, like)
        return measured or 1

    def extend(self, work: Sequence[RowWork], is_wanted: Callable[[], bool] | None = None) -> list[list[StepFeatures]]:
        """Read the next tokens of many sequences in one forward pass.

        What a sequence's features are does not depend on the others in the pass: to the last bit where
        `rows_are_independent`, else up to rounding.

        Args:
            work: for each sequence, once, its new tokens: one piece of its prompt, or any number of later tokens.
            is_wanted: asked after each tapped layer; False gives the pass up.

        Returns:
            For each item features of its last `num_outputs` positions.

        Raises:
            InputError: tokens that are unknown, too many for the context, or no one piece.
            CacheFullError: the pool has no room for them; no sequence has changed.
            StepAbandonedError: `is_wanted` said no; no sequence has changed.
        """
        floor = self.row_floor
        pieces: list[Piece] = []
        wanted: list[int] = []
        num_tokens = 0
        for item in work:
            sequence = item.cursor.sequence  # type: ignore[attr-defined]
            tokens = self.check_tokens(item.token_ids, sequence.length)
            if len(tokens) > 1 and next(pieces_of(sequence, tokens)) != tokens:
                raise InputError(
                    f"{len(tokens)} tokens from position {sequence.length} on are not one piece of a prompt of "
                    f"{sequence.num_prompt}, expected one that ends at a multiple of {PROMPT_CHUNK} or with the prompt"
                )
            sequence.make_room(len(tokens))
            pieces.append(Piece(sequence, tokens))
            num_tokens += len(tokens)
            wanted += range(num_tokens - item.num_outputs, num_tokens)
        num_rows = padded_rows(num_tokens, floor=floor, narrowest=self._narrowest)
        packed = PackedPass(self.kv_pool, pieces, num_rows, self.model.device)
        input_ids = np.full(packed.num_rows, self.spec.pad_token_id, np.int64)
        input_ids[:num_tokens] = [token for piece in pieces for token in piece.token_ids]
        # The head and the projections see the wanted rows alone, and have a floor of their own.
        num_wanted = padded_rows(len(wanted), floor=floor, narrowest=self._narrowest)
        # Where all tokens are wanted, the pass is padded alike, and no layer's rows have to be picked out.
        is_all = len(wanted) == num_tokens
        rows = list(range(num_rows)) if is_all else wanted + [0] * (num_wanted - len(wanted))
        leader = self.leader
        with torch.inference_mode(), nullcontext() if leader is None else leader.packed(pieces, input_ids, rows):
            # A pass of many ranks is not given up in the middle, where the others could not tell.
            logits, hidden, states = self.run_packed(packed, input_ids, rows, is_wanted if leader is None else None)
            taps = self._projector.project(states).cpu().numpy()
            base, final = _to_numpy(logits), _to_numpy(hidden)
        codes, scales = self.quantise_taps(taps[: len(wanted)])
        packed.finish()
        outputs: list[list[StepFeatures]] = []
        row = 0
        for item in work:
            # Copies: logits that are kept must not keep those of the whole pass.
            own = range(row, row + item.num_outputs)
            outputs.append(
                [
                    StepFeatures(
                        logits=base[i].copy(),
                        hidden=final[i].copy(),
                        taps=taps[i],
                        codes=codes[i],
                        scales=scales[i],
                    )
                    for i in own
                ]
            )
            row += item.num_outputs
        return outputs

    def run_packed(
        self,
        packed: PackedPass,
        input_ids: NDArray[np.int64],
        rows: list[int],
        is_wanted: Callable[[], bool] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The forward pass of `extend`, on this rank alone: logits (rows, vocab), f (rows, hidden), y of each tap.

        Args:
            packed: whose tokens they are.
            input_ids: int64 (tokens,), padded.
            rows: the wanted ones.
            is_wanted: asked after each tapped layer; False gives the pass up.
        """
        device = self.model.device
        ids, positions = torch.from_numpy(input_ids).to(device), torch.from_numpy(packed.positions).to(device)
        pick = _SomeRows(rows, packed.num_rows, device)
        lean = self._lean
        with torch.inference_mode():
            if lean is not None and lean.fits:
                logits, hidden, states = lean.run(ids, positions, packed, pick, is_wanted)
                return logits, hidden, torch.stack(states)
            with packed_attention(self.model), self._packed_linears.active():
                return self._run(
                    ids[None],
                    lambda all_states: pick(all_states[0]),
                    is_wanted=is_wanted,
                    position_ids=positions[None],
                    use_cache=False,
                    packed=packed,
                )

    def features(self, input_ids: NDArray[np.int64], first_target: int, top_k: int) -> SequenceFeatures:
        """Teacher-force one sequence; features to predict its positions first_target .. seq-1.

        Args:
            input_ids: int64 (seq,).
            first_target: index of the first target token, 1 <= first_target < seq.
            top_k: how many base logits to keep for each position; vocab_size or more keeps all.

        Raises:
            InputError: an index or token is out of range, or the sequence is too long.
        """
        return self.features_batch([(input_ids, first_target)], top_k)[0]

    def features_batch(self, sequences: Sequence[tuple[NDArray[np.int64], int]], top_k: int) -> list[SequenceFeatures]:
        """As `features`, for several (input_ids, first_target) in one forward pass."""
        if top_k < 1:
            raise InputError(f"top_k is {top_k}, expected at least 1")
        if not sequences:
            return []
        with torch.inference_mode():
            logits, hidden, states = self._teacher_forced(sequences)
            targets = np.concatenate([input_ids[first:] for input_ids, first in sequences]).astype(np.int64)
            taps = self._projector.project(states)
            together = _to_sequence_features(logits, hidden, taps, targets, top_k, self.quantise_taps)
        ends = np.cumsum([len(input_ids) - first for input_ids, first in sequences])
        return [_slice(together, start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def target_logits(self, sequences: Sequence[tuple[NDArray[np.int64], int]]) -> Tensor:
        """Logits to predict the positions first_target .. seq-1 of each (input_ids, first_target), from one pass.

        Returns:
            float32 (targets of all sequences in order, vocab), without a gradient.

        Raises:
            InputError: no sequence, an index or token out of range, or a sequence that is too long.
        """
        if not sequences:
            raise InputError("there are no sequences to predict, expected at least one")
        with torch.inference_mode():
            logits, _, _ = self._teacher_forced(sequences)
        # Out of the inference mode, so that others may compute with it.
        return logits.float().clone()

    def _teacher_forced(self, sequences: Sequence[tuple[NDArray[np.int64], int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (targets, vocab), f and y at the targets of all sequences."""
        for input_ids, first_target in sequences:
            if not 1 <= first_target < len(input_ids):
                raise InputError(
                    f"first_target is {first_target}, expected 1 to {len(input_ids) - 1} "
                    f"for a sequence of {len(input_ids)} tokens"
                )
            self.check_tokens(input_ids)
        # The last token is predicted, never read. Rows are padded on the right, where causal attention ignores them.
        width = max(len(input_ids) for input_ids, _ in sequences) - 1
        batch = np.full((len(sequences), width), self.spec.pad_token_id, np.int64)
        is_target = np.zeros(batch.shape, np.bool_)
        for row, (input_ids, first_target) in enumerate(sequences):
            batch[row, : len(input_ids) - 1] = input_ids[:-1]
            is_target[row, first_target - 1 : len(input_ids) - 1] = True
        with self._leading(batch, is_target):
            return self.run_batch(torch.from_numpy(batch), is_target)

    def forward_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ForwardStates:
        """Logits, final hidden states, taps and raw states of every position, from one pass without gradients.

        Args:
            input_ids: int64 (batch, seq).
            attention_mask: int64 (batch, seq), 0 where a row is padded; on the right.
        """
        batch, seq = input_ids.shape
        everything = np.ones((batch, seq), np.bool_)
        with torch.no_grad(), self._leading(input_ids.cpu().numpy(), everything, attention_mask):
            logits, hidden, states = self._run(input_ids, _all_rows, attention_mask=attention_mask)
            return ForwardStates(
                logits=logits.float().view(batch, seq, -1),
                hidden=hidden.float().view(batch, seq, -1),
                taps=self._projector.project(states).reshape(batch, seq, -1, self.projections.tap_dim),
                states=states.float().transpose(0, 1).reshape(batch, seq, len(states), -1),
            )

    def read_states(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Raw states float32 (seq, taps, hidden) and final hidden states float32 (seq, hidden) of one sequence."""
        tokens = self.check_tokens(input_ids)
        with torch.inference_mode(), self._leading(input_ids[None], np.ones((1, len(tokens)), np.bool_)):
            _, hidden, states = self._run(torch.tensor([tokens]), _all_rows)
            return _to_numpy(states.transpose(0, 1)), _to_numpy(hidden)

    def run_batch(
        self, input_ids: Tensor, is_target: NDArray[np.bool_], attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A pass over whole sequences (batch, seq), on this rank alone; as `run_packed`, at the targets."""
        mask = torch.from_numpy(is_target).to(self.model.device)
        with torch.inference_mode():
            return self._run(input_ids, lambda x: x[mask.to(x.device)], attention_mask=attention_mask)

    def _leading(
        self, input_ids: NDArray[np.int64], is_target: NDArray[np.bool_], attention_mask: Tensor | None = None
    ) -> AbstractContextManager[None]:
        if self.leader is None:
            return nullcontext()
        mask = None if attention_mask is None else attention_mask.cpu().numpy().astype(np.int64)
        return self.leader.batch(input_ids, is_target, mask)

    def check_tokens(self, token_ids: NDArray[np.int64], length: int = 0) -> list[int]:
        """The tokens as a list, if they can follow `length` others.

        Raises:
            InputError: none, unknown ones, or more than the context holds.
        """
        if token_ids.ndim != 1 or token_ids.dtype.kind != "i" or len(token_ids) == 0:
            raise InputError(
                f"token ids are {token_ids.dtype} {token_ids.shape}, expected int64 (seq,) with at least one token"
            )
        if length + len(token_ids) > self.spec.max_context:
            raise InputError(
                f"the sequence would have {length + len(token_ids)} tokens, the model's context holds "
                f"{self.spec.max_context}; shorten the prompt or max_new_tokens"
            )
        tokens: list[int] = token_ids.tolist()
        if min(tokens) < 0 or max(tokens) >= self.spec.vocab_size:
            raise InputError(
                f"token ids run from {min(tokens)} to {max(tokens)}, the vocabulary from 0 to "
                f"{self.spec.vocab_size - 1}; use the model's own tokenizer"
            )
        return tokens

    def _run(
        self, input_ids: Tensor, rows: Rows, *, is_wanted: Callable[[], bool] | None = None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (positions, vocab), f (positions, hidden) and y of each tap (taps, positions, hidden), at `rows`."""
        recorder = self._recorder
        recorder.start(rows, is_wanted)
        try:
            logits = self.model(input_ids=input_ids.to(self.model.device), **options).logits
        finally:
            hidden, states = recorder.stop()
        # Where layers are on several devices, all comes together on the first.
        device = self.model.device
        stacked = torch.stack([state.to(device) for state in states])
        return logits.flatten(0, -2).to(device), hidden.flatten(0, -2).to(device), stacked.flatten(1, -2)


class BackboneCursor:
    """One sequence in the backbone's key-value cache.

    Its blocks go back to the pool by `close`, or when nothing refers to the cursor any more.
    """

    def __init__(self, backbone: Backbone, sequence: KVSequence) -> None:
        self.sequence = sequence
        self._backbone = backbone
        self._closing = finalize(self, sequence.truncate, 0)

    @property
    def length(self) -> int:
        """How many tokens the cache holds."""
        return self.sequence.length

    def extend(self, token_ids: NDArray[np.int64], is_wanted: Callable[[], bool] | None = None) -> StepFeatures:
        """Append int64 (seq,) tokens, a prompt in pieces; features to predict the token after the last.

        Args:
            token_ids: int64 (seq,).
            is_wanted: asked after each tapped layer; False gives it up.

        Raises:
            InputError: no tokens, unknown ones, or more than the model's context holds.
            CacheFullError: the pool has no room for them.
            StepAbandonedError: `is_wanted` said no; the cursor is as before, or has read some pieces of a prompt.
        """
        tokens = self._backbone.check_tokens(token_ids, self.length)
        before = self.length, self.sequence.num_prompt
        features: list[StepFeatures] = []
        try:
            for piece in list(pieces_of(self.sequence, tokens)):
                work = RowWork(cursor=self, token_ids=np.array(piece, np.int64))
                (features,) = self._backbone.extend([work], is_wanted)
        except BaseException:
            self.sequence.truncate(before[0])
            self.sequence.num_prompt = before[1]
            raise
        return features[-1]

    def truncate(self, length: int) -> None:
        """Forget all tokens from index `length` on, as if they had never been read.

        Raises:
            InputError: `length` is negative or more than the cache holds.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"cannot truncate to {length} tokens, the cache holds {self.length}")
        self.sequence.truncate(length)

    def fork(self) -> BackboneCursor:
        """A second cursor at the same place; what one of them reads the other does not see."""
        return BackboneCursor(self._backbone, self.sequence.fork())

    def close(self) -> None:
        """Give the blocks back."""
        self._closing()


class _SomeRows:
    """Takes some rows out of a pass, as (rows, hidden) of (all, hidden)."""

    def __init__(self, rows: list[int], num_all: int, device: torch.device) -> None:
        self._index = None if rows == list(range(num_all)) else torch.tensor(rows, device=device)

    def __call__(self, states: Tensor) -> Tensor:
        return states if self._index is None else states.index_select(0, self._index.to(states.device))


def _all_rows(states: Tensor) -> Tensor:
    return states


def _to_numpy(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array


def _check_fit(projections: Projections, spec: BackboneSpec) -> None:
    if projections.hidden_size != spec.hidden_size or projections.tap_layers[-1] > spec.num_layers:
        raise InputError(
            f"the projections are for hidden size {projections.hidden_size} and layers up to "
            f"{projections.tap_layers[-1]}, the model has hidden size {spec.hidden_size} and {spec.num_layers} "
            "layers; fit projections for this model"
        )


def _to_sequence_features(
    logits: Tensor,
    hidden: Tensor,
    taps: Tensor,
    targets: NDArray[np.int64],
    top_k: int,
    quantise_taps: QuantiseTaps,
) -> SequenceFeatures:
    """All targets of a batch, one after the other."""
    logits = logits.float()
    target_ids = torch.from_numpy(targets).to(logits.device)
    k = min(top_k, logits.shape[-1])
    top_ids = largest_ids(logits, k)
    tap_codes, tap_scales = quantise_taps(taps.cpu().numpy())
    return SequenceFeatures(
        target_ids=targets,
        tap_codes=tap_codes,
        tap_scales=tap_scales,
        log_normalizer=logits.logsumexp(dim=-1).cpu().numpy(),
        target_logits=logits.gather(-1, target_ids[:, None])[:, 0].cpu().numpy(),
        top_ids=top_ids.cpu().numpy(),
        top_logits=logits.gather(-1, top_ids).cpu().numpy(),
        hidden=hidden.float().clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half().cpu().numpy(),
    )


def _slice(features: SequenceFeatures, start: int, end: int) -> SequenceFeatures:
    return SequenceFeatures(**{name: array[start:end] for name, array in vars(features).items()})
