"""The gradient of each text of a batch by itself, which DP-SGD clips before it sums (Abadi et al., arXiv 1607.00133).

The loss of a text is the mean of -log p over its target tokens, so that each text counts alike, however long.

- `AttachedGradients`, for what is attached to a backbone: Opacus' hooks (Yousefpour et al., arXiv 2109.12298) work out
  the gradients of all texts from one backward pass. They know layers of PyTorch (linear, embedding, norms) and our
  bottleneck; LoRA's two matrices are linear layers. Whatever they do not know, or what is used in a way that they do
  not see (DoRA's magnitudes, gradient checkpointing, a soft prompt), goes by one backward pass for each text: slower,
  the same numbers. That the hooks have seen everything is checked against autograd's sum in each step.
- `SideGradients`, for the side network: one backward pass to the corrections, then `torch.func.vmap` over texts from
  corrections to parameters, because the loss is an autograd function of its own that `vmap` cannot look into, and
  Opacus' hooks take one input only, where a side network with attention has two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cotune.data.batches import IGNORED_LABEL, TokenBatch
from cotune.errors import InputError
from cotune.models.bottleneck import Bottleneck
from cotune.models.side_network import SideNetwork, fake_quantise
from cotune.tuning.answer_loss import answer_nats
from cotune.tuning.corrected_loss import corrected_nats
from cotune.tuning.own_tensors import own_tensors, write_into
from cotune.tuning.sequences import SequenceBatch
from cotune.tuning.tuner import BatchT_contra, Params

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPACUS_IS_MISSING = "training with differential privacy needs opacus; install it with: pip install 'cotune[private]'"
# Of the sum of the texts' gradients against autograd's, relative; half precision rounds to about a hundredth.
_SUM_TOLERANCE = 2e-2
# What Opacus leaves on parameters.
_OPACUS_ATTRIBUTES = ("grad_sample", "_forward_counter", "_current_grad_sample")


@dataclass(frozen=True)
class TextGradients:
    """What a part of a batch gives.

    Attributes:
        grads: by parameter, (texts, *shape): the gradient of each text's mean nats per target token.
        nats: float32 (targets,), of all target tokens, without a gradient.
    """

    grads: dict[str, Tensor]
    nats: Tensor


class ExampleGradients(Protocol[BatchT_contra]):
    """Where the gradients of single texts come from."""

    def gradients(self, params: Params, batch: BatchT_contra) -> TextGradients:
        """Of every text in the batch, at these parameters."""
        ...

    def nats(self, params: Params, batch: BatchT_contra) -> Tensor:
        """-log p of each target token, float32 (targets,)."""
        ...


class AttachedGradients:
    """Gradients of an adapter's tensors.

    Args:
        model: with the adapter attached, whose own tensors are written over unless they are the parameters themselves.

    Raises:
        InputError: Opacus is not installed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        modules = _trainable_modules(model)
        owned = [id(p) for module in modules for p in module.parameters(recurse=False) if p.requires_grad]
        # A tensor that two layers share, such as a tied embedding, has two parts that would have to be added.
        self.uses_hooks = len(owned) == len(set(owned)) and all(_has_sampler(module) for module in modules)
        """Whether one backward pass serves a whole batch."""

    def gradients(self, params: Params, batch: TokenBatch) -> TextGradients:
        """See `ExampleGradients`.

        Raises:
            InputError: a text has no target token.
        """
        counts = (batch.labels[:, 1:] != IGNORED_LABEL).sum(axis=1)
        if not counts.all():
            raise InputError("a text has no target tokens, expected at least one in each; leave it out")
        own = self._load(params)
        if self.uses_hooks:
            nats, grads = self._by_hooks(own, batch, counts)
            if grads is not None:
                return TextGradients(grads, nats)
            # A layer is read past its hooks: no need to try again.
            self.uses_hooks = False
        return self._one_by_one(own, batch, counts)

    @torch.no_grad()
    def nats(self, params: Params, batch: TokenBatch) -> Tensor:
        return self._nats(self._load(params), batch)

    def _by_hooks(
        self, own: dict[str, Tensor], batch: TokenBatch, counts: NDArray[np.int64]
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """None instead of gradients where the hooks have not seen everything: their sum is not autograd's."""
        with _opacus_hooks(self._model):
            nats = self._nats(own, batch)
            with warnings.catch_warnings():
                # The first adapted layer reads what needs no gradient; the hooks do not either.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                _mean_by_text(nats, counts).sum().backward()  # type: ignore[no-untyped-call]
            seen = {name: getattr(leaf, "grad_sample", None) for name, leaf in own.items()}
        whole = {name: leaf.grad for name, leaf in own.items()}
        for leaf in own.values():
            leaf.grad = None
        grads = {n: g for n, g in seen.items() if isinstance(g, Tensor) and len(g) == len(counts)}
        is_complete = len(grads) == len(own) and all(_sums_to(grads[name], whole[name]) for name in own)
        return nats.detach(), grads if is_complete else None

    def _one_by_one(self, own: dict[str, Tensor], batch: TokenBatch, counts: NDArray[np.int64]) -> TextGradients:
        grads: dict[str, list[Tensor]] = {name: [] for name in own}
        nats = []
        for row in range(len(counts)):
            one = TokenBatch(*(part[row : row + 1] for part in (batch.input_ids, batch.attention_mask, batch.labels)))
            text_nats = self._nats(own, one)
            slopes = torch.autograd.grad(text_nats.mean(), list(own.values()), allow_unused=True)
            for (name, leaf), slope in zip(own.items(), slopes, strict=True):
                grads[name].append(torch.zeros_like(leaf) if slope is None else slope)
            nats.append(text_nats.detach())
        return TextGradients({name: torch.stack(each) for name, each in grads.items()}, torch.cat(nats))

    def _nats(self, own: dict[str, Tensor], batch: TokenBatch) -> Tensor:
        return answer_nats(self._model, self._model.get_output_embeddings(), own, batch)

    def _load(self, params: Params) -> dict[str, Tensor]:
        """Opacus' hooks read and mark the model's own parameters, so the values go into these."""
        own = own_tensors(self._model, params)
        write_into(own, params)
        return own


class SideGradients:
    """Gradients of a side network's parameters.

    Args:
        network: gives the shape; its own parameters are not touched.
        basis: Q, float32 (vocab, basis_dim).

    Raises:
        InputError: the network drops out: a second look at a text would then see another network.
    """

    def __init__(self, network: SideNetwork, basis: Tensor) -> None:
        dropout = getattr(network.config, "dropout", 0.0)
        if dropout:
            raise InputError(f"dropout is {dropout}, expected 0 for training with differential privacy")
        self._network, self._basis = network.eval(), basis

    def gradients(self, params: Params, batch: SequenceBatch) -> TextGradients:
        """See `ExampleGradients`."""
        values = {name: value.detach() for name, value in params.items()}
        with torch.no_grad():
            corrections = functional_call(self._network, values, self._inputs(batch))
        corrections.requires_grad_()  # (texts, seq, basis_dim)
        nats = corrected_nats(fake_quantise(batch.at_targets(corrections)), self._basis, batch.base)
        num_texts, seq = corrections.shape[:2]
        counts = np.bincount(batch.targets.numpy() // seq, minlength=num_texts)
        (slopes,) = torch.autograd.grad(_mean_by_text(nats, counts).sum(), corrections)

        def along_slope(values: dict[str, Tensor], slope: Tensor, *inputs: Tensor) -> Tensor:
            correction: Tensor = functional_call(self._network, values, tuple(each[None] for each in inputs))[0]
            return (correction * slope).sum()

        inputs = self._inputs(batch)
        by_text: Callable[..., dict[str, Tensor]] = vmap(grad(along_slope), (None, 0, *(0 for _ in inputs)))
        with sdpa_kernel(SDPBackend.MATH):  # the others know no vmap
            return TextGradients(by_text(values, slopes, *inputs), nats.detach())

    @torch.no_grad()
    def nats(self, params: Params, batch: SequenceBatch) -> Tensor:
        corrections = functional_call(self._network, dict(params), self._inputs(batch))
        return corrected_nats(fake_quantise(batch.at_targets(corrections)), self._basis, batch.base)

    def _inputs(self, batch: SequenceBatch) -> tuple[Tensor, ...]:
        return batch.inputs if self._network.reads_every_position else (batch.taps,)


def _mean_by_text(nats: Tensor, counts: NDArray[np.int64]) -> Tensor:
    """Mean of each text's nats, (texts,); texts lie one after the other, and one without targets gives 0."""
    owner = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(nats.device)
    sizes = torch.from_numpy(np.maximum(counts, 1)).to(nats.device)
    return nats.new_zeros(len(counts)).index_add(0, owner, nats) / sizes


def _sums_to(grads: Tensor, whole: Tensor | None) -> bool:
    """Whether gradients of single texts (texts, *shape) add up to that of all of them, but for rounding."""
    if whole is None or not bool(torch.isfinite(whole).all()):
        return True  # nothing to hold them against; what is not finite is refused later
    # Texts may cancel each other, so rounding is as large as their sizes are.
    allowed = _SUM_TOLERANCE * float(grads.abs().sum(dim=0).norm())
    return float((grads.sum(dim=0) - whole).norm()) <= allowed


@contextmanager
def _opacus_hooks(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a backward pass leaves `grad_sample` on the trained parameters; afterwards nothing is left of it.

    Opacus reads what goes into a layer only where the layer is in training mode; the layers that it is asked about here
    have no other use for the mode.
    """
    try:
        from opacus.grad_sample import GradSampleModule
    except ImportError as error:
        raise InputError(OPACUS_IS_MISSING) from error
    modules = _trainable_modules(model)
    was_training = [module.training for module in modules]
    hooks = GradSampleModule(model, loss_reduction="sum")
    try:
        for module in modules:
            module.training = True
        yield
    finally:
        hooks.remove_hooks()
        for module, training in zip(modules, was_training, strict=True):
            module.training = training
            vars(module).pop("activations", None)
            vars(module).pop("max_batch_len", None)
        for parameter in model.parameters():
            for name in _OPACUS_ATTRIBUTES:
                vars(parameter).pop(name, None)


def _trainable_modules(model: nn.Module) -> list[nn.Module]:
    """Those that hold a trained parameter themselves."""
    return [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]


def _has_sampler(module: nn.Module) -> bool:
    try:
        from opacus.grad_sample import GradSampleModule
    except ImportError as error:
        raise InputError(OPACUS_IS_MISSING) from error
    known: dict[Any, Any] = GradSampleModule.GRAD_SAMPLERS
    return type(module) in known or type(module) is Bottleneck
