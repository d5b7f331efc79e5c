"""Calibration: which texts a model is compressed with, and what its linear layers read of them.

Pruning and quantising one linear layer y = W x needs to know its inputs. They are measured block by block, each after
the blocks before it were compressed, as SparseGPT (arXiv 2301.00774), Wanda (arXiv 2306.11695) and GPTQ
(arXiv 2210.17323) do, so that later layers can make up for what earlier ones lost. All layers of one block are measured
before any of them changes.

Of a layer's inputs X, (rows, in), only the Gram matrix X^T X is kept. Memory beside the model: the residual stream of
all texts at one block, and the Gram matrices of that block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from cotune.data.records import read_examples
from cotune.errors import InputError
from cotune.models.anatomy import decoder_layers
from cotune.models.low_bit import is_low_bit

HEAD = "the head"


@dataclass(frozen=True, eq=False)
class CalibrationTexts:
    """Texts of one length, without padding.

    Attributes:
        input_ids: int64 (num_texts, length).
    """

    input_ids: NDArray[np.int64]

    @classmethod
    def from_texts(
        cls,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        *,
        num_texts: int = 128,
        length: int = 512,
        seed: int = 0,
        eos_token_id: int | None = None,
        takes_fewer: bool = False,
    ) -> CalibrationTexts:
        """Cut texts into pieces, put pieces of many texts one after another, and cut these into rows.

        Every text gives one piece of at most `length` tokens before any gives a second one, so that a few long texts
        do not push the others out. Texts and their pieces come in an order drawn by `seed`; no piece comes twice.

        Args:
            texts: natural texts. Only as many are encoded as are needed.
            tokenizer: of the model; it puts its special tokens as usual.
            num_texts, length: how many rows, and the tokens in each.
            seed: of the draw.
            eos_token_id: put behind each text; None puts nothing.
            takes_fewer: whether fewer rows than `num_texts` will do, one at least.

        Raises:
            InputError: a size is below 1, or there are too few tokens.

        Example:
            >>> from tokenizers import Tokenizer, models, pre_tokenizers
            >>> tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
            >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            >>> texts = ["a b a", "b b", "a a a a"]
            >>> CalibrationTexts.from_texts(texts, tokenizer, num_texts=2, length=3).input_ids.shape
            (2, 3)
        """
        for name, size in (("num_texts", num_texts), ("length", length)):
            if size < 1:
                raise InputError(f"{name} is {size}, expected at least 1")
        wanted = num_texts * length
        tokens: list[int] = []
        for piece in _pieces(texts, tokenizer, length, Random(seed), eos_token_id):
            tokens += piece
            if len(tokens) >= wanted:
                return cls(np.array(tokens[:wanted], np.int64).reshape(num_texts, length))
        if takes_fewer and len(tokens) >= length:
            return cls(np.array(tokens[: len(tokens) // length * length], np.int64).reshape(-1, length))
        raise InputError(
            f"the calibration texts have {len(tokens)} tokens, expected num_texts * length = {num_texts} * {length} = "
            f"{wanted}; give more texts, or a smaller num_texts or length"
        )

    @classmethod
    def read(
        cls,
        path: Path | str,
        tokenizer_json: bytes,
        *,
        template: str | None = None,
        num_texts: int = 128,
        length: int = 512,
        seed: int = 0,
        eos_token_id: int | None = None,
        takes_fewer: bool = False,
    ) -> CalibrationTexts:
        """As `from_texts`, of a file or data set that `cotune.data.read_examples` reads.

        Args:
            path: see `read_examples`; a text is prompt and target together.
            tokenizer_json: the bytes of the model's `tokenizer.json`.
            template: see `read_examples`.
            num_texts, length, seed, eos_token_id, takes_fewer: see `from_texts`.

        Raises:
            DataError: the data cannot be read.
            InputError: a size is below 1, or there are too few tokens.

        Example:
            >>> texts = CalibrationTexts.read("notes.jsonl", tokenizer_json)  # doctest: +SKIP
        """
        texts = [example.prompt + example.target for example in read_examples(path, template)]
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        return cls.from_texts(
            texts,
            tokenizer,
            num_texts=num_texts,
            length=length,
            seed=seed,
            eos_token_id=eos_token_id,
            takes_fewer=takes_fewer,
        )


def _pieces(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, rng: Random, eos_token_id: int | None
) -> Iterator[list[int]]:
    """One piece of each text, then another of each that has one left, and so on."""
    order = list(range(len(texts)))
    rng.shuffle(order)
    left: list[list[list[int]]] = []
    for index in order:
        tokens = list(tokenizer.encode(texts[index]).ids) + ([] if eos_token_id is None else [eos_token_id])
        pieces = [tokens[start : start + length] for start in range(0, len(tokens), length)]
        rng.shuffle(pieces)
        if pieces:
            yield pieces.pop()
            left.append(pieces)
    while left := [pieces for pieces in left if pieces]:
        for pieces in left:
            yield pieces.pop()


class LayerStatistics:
    """What a linear layer read.

    Attributes:
        num_rows: how many inputs.
        squared_norms: float64 (in,), sum of squares of each input dimension; the diagonal of `gram`.

    Example:
        >>> statistics = LayerStatistics.of_inputs(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        >>> statistics.num_rows, statistics.gram.tolist(), statistics.squared_norms.tolist()
        (2, [[10.0, 2.0], [2.0, 4.0]], [10.0, 4.0])
    """

    def __init__(self, gram: Tensor | None, num_rows: int, *, squared_norms: Tensor | None = None) -> None:
        if squared_norms is None:
            if gram is None:
                raise InputError("statistics have neither gram nor squared_norms, expected one of them")
            squared_norms = gram.diagonal()
        self._gram = gram
        self.num_rows = num_rows
        self.squared_norms = squared_norms

    @classmethod
    def of_inputs(cls, inputs: Tensor) -> LayerStatistics:
        """The statistics of inputs (..., in)."""
        rows = inputs.reshape(-1, inputs.shape[-1]).double()  # (rows, in)
        return cls(rows.T @ rows, rows.shape[0])

    @property
    def gram(self) -> Tensor:
        """X^T X, float64 (in, in).

        Raises:
            InputError: it was not measured.
        """
        if self._gram is None:
            raise InputError("these statistics have no Gram matrix; measure them with needs_gram=True")
        return self._gram

    def with_lookups(self, share: float) -> LayerStatistics:
        """Of a weight whose rows are also read as they are, as an embedding's: X^T X + share * its mean diagonal * I.

        Example:
            >>> LayerStatistics.of_inputs(torch.tensor([[1.0, 3.0]])).with_lookups(0.5).gram.tolist()
            [[3.5, 3.0], [3.0, 11.5]]
        """
        gram = self.gram.clone()
        gram.diagonal().add_(share * float(gram.diagonal().mean()))
        return LayerStatistics(gram, self.num_rows)

    @property
    def has_gram(self) -> bool:
        """Whether the whole matrix was measured and not its diagonal alone."""
        return self._gram is not None


class WalkedBlock:
    """A decoder block on the way through the model; see `walk_blocks`.

    Attributes:
        index: 0 for the first.
        name: in the model, such as `model.layers.0`.
        module: the block.
        linears: its linear layers by their names in the model, in the order of its modules.
        states: (num_texts, length, hidden), what it reads.
    """

    def __init__(self, index: int, name: str, module: nn.Module, states: Tensor, passes: _Passes) -> None:
        self.index = index
        self.name = name
        self.module = module
        self.linears = {f"{name}.{part}": linear for part, linear in _linears(module).items()}
        self.states = states
        self._passes = passes

    def statistics(
        self, names: Collection[str] | None = None, *, needs_gram: bool = True
    ) -> dict[str, LayerStatistics]:
        """What linear layers of the block read, with its weights as they are now.

        Args:
            names: of `linears`; None for all.
            needs_gram: False measures the squared norms alone, for less memory and time.

        Returns:
            By name. Layers that read the same tensor, such as query, key and value, share one object.

        Raises:
            InputError: an input is not finite.
        """
        measured = _Measured(needs_gram)
        with ExitStack() as stack:
            for name, linear in self.linears.items():
                if names is None or name in names:
                    stack.callback(linear.register_forward_pre_hook(measured.hook(name)).remove)
            for _ in self._passes.run(self.index, self.module, self.states):
                measured.end_pass()
        statistics = measured.statistics()
        for name, one in statistics.items():
            _check_finite_inputs(name, one)
        return statistics

    def _advance(self) -> None:
        """Let the block, as it is now, write the states that the next one reads in place of its own."""
        for rows, outputs in self._passes.run(self.index, self.module, self.states):
            self.states[rows] = outputs


def walk_blocks(model: PreTrainedModel, input_ids: NDArray[np.int64], *, batch_size: int = 4) -> Iterator[WalkedBlock]:
    """Go through the decoder blocks, first to last; each reads what those before it, as they are by then, put out.

    Whoever walks may change a block's weights while it is at that block.

    Args:
        model: in evaluation mode, with whole weights and without adapters.
        input_ids: int64 (num_texts, length), as in `CalibrationTexts`.
        batch_size: texts that go through a block at once.

    Raises:
        InputError: token ids or a model that cannot be walked.

    Example:
        >>> for block in walk_blocks(model, texts.input_ids):  # doctest: +SKIP
        ...     print(block.name, {name: s.num_rows for name, s in block.statistics().items()})
    """
    check_walk(model, input_ids, batch_size=batch_size)
    layers = decoder_layers(model)
    names = {module: name for name, module in model.named_modules()}
    passes = _Passes(batch_size)
    states = passes.record(model, layers, torch.from_numpy(input_ids).to(model.device))
    for index, layer in enumerate(layers):
        block = WalkedBlock(index, names[layer], layer, states, passes)
        yield block
        if index + 1 < len(layers):
            block._advance()


def walk_bytes(model: PreTrainedModel, *, num_texts: int, length: int, needs_gram: bool = True) -> int:
    """The most bytes beside the model that a walk keeps: all texts' residual stream, one block's statistics.

    Layers that read the same are counted for themselves, which they need not be; a pass and a method's own work on one
    layer come on top.

    Args:
        model, num_texts, length: see `walk_blocks`.
        needs_gram: see `WalkedBlock.statistics`.

    Example:
        >>> walk_bytes(model, num_texts=128, length=512) / 2**20  # doctest: +SKIP
    """
    weight = model.get_input_embeddings().weight
    stream: int = num_texts * length * weight.shape[1] * weight.element_size()
    statistics = max(
        sum(8 * linear.in_features ** (2 if needs_gram else 1) for linear in _linears(layer).values())
        for layer in decoder_layers(model)
    )
    return stream + statistics


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    """A block's linear layers by their names in it."""
    return {part: module for part, module in block.named_modules() if isinstance(module, nn.Linear)}


class PackedLike(Protocol):
    """A weight in a compressed form, such as `cotune.models.packed_weights.PackedWeight`."""

    def dequantised(self) -> NDArray[np.float32]:
        """The weight (out, in) that it stands for."""
        ...


PackedT = TypeVar("PackedT", bound=PackedLike)


@dataclass(frozen=True, kw_only=True)
class LayerProgress:
    """A linear layer was compressed."""

    name: str
    """In the model."""
    index: int
    """How many were compressed before it."""
    num_layers: int
    """How many there are in all."""
    error: float | None
    """Share of the layer's squared output that is lost, see `reconstruction_error`; None without Gram matrices."""


def compress_linears(
    model: PreTrainedModel,
    input_ids: NDArray[np.int64],
    compress_layer: Callable[[Tensor, LayerStatistics], Tensor | PackedT],
    *,
    skip: Collection[str] = (),
    batch_size: int = 4,
    needs_gram: bool = True,
    on_layer: Callable[[LayerProgress], None] | None = None,
) -> dict[str, PackedT]:
    """Compress the linear layers of all decoder blocks in place, block by block; embeddings and head stay.

    Args:
        model, input_ids, batch_size: see `walk_blocks`.
        compress_layer: gets a copy of a layer's weight, float32 (out, in), and what the layer reads; gives the new
            weight, or a packed one, whose values the layer then has.
        skip: layers that stay as they are, by their names in the model (`model.layers.0.mlp.down_proj`) or in every
            block (`mlp.down_proj`).
        needs_gram: False where `compress_layer` reads `squared_norms` alone.
        on_layer: called after each layer. What it raises stops the work, with the layers so far compressed.

    Returns:
        The packed weights by layer, where `compress_layer` gave such.

    Raises:
        InputError: as `walk_blocks`; a name in `skip` that the model does not have; a new weight of another shape or
            with numbers that are not finite.

    Example:
        >>> compress_linears(model, texts.input_ids, lambda weight, _: weight.bfloat16().float())  # doctest: +SKIP
    """
    names = set(chosen_linears(model, skip))
    packed: dict[str, PackedT] = {}
    num_done = 0
    for block in walk_blocks(model, input_ids, batch_size=batch_size):
        chosen = [name for name in block.linears if name in names]
        statistics = block.statistics(chosen, needs_gram=needs_gram) if chosen else {}
        for name in chosen:
            linear, own = block.linears[name], statistics[name]
            result = compress_layer(linear.weight.detach().float().clone(), own)
            new = _values(name, linear, result)
            error = reconstruction_error(linear.weight.detach(), new, own.gram) if needs_gram and on_layer else None
            linear.weight.data.copy_(new)
            if not isinstance(result, Tensor):
                packed[name] = result
            if on_layer is not None:
                on_layer(LayerProgress(name=name, index=num_done, num_layers=len(names), error=error))
            num_done += 1
    return packed


def compress_weights(
    model: PreTrainedModel,
    compress_weight: Callable[[Tensor], Tensor | PackedT],
    *,
    skip: Collection[str] = (),
    on_layer: Callable[[LayerProgress], None] | None = None,
) -> dict[str, PackedT]:
    """As `compress_linears`, for methods that look at a layer's weight alone and need no texts.

    Example:
        >>> compress_weights(model, lambda weight: weight.bfloat16().float())  # doctest: +SKIP
    """
    linears = chosen_linears(model, skip)
    packed: dict[str, PackedT] = {}
    for index, (name, linear) in enumerate(linears.items()):
        result = compress_weight(linear.weight.detach().float().clone())
        linear.weight.data.copy_(_values(name, linear, result))
        if not isinstance(result, Tensor):
            packed[name] = result
        if on_layer is not None:
            on_layer(LayerProgress(name=name, index=index, num_layers=len(linears), error=None))
    return packed


def head_statistics(model: PreTrainedModel, input_ids: NDArray[np.int64], *, batch_size: int = 4) -> LayerStatistics:
    """What the head reads, with the model's weights as they are now.

    Args:
        model, input_ids, batch_size: see `walk_blocks`.

    Raises:
        InputError: as `walk_blocks`; or an input is not finite.
    """
    check_walk(model, input_ids, batch_size=batch_size)
    measured = _Measured(needs_gram=True)
    measure = measured.hook(HEAD)
    for ids in torch.split(torch.from_numpy(input_ids).to(model.device), batch_size):
        with torch.no_grad():
            # Not through the head itself: logits of a whole vocabulary are large, and nobody reads them.
            measure(model, (model.base_model(input_ids=ids, use_cache=False).last_hidden_state,))
        measured.end_pass()
    statistics = measured.statistics()[HEAD]
    _check_finite_inputs(HEAD, statistics)
    return statistics


def reconstruction_error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """Share of a layer's squared output that a new weight gets wrong, ||(W - W') X||^2 / ||W X||^2.

    Args:
        weight, new: W and W', (out, in).
        gram: X^T X, float64 (in, in).

    Example:
        >>> reconstruction_error(torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0, 0.0]]), torch.eye(2).double())
        0.1
    """
    whole, lost = weight.double(), weight.double() - new.double()
    of_whole, of_lost = squared_outputs(whole, gram), squared_outputs(lost, gram)
    return of_lost / of_whole if of_whole > 0 else 0.0


def squared_outputs(weight: Tensor, gram: Tensor) -> float:
    """||W X||^2 of a weight (out, in) and X^T X, float64 (in, in).

    Example:
        >>> squared_outputs(torch.tensor([[3.0, 1.0]]), torch.eye(2).double())
        10.0
    """
    double = weight.double()
    return float(((double @ gram) * double).sum())


def chosen_linears(model: PreTrainedModel, skip: Collection[str]) -> dict[str, nn.Linear]:
    """Linear layers of all blocks by name, but for those in `skip`."""
    _check_model(model)
    unknown = set(skip)
    chosen: dict[str, nn.Linear] = {}
    module_names = {module: name for name, module in model.named_modules()}
    for layer in decoder_layers(model):
        for part, linear in _linears(layer).items():
            name = f"{module_names[layer]}.{part}"
            if name not in skip and part not in skip:
                chosen[name] = linear
            unknown -= {name, part}
    if unknown:
        raise InputError(
            f"skip names {sorted(unknown)[0]!r}, expected linear layers of the model's blocks, such as "
            "'mlp.down_proj' or 'model.layers.0.mlp.down_proj'"
        )
    if not chosen:
        raise InputError(f"{type(model).__name__} has no linear layer to compress in its blocks; skip fewer")
    return chosen


def check_walk(model: PreTrainedModel, input_ids: NDArray[np.int64], *, batch_size: int) -> None:
    """Raise `InputError` where `walk_blocks` would refuse its arguments."""
    _check_model(model)
    _check_ids(model, input_ids)
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected at least 1")


def check_finite(model: PreTrainedModel) -> None:
    """Raise `InputError` where a weight is nan or inf."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(f"{name} holds nan or inf, expected finite weights; copy the model again")


def _check_finite_inputs(name: str, statistics: LayerStatistics) -> None:
    if not bool(statistics.squared_norms.isfinite().all()):
        raise InputError(f"{name} reads numbers that are not finite; load the model as float32 or bfloat16")


def _check_model(model: PreTrainedModel) -> None:
    if is_low_bit(model):
        raise InputError("the model's weights are in low bits already; load it without base_bits")
    special = [
        name for name, part in model.named_modules() if isinstance(part, nn.Linear) and type(part) is not nn.Linear
    ]
    if special or any(hasattr(part, "lora_A") for part in model.modules()):
        raise InputError(
            f"the model has layers that are not plain linear ones{f', such as {special[0]}' if special else ''}, "
            "expected whole weights without adapters; merge the adapter first"
        )
    if model.training:
        raise InputError("the model is in training mode, expected evaluation mode; call model.eval()")


def _check_ids(model: PreTrainedModel, input_ids: NDArray[np.int64]) -> None:
    config = model.config.get_text_config()
    if input_ids.ndim != 2 or input_ids.dtype != np.int64 or 0 in input_ids.shape:
        raise InputError(
            f"input_ids are {input_ids.dtype} {input_ids.shape}, expected int64 (num_texts, length), both at least 1"
        )
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= config.vocab_size:
        raise InputError(
            f"input_ids are from {lowest} to {highest}, expected 0 to {config.vocab_size - 1}; "
            "encode the texts with the model's own tokenizer"
        )
    if input_ids.shape[1] > config.max_position_embeddings:
        raise InputError(
            f"calibration texts have {input_ids.shape[1]} tokens, expected at most {config.max_position_embeddings}, "
            "the model's context; take a smaller length"
        )


def _values(name: str, linear: nn.Linear, result: Tensor | PackedLike) -> Tensor:
    """What a compressed weight is in the layer's number type."""
    new = result if isinstance(result, Tensor) else torch.from_numpy(result.dequantised())
    shape = linear.weight.shape
    if new.shape != shape or not bool(new.isfinite().all()):
        problem = f"of shape {tuple(new.shape)}" if new.shape != shape else "with numbers that are not finite"
        raise InputError(
            f"the compressed weight of {name} came {problem}, expected finite numbers of shape {tuple(shape)}"
        )
    return new.to(linear.weight)


class _Passes:
    """Blocks run alone: what else than states each is called with, which depends on positions and batch size alone."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    @torch.no_grad()
    def record(self, model: PreTrainedModel, layers: nn.ModuleList, input_ids: Tensor) -> Tensor:
        """Remember the blocks' other arguments; the states that the first one reads.

        The model runs with blocks that pass on what they get, so that its own code makes masks and angles.
        """
        states: list[Tensor] = []
        for ids in torch.split(input_ids, self._batch_size):
            seen: list[tuple[Tensor, dict[str, Any]]] = []

            def pass_on(hidden_states: Tensor, seen: list[Any] = seen, **arguments: Any) -> Tensor:
                seen.append((hidden_states, arguments))
                return hidden_states

            with ExitStack() as stack:
                for layer in layers:
                    stack.callback(layer.__dict__.pop, "forward")
                    layer.__dict__["forward"] = pass_on
                model.base_model(input_ids=ids, use_cache=False)
            self._arguments[len(ids)] = [arguments for _, arguments in seen]
            states.append(seen[0][0])
        return torch.cat(states)

    def run(self, index: int, module: nn.Module, states: Tensor) -> Iterable[tuple[slice, Tensor]]:
        """Which texts, and what the block puts out for them."""
        for start in range(0, len(states), self._batch_size):
            rows = slice(start, min(start + self._batch_size, len(states)))
            with torch.no_grad():
                outputs = module(states[rows], **self._arguments[rows.stop - rows.start][index])
            yield rows, outputs


class _Measured:
    """Sums over the passes of one block; what several layers read is summed once."""

    def __init__(self, needs_gram: bool) -> None:
        self._needs_gram = needs_gram
        self._sums: dict[str, Tensor] = {}
        self._num_rows: dict[str, int] = {}
        # Layers by the first one that read the same tensor, and the tensors of this pass.
        self._first: dict[str, str] = {}
        self._read: list[tuple[Tensor, str]] = []

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """For the layer of this name."""

        def measure(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs: Tensor = arguments[0]
            first = next((other for tensor, other in self._read if tensor is inputs), None)
            self._first[name] = name if first is None else first
            if first is None:
                self._read.append((inputs, name))
                self._add(name, inputs)

        return measure

    def _add(self, name: str, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).double()  # (rows, in)
        summed = rows.T @ rows if self._needs_gram else rows.square().sum(0)
        if name in self._sums:
            self._sums[name] += summed
        else:
            self._sums[name] = summed
        self._num_rows[name] = self._num_rows.get(name, 0) + rows.shape[0]

    def end_pass(self) -> None:
        self._read.clear()

    def statistics(self) -> dict[str, LayerStatistics]:
        shared = {
            name: LayerStatistics(summed, self._num_rows[name])
            if self._needs_gram
            else LayerStatistics(None, self._num_rows[name], squared_norms=summed)
            for name, summed in self._sums.items()
        }
        return {name: shared[first] for name, first in self._first.items()}
