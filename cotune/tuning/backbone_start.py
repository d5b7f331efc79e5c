"""A side network with attention that starts from pieces of the backbone, as in Ladder Side-Tuning (arXiv 2206.06522).

LST prunes each backbone block to the width of the side network: it keeps what matters most by Fisher information (sums
of squared gradients of the loss over a few texts), a head's being imp(q) imp(k) imp(v) imp(o). Here, for the block that
follows tap t_i of layer l, from the pieces of decoder layer l, which put that state out:

    S        the residual channels of the largest importance, one choice for all blocks
    A_i      pinv(C_i)[S]: what the tap still tells of these channels, by least squares
    Q, K     rows of the chosen heads, of every so-manyth rotary pair: their wavelengths are exactly the backbone's
    V, O     the chosen heads' most important dimensions;  G, U, D  the most important inner rows
    norms    the backbone's scales at S

A product that sums over n of N inputs is multiplied by sqrt(N / n), so that sizes stay. O and D are divided by the
usual size of the state at that tap where taps are normalised, since blocks add to raw states. Keys and values that
serve several chosen heads are the mean of theirs, after grouped-query attention (arXiv 2305.13245).

Deviations: LST's side network reads whole states, this one shared taps, so that A_i can restore S only as far as C_i
kept it; biases of attention and the division in Qwen 3's query and key norms are left out; Gemma's GELU becomes SiLU;
scaled wavelengths become plain ones. R and r stay zero: the start is exactly the base model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.models.anatomy import decoder_layers
from cotune.models.attention_ladder import AttentionLadder, AttentionLadderConfig
from cotune.models.backbone import Backbone
from cotune.models.projections import Projections
from cotune.tuning.answer_loss import TokenBatches, answer_nats
from cotune.tuning.side import SideConfig, attention_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_EXAMPLES = 16
"""Texts that importance is measured on, at most."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def ladder_from_backbone(backbone: Backbone, examples: Sequence[EncodedExample], config: SideConfig) -> AttentionLadder:
    """A side network for this backbone's taps, ready to be trained; it changes no logit.

    Args:
        backbone: of a Llama-like architecture; as before afterwards.
        examples: training texts, of which the first `NUM_EXAMPLES` are read forwards and backwards.
        config: the side network's shape; `attention` must be set. Its wavelengths become the backbone's.

    Raises:
        InputError: no texts, an architecture that does not fit, or a shape that is larger than the backbone.
    """
    if config.attention is None:
        raise InputError("init is 'backbone' and there is no attention, expected a side network with attention")
    if not examples:
        raise InputError("there are no examples to measure importance on, expected at least one")
    model, projections = backbone.model, backbone.projections
    layers = [_parts(model, layer) for layer in decoder_layers(model)]
    shape = attention_shape(
        config,
        num_taps=projections.num_taps,
        tap_dim=projections.tap_dim,
        basis_dim=projections.basis_dim,
        rope_theta=_rope_theta(model),
    )
    _check_shape(shape, model, layers[0])
    chosen = list(examples)[:NUM_EXAMPLES]
    importance = measure_importance(model, chosen, pad_token_id=backbone.spec.pad_token_id)
    sizes = _state_sizes(backbone, chosen) if projections.normalise else np.ones(projections.num_taps)
    network = AttentionLadder(shape, torch.Generator().manual_seed(config.seed))
    with torch.no_grad():
        _fill(network, layers, importance, projections, sizes)
    return network


