"""One decoding step of a batch on random weights, three ways: with taps, without, and transformers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from measurement import Timed, time_call
from torch import Tensor
from transformers import DynamicCache

from cotune.generation.protocols import RowWork, StepFeatures
from cotune.models.anatomy import attention_shape, decoder_layers, output_embedding
from cotune.models.backbone import Backbone
from cotune.models.packed_pass import PackedPass, Piece, packed_attention
from cotune.models.row_invariance import padded_rows
from cotune.models.taps import StateRecorder

TAPS, PLAIN, THEIRS = "with taps", "without taps", "transformers"


class PlainStep:
    """The pass of `Backbone.extend` without what taps need."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        # The same products on the same weights.
        self._lean: Any = copy.copy(backbone._lean)
        if self._lean is None:
            model = backbone.model
            self._recorder = StateRecorder(decoder_layers(model), output_embedding(model), ())
        else:
            self._lean._is_tapped = [False] * len(self._lean._is_tapped)

    def __call__(self, work: Sequence[RowWork]) -> list[np.ndarray]:
        """Logits of each row, after one more token each."""
        backbone = self._backbone
        pieces = []
        for item in work:
            sequence = item.cursor.sequence  # type: ignore[attr-defined]
            tokens = backbone.check_tokens(item.token_ids, sequence.length)
            sequence.make_room(len(tokens))
            pieces.append(Piece(sequence, tokens))
        num = len(pieces)
        num_rows = padded_rows(num, floor=backbone.row_floor, narrowest=backbone._narrowest)
        device = backbone.model.device
        packed = PackedPass(backbone.kv_pool, pieces, num_rows, device)
        input_ids = np.full(num_rows, backbone.spec.pad_token_id, np.int64)
        input_ids[:num] = [token for piece in pieces for token in piece.token_ids]
        ids, positions = torch.from_numpy(input_ids).to(device), torch.from_numpy(packed.positions).to(device)
        with torch.inference_mode():
            logits = self._logits(ids, positions, packed).float().cpu().numpy()
        packed.finish()
        # Copies, as `extend` makes them: a row's logits outlive the pass.
        return [logits[i].copy() for i in range(num)]

    def _logits(self, ids: Tensor, positions: Tensor, packed: PackedPass) -> Tensor:
        if self._lean is not None:
            logits, _, _ = self._lean.run(ids, positions, packed, lambda states: states, None)
            return logits
        self._recorder.start(lambda states: states)
        try:
            model = self._backbone.model
            with packed_attention(model), self._backbone._packed_linears.active():
                options = {"position_ids": positions[None], "use_cache": False, "packed": packed}
                return model(input_ids=ids[None], **options).logits[0]
        finally:
            self._recorder.stop()


class BatchStep:
    """One decoding step of a batch of sequences of the same length; afterwards all is as before.

    Args:
        backbone: random weights do.
        batch, context: sequences, and tokens in the cache of each.
        seed: of tokens, keys and values.
    """

    def __init__(self, backbone: Backbone, batch: int, context: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._backbone, self._context = backbone, context
        self._cursors = [backbone.cursor(context) for _ in range(batch)]
        for index, cursor in enumerate(self._cursors):
            _fill(backbone, cursor.sequence, context, seed + index)
        self._tokens = rng.integers(0, backbone.spec.vocab_size, (batch, 1))
        self._work = [RowWork(cursor=c, token_ids=t) for c, t in zip(self._cursors, self._tokens, strict=True)]
        self._plain = PlainStep(backbone)
        self._cache: DynamicCache | None = None

    def features(self) -> list[StepFeatures]:
        """What `extend` gives of each row."""
        features = [of_row[0] for of_row in self._backbone.extend(self._work)]
        self._back()
        return features

    def logits(self) -> list[np.ndarray]:
        """What the step without taps gives of each row."""
        logits = self._plain(self._work)
        self._back()
        return logits

    def calls(self, *, theirs: bool) -> dict[str, Timed]:
        """What to time, by name."""
        calls = {
            TAPS: self._timed(lambda: self._backbone.extend(self._work), self._back),
            PLAIN: self._timed(lambda: self._plain(self._work), self._back),
        }
        if theirs:
            calls[THEIRS] = self._timed(self._their_step, lambda: self._their_cache().crop(-1))
        return calls

    def close(self) -> None:
        """Give the cache back."""
        for cursor in self._cursors:
            cursor.close()

    def _timed(self, step: Callable[[], object], back: Callable[[], object]) -> Timed:
        wait = waiter(self._backbone.model.device)

        def run() -> None:
            step()
            wait()

        timed = time_call(run)

        def step_and_back() -> float:
            wait()
            seconds = timed()
            back()
            return seconds

        return step_and_back

    def _back(self) -> None:
        for cursor in self._cursors:
            cursor.truncate(self._context)

    def _their_step(self) -> None:
        model: Any = self._backbone.model
        with torch.inference_mode():
            ids = torch.from_numpy(self._tokens).to(model.device)
            model(input_ids=ids, past_key_values=self._their_cache()).logits.float().cpu().numpy()

    def _their_cache(self) -> DynamicCache:
        if self._cache is None:
            model = self._backbone.model
            self._cache = DynamicCache(config=model.config)
            _, kv_heads, head_dim = attention_shape(model)
            shape = (len(self._cursors), kv_heads, self._context, head_dim)
            for layer in range(self._backbone.spec.num_layers):
                keys, values = random_pair(shape, model, layer)
                self._cache.update(keys, values, layer)
        return self._cache


def _fill(backbone: Backbone, sequence: Any, num_tokens: int, seed: int) -> None:
    """Keys and values of `num_tokens` tokens that nobody read."""
    model, pool = backbone.model, backbone.kv_pool
    _, kv_heads, head_dim = attention_shape(model)
    sequence.make_room(num_tokens)
    size = backbone.block_size
    own = np.arange(num_tokens)
    slots = torch.from_numpy(np.asarray(sequence.blocks)[own // size] * size + own % size).to(model.device)
    with torch.inference_mode():
        for layer in range(backbone.spec.num_layers):
            pool.write(layer, slots, *random_pair((num_tokens, kv_heads, head_dim), model, seed + layer))
    sequence.length = sequence.num_prompt = num_tokens


def random_pair(shape: tuple[int, ...], model: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Two tensors of normal numbers, in the model's type and place."""
    generator = torch.Generator(model.device).manual_seed(seed)
    options = {"generator": generator, "device": model.device, "dtype": model.dtype}
    with torch.inference_mode():
        return torch.randn(shape, **options), torch.randn(shape, **options)


def waiter(device: torch.device) -> Callable[[], None]:
    """Waits until the device has done its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None
