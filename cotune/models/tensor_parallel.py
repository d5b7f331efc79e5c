"""A backbone in parts, one for each process: rank 0 serves, and the others do as it says.

Before each forward pass rank 0 tells all others its plan: token ids, blocks of keys and values, places, wanted rows.
Then every rank computes its part of every layer, with its own heads' keys and values in its own pool. Everything
else, from sessions to sampling, is on rank 0 alone, which uses its `Backbone` as if it were whole.

When nothing is to be computed, rank 0 says so now and then; a rank that hears nothing for a while, or whose
connection to another breaks, ends. So none outlives the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.errors import CotuneError, InputError
from cotune.models.backbone import Backbone
from cotune.models.kv_pool import KVPool
from cotune.models.packed_pass import KVSequence, PackedPass, Piece
from cotune.models.projections import FILE_NAME, Projections
from cotune.models.ranks import Ranks, RanksLostError
from cotune.models.shards import check_ranks, use_own_shards, whole_weight
from cotune.models.weights import digest_folder, find_model_folder, load_model, read_tokenizer


class Order(IntEnum):
    """What rank 0 says."""

    WAIT = 0
    PACKED = 1
    BATCH = 2
    END = 3


def load_shared(
    model: str, ranks: Ranks, *, dtype: str = "float32", device: str = "cpu", projections: Path | None = None
) -> Backbone:
    """Load this rank's part of a model. All ranks call it together; arguments as `Backbone.from_pretrained`.

    Raises:
        InputError: as `Backbone.from_pretrained`; or the ranks cannot share this model, or hold different ones.
        RanksLostError: another rank failed.
    """
    from transformers import AutoConfig
    from transformers.distributed import DistributedConfig

    folder = find_model_folder(model)
    check_ranks(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), ranks.num_ranks)
    digest = digest_folder(folder)
    if len({tuple(own) for own in ranks.agree(list(bytes.fromhex(digest)))}) > 1:
        raise InputError(f"the ranks found different weights under {model!r}; give all of them the same model")
    if projections is None and (folder / FILE_NAME).is_file():
        projections = folder / FILE_NAME
    plan = DistributedConfig(tp_size=ranks.num_ranks, tp_plan="auto")
    network = load_model(folder, dtype=dtype, device=device, placement={"distributed_config": plan})
    backbone = Backbone(
        network,
        read_tokenizer(folder),
        None if projections is None else Projections.load(projections),
        name=model,
        digest=digest,
    )
    head = whole_weight(network.get_output_embeddings())
    if ranks.rank == 0:
        # While the head is whole: devices know the basis by its bits.
        backbone.use_head(head)
    del head
    use_own_shards(network, ranks.rank, ranks.gather)
    _agree_on_rows(backbone, ranks)
    return backbone


@contextmanager
def shared_backbone(
    model: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    projections: Path | None = None,
    timeout_s: float = 60.0,
    on_lost: Callable[[], None] = lambda: None,
) -> Iterator[Backbone | None]:
    """A model that all processes which torchrun started share. Rank 0 gets the backbone, and the others end with it.

    Args:
        model, dtype, device, projections: as `Backbone.from_pretrained`.
        timeout_s: of every exchange between ranks.
        on_lost: called once, from any thread of rank 0, when the ranks have lost each other.

    Yields:
        The backbone on rank 0; None on the others, after all is done.

    Raises:
        InputError: the model cannot be loaded, or not be shared by so many.
        RanksLostError: another rank is gone.
    """
    ranks = Ranks(device, timeout_s=timeout_s)
    backbone = load_shared(model, ranks, dtype=dtype, device=device, projections=projections)
    if ranks.rank > 0:
        follow(backbone, ranks)
        yield None
    else:
        leader = Leader(backbone, ranks, on_lost)
        try:
            yield backbone
        finally:
            leader.end()
        if leader.lost is not None:
            raise leader.lost
    # Only here: leaving a group that is broken may wait for those who are gone.
    ranks.close()


def _agree_on_rows(backbone: Backbone, ranks: Ranks) -> None:
    """The same number of rows on all ranks, whatever each measured."""
    own = [backbone.row_floor, int(backbone.rows_are_independent)]
    floors, independent = zip(*ranks.agree(own), strict=True)
    backbone.row_floor, backbone.rows_are_independent = max(floors), all(independent)


class Leader:
    """Rank 0's side: a backbone that has one tells the other ranks of each pass. Fits `PassLeader`.

    Args:
        backbone: rank 0's part; its passes go through all ranks from now on.
        ranks: of the process.
        on_lost: called once, from any thread, when the ranks have lost each other.
    """

    def __init__(self, backbone: Backbone, ranks: Ranks, on_lost: Callable[[], None] = lambda: None) -> None:
        assert ranks.rank == 0
        self.lost: CotuneError | None = None
        self._ranks = ranks
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._copies: list[int] = []
        self._backbone = backbone
        backbone.kv_pool = _CopiesKept(self._copies, backbone.kv_pool.max_blocks)
        backbone.leader = self
        self._beat = threading.Thread(target=self._keep_waiting, name="cotune-ranks", daemon=True)
        self._beat.start()

    @contextmanager
    def packed(self, pieces: Sequence[Piece], input_ids: NDArray[np.int64], rows: Sequence[int]) -> Iterator[None]:
        """Within it all ranks do this packed pass."""
        sequences = [piece.sequence for piece in pieces]
        shapes = [
            (len(piece.token_ids), piece.sequence.length, piece.is_prompt, len(piece.sequence.blocks))
            for piece in pieces
        ]
        with self._together(
            Order.PACKED,
            [self._backbone.kv_pool.num_blocks],
            self._copies,
            input_ids,
            rows,
            np.array(shapes, np.int64).flatten(),
            np.concatenate([sequence.blocks for sequence in sequences]),
        ):
            self._copies.clear()
            yield

    @contextmanager
    def batch(
        self, input_ids: NDArray[np.int64], is_target: NDArray[np.bool_], attention_mask: NDArray[np.int64] | None
    ) -> Iterator[None]:
        """Within it all ranks do this pass over whole sequences."""
        mask = np.zeros(0, np.int64) if attention_mask is None else attention_mask.flatten()
        with self._together(Order.BATCH, input_ids.shape, input_ids.flatten(), is_target.flatten(), mask):
            yield

    def end(self) -> None:
        """Tell the other ranks to end."""
        self._ended.set()
        self._beat.join()
        self._backbone.leader = None
        if self.lost is None:
            with suppress(RanksLostError):
                self._send(Order.END)

    @contextmanager
    def _together(self, order: Order, *arrays: Sequence[int] | NDArray[np.generic]) -> Iterator[None]:
        with self._lock:
            if self.lost is not None:
                raise self.lost
            try:
                self._send(order, *arrays)
                yield
            except BaseException as error:
                # Wherever this happened, the others may be somewhere else in the pass.
                self._lose(error)
                raise

    def _send(self, order: Order, *arrays: Sequence[int] | NDArray[np.generic]) -> None:
        self._ranks.send([np.array([order], np.int64), *(np.asarray(array, np.int64) for array in arrays)])

    def _lose(self, error: BaseException) -> None:
        if isinstance(error, RanksLostError):
            self.lost = error
        else:
            self.lost = RanksLostError("a pass failed on rank 0 and the ranks are out of step; start them again")
        self._on_lost()

    def _keep_waiting(self) -> None:
        while not self._ended.wait(self._ranks.timeout_s / 6):
            with self._lock:
                if self.lost is not None:
                    return
                try:
                    self._send(Order.WAIT)
                except RanksLostError as error:
                    self._lose(error)


def follow(backbone: Backbone, ranks: Ranks) -> None:
    """Do what rank 0 says, until it says that this is the end.

    Raises:
        RanksLostError: rank 0 or another is gone.
    """
    while True:
        (order,), *arrays = ranks.receive()
        if order == Order.END:
            return
        if order == Order.PACKED:
            _follow_packed(backbone, *arrays)
        elif order == Order.BATCH:
            _follow_batch(backbone, *arrays)


def _follow_packed(
    backbone: Backbone,
    num_blocks: NDArray[np.int64],
    copies: NDArray[np.int64],
    input_ids: NDArray[np.int64],
    rows: NDArray[np.int64],
    shapes: NDArray[np.int64],
    blocks: NDArray[np.int64],
) -> None:
    pool = backbone.kv_pool
    pool.grow_to(int(num_blocks[0]))
    for source, target in copies.reshape(-1, 2).tolist():
        pool.copy(source, target)
    pieces: list[Piece] = []
    token, block = 0, 0
    for num_tokens, length, is_prompt, num_own in shapes.reshape(-1, 4).tolist():
        sequence = KVSequence(pool, length + 1 if is_prompt else 0)
        sequence.length, sequence.blocks = length, blocks[block : block + num_own].tolist()
        pieces.append(Piece(sequence, input_ids[token : token + num_tokens].tolist()))
        token, block = token + num_tokens, block + num_own
    packed = PackedPass(pool, pieces, len(input_ids), backbone.model.device)
    backbone.run_packed(packed, input_ids, rows.tolist())


def _follow_batch(
    backbone: Backbone,
    shape: NDArray[np.int64],
    input_ids: NDArray[np.int64],
    is_target: NDArray[np.int64],
    attention_mask: NDArray[np.int64],
) -> None:
    mask = torch.from_numpy(attention_mask.reshape(shape)) if len(attention_mask) else None
    backbone.run_batch(torch.from_numpy(input_ids.reshape(shape)), is_target.reshape(shape).astype(np.bool_), mask)


class _CopiesKept(KVPool):
    """A pool that keeps what it copied, for the pools of the other ranks."""

    def __init__(self, copies: list[int], max_blocks: int | None) -> None:
        super().__init__(max_blocks)
        self._copies = copies

    def copy(self, source: int, target: int) -> None:
        super().copy(source, target)
        self._copies += [source, target]