@dataclass(frozen=True)
class LayerImportance:
    """Sums of squared gradients of one decoder layer's weights, float64.

    Attributes:
        query, key: (heads or kv_heads, head_dim), by row.
        value: (kv_heads, head_dim), by row.
        output: (heads, head_dim), by column.
        inner: (gate, up and down, ff), by row, row and column.
        channels: (hidden,), of all matrices, by their side that touches the residual stream.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    inner: Tensor
    channels: Tensor

    @property
    def heads(self) -> Tensor:
        """log imp(q) imp(k) imp(v) imp(o) of each query head, (heads,)."""
        groups = self.query.shape[0] // self.key.shape[0]
        own = [self.query.sum(1), self.output.sum(1)]
        shared = [part.sum(1).repeat_interleave(groups) for part in (self.key, self.value)]
        return torch.stack([*own, *shared]).log().sum(0)


def measure_importance(
    model: PreTrainedModel, examples: Sequence[EncodedExample], *, pad_token_id: int
) -> list[LayerImportance]:
    """Fisher information of each decoder layer: gradients of each text's mean loss, squared and summed over texts.

    A gradient is summed up and dropped as soon as it is there, so that memory is that of one matrix.

    Args:
        model: of a Llama-like architecture; as before afterwards.
        examples: at least one.
        pad_token_id: of the model.
    """
    layers = [_parts(model, layer) for layer in decoder_layers(model)]
    rows: dict[Tensor, Tensor] = {}
    columns: dict[Tensor, Tensor] = {}

    def take(weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter) and weight.grad is not None
        squared = weight.grad.double().square()
        weight.grad = None
        rows[weight] = rows.get(weight, 0) + squared.sum(1).cpu()
        columns[weight] = columns.get(weight, 0) + squared.sum(0).cpu()

    weights = [part.weight for layer in layers for part in layer.linears.values()]
    with _watched(model, weights, take):
        head, params = model.get_output_embeddings(), dict(model.named_parameters())
        for batch in TokenBatches(examples, 1, pad_token_id=pad_token_id, seed=0).epoch(0):
            answer_nats(model, head, params, batch).mean().backward()  # type: ignore[no-untyped-call]
    return [_importance_of(layer, rows, columns) for layer in layers]


@contextmanager
def _watched(model: PreTrainedModel, weights: Sequence[Tensor], take: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, `take` gets each of the weights after each backward pass, and nothing else has a gradient."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    handles = []
    try:
        for weight in weights:
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
            parameter.grad = None


@dataclass(frozen=True)
class _Parts:
    """One decoder layer's linear layers by name, its norms, and its heads' width."""

    linears: dict[str, nn.Linear]
    attention_norm: nn.Module
    ff_norm: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    head_dim: int

    @property
    def num_heads(self) -> int:
        return self.linears["q_proj"].out_features // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.linears["k_proj"].out_features // self.head_dim


def _parts(model: PreTrainedModel, layer: nn.Module) -> _Parts:
    modules = dict(layer.named_modules())
    names = {name: f"self_attn.{name}" for name in _ATTENTION} | {name: f"mlp.{name}" for name in _FEED_FORWARD}
    linears = {name: modules[place] for name, place in names.items() if isinstance(modules.get(place), nn.Linear)}
    norms = [modules.get(name) for name in ("input_layernorm", "post_attention_layernorm")]
    # Gemma 2 and 3 normalise what each half puts out, which no pruned weight can do.
    if len(linears) < len(names) or None in norms or "pre_feedforward_layernorm" in modules:
        raise InputError(
            f"a side network cannot start from {type(model).__name__}: expected Llama-like layers (Llama, Qwen2, "
            "Qwen3, Mistral, Gemma 1); take init 'random'"
        )
    return _Parts(
        linears=linears,
        attention_norm=norms[0],  # type: ignore[arg-type]
        ff_norm=norms[1],  # type: ignore[arg-type]
        query_norm=modules.get("self_attn.q_norm"),
        key_norm=modules.get("self_attn.k_norm"),
        head_dim=int(modules["self_attn"].head_dim),
    )


def _rope_theta(model: PreTrainedModel) -> float:
    parameters = getattr(model.config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta", 10000.0))


def _check_shape(shape: AttentionLadderConfig, model: PreTrainedModel, layer: _Parts) -> None:
    hidden, inner = int(model.config.hidden_size), layer.linears["gate_proj"].out_features
    for name, value, most in (
        ("side_width", shape.side_width, hidden),
        ("inner_width", shape.ff_width, inner),
        ("side_width // head_dim", shape.num_heads, layer.num_heads),
    ):
        if value > most:
            raise InputError(f"{name} is {value}, expected at most {most}, what the backbone has to start from")
    if layer.head_dim % shape.head_dim:
        raise InputError(
            f"head_dim is {shape.head_dim}, expected a divisor of the backbone's, {layer.head_dim}, to start from it"
        )


def _importance_of(layer: _Parts, rows: dict[Tensor, Tensor], columns: dict[Tensor, Tensor]) -> LayerImportance:
    weights = {name: part.weight for name, part in layer.linears.items()}
    reads = [columns[weights[name]] for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")]
    writes = [rows[weights[name]] for name in ("o_proj", "down_proj")]
    inner = [rows[weights["gate_proj"]], rows[weights["up_proj"]], columns[weights["down_proj"]]]
    return LayerImportance(
        query=rows[weights["q_proj"]].view(-1, layer.head_dim),
        key=rows[weights["k_proj"]].view(-1, layer.head_dim),
        value=rows[weights["v_proj"]].view(-1, layer.head_dim),
        output=columns[weights["o_proj"]].view(-1, layer.head_dim),
        inner=torch.stack(inner),
        channels=torch.stack([*reads, *writes]).sum(0),
    )


def _state_sizes(backbone: Backbone, examples: Sequence[EncodedExample]) -> NDArray[np.float64]:
    """Root mean square of the state at each tap, float64 (taps,), mean over positions."""
    sizes = [
        np.sqrt(np.square(backbone.read_states(example.input_ids)[0], dtype=np.float64).mean(axis=2))
        for example in examples
    ]
    means: NDArray[np.float64] = np.concatenate(sizes).mean(axis=0)
    return means


def _fill(
    network: AttentionLadder,
    layers: Sequence[_Parts],
    importance: Sequence[LayerImportance],
    projections: Projections,
    sizes: NDArray[np.float64],
) -> None:
    config, rungs = network.config, network.ladder
    assert config.tap_indices is not None
    channels = _largest(torch.stack([one.channels for one in importance]).sum(0), config.side_width)
    rungs.mix_bias.zero_()
    for place, tap in enumerate(config.tap_indices):
        if projections.has_whole_states:
            restored = torch.eye(projections.hidden_size)
        else:
            restored = torch.from_numpy(np.linalg.pinv(projections.taps[tap].astype(np.float64))).float()
        rungs.mix_weight[place] = restored[channels]
    for i, tap in enumerate(config.tap_indices[1:]):
        number = projections.tap_layers[tap] - 1
        piece = _prune(layers[number], importance[number], channels, config)
        size = float(sizes[tap])
        for name, value in piece.items():
            parameter: nn.Parameter = getattr(rungs, name)
            parameter[i] = value / size if name in ("output_weight", "down_weight") else value


def _prune(
    layer: _Parts, importance: LayerImportance, channels: Tensor, config: AttentionLadderConfig
) -> dict[str, Tensor]:
    """One block's tensors by name, before they are scaled for the state's size."""
    head_dim, per_kv = config.head_dim, config.num_heads // config.num_kv_heads
    weights = {name: part.weight.detach().float().cpu() for name, part in layer.linears.items()}
    hidden = weights["q_proj"].shape[1]
    q, k, v = (weights[name].view(-1, layer.head_dim, hidden)[:, :, channels] for name in _ATTENTION[:3])
    o = weights["o_proj"][channels].view(len(channels), -1, layer.head_dim)
    half, step = layer.head_dim // 2, layer.head_dim // head_dim
    pairs = torch.cat([torch.arange(0, half, step), torch.arange(half, 2 * half, step)])
    q = (q * _scale(layer.query_norm, layer.head_dim)[:, None])[:, pairs]
    k = (k * _scale(layer.key_norm, layer.head_dim)[:, None])[:, pairs]
    groups = layer.num_heads // layer.num_kv_heads
    heads = _largest(importance.heads, config.num_heads).view(-1, per_kv)  # (kv_heads, heads for each)
    keys, values, outputs = [], [], []
    for group in heads:
        kv = torch.unique(group // groups)
        dims = _largest(importance.value[kv].sum(0) * importance.output[group].sum(0), head_dim)
        keys.append(k[kv].mean(0))
        values.append(v[kv].mean(0)[dims])
        outputs += [o[:, head][:, dims] for head in group]
    inner = _largest(importance.inner.log().sum(0), config.ff_width)
    read = math.sqrt(hidden / len(channels))
    write = math.sqrt(layer.num_heads * layer.head_dim / (config.num_heads * head_dim))
    write_inner = math.sqrt(importance.inner.shape[1] / config.ff_width)
    return {
        "attention_norm": _scale(layer.attention_norm, hidden)[channels],
        "query_weight": q[heads.flatten()].flatten(0, 1) * read,
        "key_weight": torch.cat(keys) * read,
        "value_weight": torch.cat(values) * read,
        "output_weight": torch.cat(outputs, dim=1) * write,
        "ff_norm": _scale(layer.ff_norm, hidden)[channels],
        "gate_weight": weights["gate_proj"][inner][:, channels] * read,
        "up_weight": weights["up_proj"][inner][:, channels] * read,
        "down_weight": weights["down_proj"][channels][:, inner] * write_inner,
    }


def _largest(importance: Tensor, count: int) -> Tensor:
    """Indices of the largest, ascending, int64 (count,)."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def _scale(norm: nn.Module | None, width: int) -> Tensor:
    """A norm's learned scale (width,), whatever its parameter means: what it makes of ones."""
    if norm is None:
        return torch.ones(width)
    parameter = next(norm.parameters())
    scale: Tensor = norm(torch.ones(width, dtype=parameter.dtype, device=parameter.device))
    return scale.detach().float().cpu()
