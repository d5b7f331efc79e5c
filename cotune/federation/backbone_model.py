"""The real `LocalModel`: an adapter on a backbone that stays loaded, and one device's texts.

The adapter is attached once and its numbers are exchanged, so a round costs no injection and no loading. Many devices
of a simulation share one `ResidentBackbone`, one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cotune.data.batches import EncodedExample, TokenBatch
from cotune.errors import InputError, NonFiniteLossError
from cotune.federation.arrays import Arrays, Shapes
from cotune.federation.local_model import LocalSteps, Trained
from cotune.federation.replay import move_along
from cotune.models.backbone import Backbone
from cotune.models.low_bit import is_low_bit
from cotune.tuning.answer_loss import TokenBatches, answer_nats, only_rows
from cotune.tuning.attached import Attachable, check_lengths
from cotune.tuning.gradient import GradientState
from cotune.tuning.in_place import InPlaceState, InPlaceTuner
from cotune.tuning.objectives import AnswerNats
from cotune.tuning.zeroth_order import measure_along

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_GRAD_NORM = 1.0
EVALUATION_BATCH = 16


class ResidentBackbone:
    """A backbone with an adapter attached for as long as this is open; the backbone is as before afterwards.

    Args:
        backbone: serves nobody else meanwhile.
        adapter: its names and shapes are those of all arrays.

    Example:
        >>> with ResidentBackbone(backbone, LoraAdapter.fresh(backbone.model, LoraShape())) as resident:
        ...     trained = resident.with_texts(examples).descend(arrays, names, LocalSteps(), seed=0)  # doctest: +SKIP
    """

    def __init__(self, backbone: Backbone, adapter: Attachable) -> None:
        self.backbone = backbone
        self._adapter = adapter
        self._open = ExitStack()
        self._model: PreTrainedModel | None = None
        self._own: dict[str, Tensor] = {}

    def __enter__(self) -> ResidentBackbone:
        model = self._open.enter_context(self._adapter.attach(self.backbone.model))
        parameters = dict(model.named_parameters())
        self._own = {name: parameters[name] for name in sorted(self._adapter.params)}
        self._model = model
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._model, self._own = None, {}
        self._open.close()

    @property
    def model(self) -> PreTrainedModel:
        """With the adapter attached."""
        assert self._model is not None, "used outside its `with` block"
        return self._model

    @property
    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The adapter's numbers as they are now, copied."""
        return to_arrays(self._own)

    @property
    def shapes(self) -> Shapes:
        """Of the adapter's arrays."""
        return {name: tuple(tensor.shape) for name, tensor in self._own.items()}

    @torch.no_grad()
    def silence(self) -> None:
        """Make the adapter change nothing, until the next `write`."""
        for name, tensor in self._own.items():
            if "lora_B" in name:
                tensor.zero_()

    def with_texts(self, examples: Sequence[EncodedExample]) -> BackboneModel:
        """One device's model.

        Raises:
            InputError: no texts, or one that does not fit the context.
        """
        if not examples:
            raise InputError("a device has no texts, expected at least one; give it some, or leave it out")
        check_lengths(examples, self.backbone, self._adapter)
        return BackboneModel(self, examples)

    @torch.no_grad()
    def write(self, params: Arrays) -> None:
        """Make these the adapter's numbers.

        Raises:
            InputError: names or shapes are not the adapter's.
        """
        if params.keys() != self._own.keys():
            strange = sorted(params.keys() ^ self._own.keys())
            raise InputError(f"{strange[0]} is in the arrays or in the adapter, expected it in both; use one adapter")
        for name, tensor in self._own.items():
            if params[name].shape != tuple(tensor.shape):
                raise InputError(f"{name} has shape {params[name].shape}, expected {tuple(tensor.shape)}")
            tensor.copy_(torch.from_numpy(np.array(params[name], np.float32)))

    @contextmanager
    def folded(self, params: Arrays) -> Iterator[None]:
        """Inside, the adapted layers' frozen weights hold s B A too, and the adapter can begin afresh beside them.

        The weights themselves wait aside, so that they are the same bits afterwards, also on error; this takes the
        memory of the adapted layers once more.

        Raises:
            InputError: names or shapes are not the adapter's, it is no LoRA, or the weights have few bits.
        """
        from peft.tuners.lora.layer import LoraLayer

        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        if not layers:
            raise InputError("the adapter is no LoRA, which alone can be folded into weights; use kind = 'lora'")
        if is_low_bit(self.backbone.model):
            raise InputError("the model has low-bit weights, expected whole ones to fold an adapter into")
        self.write(params)
        before: list[tuple[Tensor, Tensor]] = []
        try:
            for layer in layers:
                for parameter in layer.get_base_layer().parameters():
                    before.append((parameter, parameter.data))
                    parameter.data = parameter.data.clone()
                layer.merge()
                # peft would leave the adapter out now; it is a new one that begins here.
                layer.merged_adapters.clear()
            yield
        finally:
            for parameter, data in before:
                parameter.data = data
            for layer in layers:
                layer.merged_adapters.clear()

    def own(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The model's own tensors of these names.

        Raises:
            InputError: the adapter has no such tensor.
        """
        for name in names:
            if name not in self._own:
                raise InputError(
                    f"the adapter has no {name}, expected one of its tensors, such as {next(iter(self._own))}"
                )
        return {name: self._own[name] for name in names}


class BackboneModel:
    """One device: `ResidentBackbone.with_texts` makes it."""

    def __init__(self, resident: ResidentBackbone, examples: Sequence[EncodedExample]) -> None:
        self._resident, self._examples = resident, examples

    @property
    def num_examples(self) -> int:
        return len(self._examples)

    @property
    def adapter_shapes(self) -> Shapes:
        return self._resident.shapes

    def descend(self, params: Arrays, trained: Sequence[str], steps: LocalSteps, *, seed: int) -> Trained:
        self._resident.write(params)
        state = GradientState.start(self._resident.own(trained), weight_decay=0.0)
        if steps.optimizer == "sgd":
            state.optimizer = torch.optim.SGD(list(state.params.values()))
        state.learning_rate = steps.learning_rate
        batches, total = self._endless(steps.batch_size, seed), 0.0
        for _ in range(steps.num_steps):
            total += state.descend(self._nats(state.params, next(batches)).mean(), max_grad_norm=MAX_GRAD_NORM)["loss"]
        return Trained(arrays=to_arrays(state.params), loss=total / steps.num_steps)

    @contextmanager
    def walk(self, params: Arrays, tuned: Sequence[str], *, batch_size: int, seed: int) -> Iterator[BackboneWalk]:
        self._resident.write(params)
        yield BackboneWalk(self._resident, tuned, self._endless(batch_size, seed))

    def gradient(
        self, params: Arrays, names: Sequence[str], *, num_batches: int, batch_size: int, seed: int
    ) -> dict[str, NDArray[np.float32]]:
        self._resident.write(params)
        leaves = {n: tensor.detach().clone().requires_grad_() for n, tensor in self._resident.own(names).items()}
        batches = self._endless(batch_size, seed)
        for _ in range(num_batches):
            loss = self._nats(leaves, next(batches)).mean() / num_batches
            loss.backward()  # type: ignore[no-untyped-call]
        gradients = {n: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for n, leaf in leaves.items()}
        return to_arrays(gradients)

    @contextmanager
    def folded(self, params: Arrays) -> Iterator[None]:
        with self._resident.folded(params):
            yield

    @torch.no_grad()
    def hidden_states(self, params: Arrays, *, batch_size: int, seed: int) -> list[NDArray[np.float32]]:
        self._resident.write(params)
        model, batch = self._resident.model, next(self._endless(batch_size, seed))
        input_ids = torch.from_numpy(batch.input_ids).to(model.device)
        is_text = torch.from_numpy(batch.attention_mask).to(model.device)
        # Of the logits nobody needs more than one row.
        last = torch.zeros(input_ids.shape, dtype=torch.bool, device=model.device)
        last[0, -1] = True
        with only_rows(model.get_output_embeddings(), last):
            states = model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states
        # The first is the embedding; soft prompts stand in front.
        own = [state[:, -input_ids.shape[1] :] * is_text[:, :, None] for state in states[1:]]
        return [state.float().cpu().numpy() for state in own]

    @torch.no_grad()
    def activation_sketches(
        self, omegas: Arrays, *, num_batches: int, batch_size: int, seed: int
    ) -> dict[str, NDArray[np.float32]]:
        self._resident.silence()
        own, model = self._resident.own(sorted(omegas)), self._resident.model
        shared = {n: torch.from_numpy(np.array(omegas[n], np.float32)).to(one.device) for n, one in own.items()}
        sums = {name: torch.zeros_like(one, dtype=torch.float64) for name, one in shared.items()}
        is_token, num_tokens = torch.zeros(0, dtype=torch.bool), 0

        def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                inputs = args[0][is_token.to(args[0].device)].float()  # (tokens, in)
                sums[name] += (inputs.T @ (inputs @ shared[name])).double()

            return add

        batches = self._endless(batch_size, seed)
        with ExitStack() as open_hooks:
            for name in own:
                # The module of A sees exactly what the layer sees.
                handle = model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(listen(name))
                open_hooks.callback(handle.remove)
            for _ in range(num_batches):
                batch = next(batches)
                # The last token is predicted, never read.
                is_token = torch.from_numpy(batch.attention_mask[:, :-1] == 1)
                num_tokens += int(is_token.sum())
                self._nats(own, batch)
        return to_arrays({name: total / num_tokens for name, total in sums.items()})

    @torch.no_grad()
    def evaluate(self, params: Arrays) -> tuple[float, int]:
        self._resident.write(params)
        total, num_tokens = 0.0, 0
        for batch in self._batches(EVALUATION_BATCH, 0).epoch(0):
            nats = self._nats(self._resident.own(sorted(params)), batch)
            total += float(nats.double().sum())
            num_tokens += len(nats)
        return total, num_tokens

    def _nats(self, params: dict[str, Tensor], batch: TokenBatch) -> Tensor:
        model = self._resident.model
        return answer_nats(model, model.get_output_embeddings(), params, batch)

    def _batches(self, batch_size: int, seed: int) -> TokenBatches:
        pad = self._resident.backbone.spec.pad_token_id
        return TokenBatches(self._examples, min(batch_size, len(self._examples)), pad_token_id=pad, seed=seed)

    def _endless(self, batch_size: int, seed: int) -> Iterator[TokenBatch]:
        batches, epoch = self._batches(batch_size, seed), 0
        while True:
            yield from batches.epoch(epoch)
            epoch += 1


class BackboneWalk:
    """Forward-only steps in the model's own tensors; memory is that of inference."""

    def __init__(self, resident: ResidentBackbone, tuned: Sequence[str], batches: Iterator[TokenBatch]) -> None:
        self._tuner = InPlaceTuner[TokenBatch](resident.model, AnswerNats(), None)
        self._state = InPlaceState.start(resident.model, resident.own(tuned), None)
        self._batches = batches
        self._batch = next(batches)
        self._total, self._num = 0.0, 0

    def slope(self, direction_seed: int, zo_eps: float) -> float:
        direction = self._state.numbers.direction(direction_seed)
        difference = measure_along(self._tuner, self._state, self._batch, direction, zo_eps=zo_eps)
        self._total, self._num = self._total + difference.loss, self._num + 1
        return difference.projected_grad

    def next_batch(self) -> None:
        self._batch = next(self._batches)

    def move(self, direction_seeds: Sequence[int], amounts: Sequence[float]) -> None:
        if not all(map(math.isfinite, amounts)):
            raise NonFiniteLossError(self._num, next(one for one in amounts if not math.isfinite(one)))
        move_along(self._state.params, direction_seeds, amounts)

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        return to_arrays(self._state.params)

    @property
    def loss(self) -> float:
        return self._total / self._num if self._num else math.nan


def to_arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """Copies on the CPU."""
    return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in tensors.items()}
