"""AWQ (Lin et al., arXiv 2306.00978): scale up the input channels that matter before rounding to nearest.

W x = (W diag(s)) (diag(s)^-1 x), and s^-1 goes into the layer before: the norm that query, key and value, or gate and
up, read; the rows of up for down; the rows of value for output where both are as wide. Equations 4 and 5 of the paper:

    s = mean|x|^alpha,  alpha = argmin || Q(W diag(s)) diag(s)^-1 X - W X ||^2  over a grid of 20 values in [0, 1)

summed over the layers that read the same input. Then each group's range may be cut to what rounds best ("clipping").
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from cotune.compression.calibration import (
    LayerProgress,
    LayerStatistics,
    WalkedBlock,
    chosen_linears,
    reconstruction_error,
    squared_outputs,
    walk_blocks,
)
from cotune.compression.grid import Grid
from cotune.compression.round_to_nearest import round_to_nearest
from cotune.errors import InputError
from cotune.models.packed_weights import PackedWeight

# A pair of layers in one module whose first's outputs are the second's input channels.
_PAIRS = (("v_proj", "o_proj"), ("up_proj", "down_proj"))
# Queries and keys only meet in products, which a cut range changes more than a layer's own error says.
_NEVER_CLIPPED = ("q_proj", "k_proj")
_SMALLEST_SCALE = 1e-4
# How far a block's output may move when scales go from one of its layers to another, as a share of its size.
_MAX_DRIFT = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True, kw_only=True)
class Awq:
    """AWQ over the blocks of a model, one after another. Besides the linear layers it changes norms.

    Raises:
        InputError: fewer than one value of alpha, or a share of clipping outside of [0, 1).
    """

    num_alphas: int = 20
    """How many values of alpha are tried: 0, 1 / num_alphas, and so on. The first is round-to-nearest."""
    max_clip: float = 0.5
    """The most that is cut of a group's range, in steps of a twentieth of the range; 0 for no clipping."""

    def __post_init__(self) -> None:
        if self.num_alphas < 1:
            raise InputError(f"num_alphas is {self.num_alphas}, expected at least 1, such as 20")
        if not 0 <= self.max_clip < 1:
            raise InputError(f"max_clip is {self.max_clip}, expected 0 to less than 1, such as 0.5")

    def quantise_linears(
        self,
        model: PreTrainedModel,
        input_ids: NDArray[np.int64] | None,
        grid: Grid,
        *,
        skip: Collection[str] = (),
        batch_size: int = 4,
        on_layer: Callable[[LayerProgress], None] | None = None,
    ) -> dict[str, PackedWeight]:
        """See `Quantiser`. A layer in `skip` takes part in the scaling of those that read the same, and stays whole.

        Raises:
            InputError: also where scales cannot move from layer to layer without changing what a block computes.
        """
        if input_ids is None:
            raise InputError("no calibration texts came, which awq learns from; give some, or take rtn")
        names = chosen_linears(model, skip)
        packed: dict[str, PackedWeight] = {}
        for block in walk_blocks(model, input_ids, batch_size=batch_size):
            before = _observe(block)
            for group in _groups(block, before):
                if names.keys() & group.readers.keys():
                    group.move(self.search(group.weights(), before.of_group(group), grid))
            after = _observe(block)
            _check_drift(block, before.outputs, after.outputs)
            for name in block.linears:
                if name not in names:
                    continue
                weight = block.linears[name].weight
                whole = weight.detach().float().clone()
                clips = not name.endswith(_NEVER_CLIPPED)
                packed[name] = self.quantise_layer(whole, after.statistics[name], grid, clips=clips)
                with torch.no_grad():
                    weight.copy_(torch.from_numpy(packed[name].dequantised()))
                if on_layer is not None:
                    error = reconstruction_error(whole, weight.detach(), after.statistics[name].gram)
                    progress = LayerProgress(name=name, index=len(packed) - 1, num_layers=len(names), error=error)
                    on_layer(progress)
        return packed

    def search(self, weights: Sequence[Tensor], inputs: InputStatistics, grid: Grid) -> Tensor:
        """The scales of the input channels that layers share, float64 (in,).

        Args:
            weights: of the layers, (out, in).
            inputs: what they read.
        """
        best_error, best = float("inf"), torch.ones_like(inputs.mean_size)
        for step in range(self.num_alphas):
            scales = channel_scales(inputs.mean_size, step / self.num_alphas)
            error = sum(_rounding_error(weight, scales, inputs.gram, grid) for weight in weights)
            if error < best_error:
                best_error, best = error, scales
        return best

    def quantise_layer(
        self, weight: Tensor, statistics: LayerStatistics, grid: Grid, *, clips: bool = True
    ) -> PackedWeight:
        """Round a weight (out, in), each group with the range that gives the least error of what it adds to the output.

        Args:
            clips: False for the whole range.
        """
        if not clips or self.max_clip == 0:
            return round_to_nearest(weight, grid)
        num_in = weight.shape[1]
        groups = grid.grouped(weight.double())  # (out, num_groups, group_size)
        grams = list(_diagonal_blocks(statistics.gram, grid.group_size_of(num_in)))
        scales, zeros = grid.fit(weight)
        least = _group_errors(groups, scales, zeros, grams, grid)
        for step in range(1, round(self.max_clip * 20) + 1):
            cut_scales, cut_zeros = grid.fit(weight, shrink=1 - step / 20)
            errors = _group_errors(groups, cut_scales, cut_zeros, grams, grid)
            better = errors < least
            least = torch.where(better, errors, least)
            scales, zeros = torch.where(better, cut_scales, scales), torch.where(better, cut_zeros, zeros)
        return grid.pack(grid.codes(weight, grid.spread(scales, num_in), grid.spread(zeros, num_in)), scales, zeros)


@dataclass(frozen=True, kw_only=True, eq=False)
class InputStatistics:
    """What layers read that share an input.

    Attributes:
        gram: X^T X, float64 (in, in).
        mean_size: mean |x| of each channel, float64 (in,).
    """

    gram: Tensor
    mean_size: Tensor


def channel_scales(mean_size: Tensor, alpha: float) -> Tensor:
    """s = mean|x|^alpha, with the largest times the smallest made 1 by a common factor, as in the released code.

    Example:
        >>> channel_scales(torch.tensor([1.0, 16.0], dtype=torch.float64), 0.5)
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """
    scales = mean_size.pow(alpha).clamp(min=_SMALLEST_SCALE)
    return scales / (scales.max() * scales.min()).sqrt()


def _rounding_error(weight: Tensor, scales: Tensor, gram: Tensor, grid: Grid) -> float:
    scaled = weight.double() * scales
    lost = (scaled - grid.rounded(scaled)) / scales
    return squared_outputs(lost, gram)


def _group_errors(groups: Tensor, scales: Tensor, zeros: Tensor, grams: Sequence[Tensor], grid: Grid) -> Tensor:
    """What rounding takes of what each group adds to the outputs, squared, (out, num_groups)."""
    scales, zeros = scales[..., None], zeros[..., None]
    lost = groups - scales * (grid.codes(groups, scales, zeros) - zeros)  # (out, num_groups, group_size)
    per_group = (lost[:, i, : len(gram)] for i, gram in enumerate(grams))
    return torch.stack([((own @ gram) * own).sum(1) for own, gram in zip(per_group, grams, strict=True)], dim=1)


def _diagonal_blocks(gram: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(gram), size):
        yield gram[start : start + size, start : start + size]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Group:
    """Linear layers that read the same, and the layer before, from which scales can move into them.

    Attributes:
        readers: the layers by name.
        before: a norm whose output they read, or a linear layer whose output channels are theirs.
    """

    readers: dict[str, nn.Linear]
    before: nn.Module

    def weights(self) -> list[Tensor]:
        return [layer.weight.detach() for layer in self.readers.values()]

    def move(self, scales: Tensor) -> None:
        """Multiply the readers' input channels with `scales`, and divide what the layer before puts out."""
        with torch.no_grad():
            for layer in self.readers.values():
                layer.weight.mul_(scales.to(layer.weight.dtype))
            for parameter in self.before.parameters(recurse=False):
                divisor = scales.to(parameter.dtype)
                parameter.div_(divisor if parameter.ndim == 1 else divisor[:, None])


def _groups(block: WalkedBlock, seen: _Observed) -> list[_Group]:
    by_norm: dict[nn.Module, dict[str, nn.Linear]] = {}
    for name, norm in seen.norms.items():
        by_norm.setdefault(norm, {})[name] = block.linears[name]
    groups = [_Group(readers=readers, before=norm) for norm, readers in by_norm.items() if _is_gain(norm)]
    for first, second in _PAIRS:
        for name, reader in block.linears.items():
            before = block.linears.get(f"{name.removesuffix(second)}{first}")
            if name.endswith(f".{second}") and before is not None and before.out_features == reader.in_features:
                groups.append(_Group(readers={name: reader}, before=before))
    return groups


def _is_gain(norm: nn.Module) -> bool:
    """Whether dividing its parameters divides its output: not so for norms that multiply with 1 + weight."""
    parameters = list(norm.parameters(recurse=False))
    if any(parameter.ndim != 1 for parameter in parameters):
        return False
    like = parameters[0]
    probe = torch.linspace(-1, 1, len(like), dtype=like.dtype, device=like.device)
    with torch.no_grad():
        once = norm(probe)
        for parameter in parameters:
            parameter.mul_(2)
        twice = norm(probe)
        for parameter in parameters:
            parameter.div_(2)
    return bool(torch.allclose(twice, 2 * once, rtol=0.02))


class _Observed:
    """One pass through a block: what its linear layers read, from whom, and what the block puts out."""

    def __init__(self) -> None:
        self.statistics: dict[str, LayerStatistics] = {}
        self.norms: dict[str, nn.Module] = {}
        self.outputs = torch.empty(0)
        self._sizes: dict[str, Tensor] = {}
        self._written: list[tuple[Tensor, nn.Module]] = []

    def of_group(self, group: _Group) -> InputStatistics:
        name = next(iter(group.readers))
        statistics = self.statistics[name]
        return InputStatistics(gram=statistics.gram, mean_size=self._sizes[name] / statistics.num_rows)

    def read_by(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs: Tensor = arguments[0]
            sizes = inputs.detach().abs().flatten(0, -2).double().sum(0)
            self._sizes[name] = self._sizes[name] + sizes if name in self._sizes else sizes
            for tensor, writer in self._written:
                if tensor is inputs:
                    self.norms[name] = writer

        return look

    def wrote(self, module: nn.Module, arguments: Any, outputs: Any) -> None:
        self._written.append((outputs, module))

    def ended(self, module: nn.Module, arguments: Any, outputs: Any) -> None:
        self._written.clear()
        if not len(self.outputs):
            self.outputs = (outputs if isinstance(outputs, Tensor) else outputs[0]).detach().clone()


def _observe(block: WalkedBlock) -> _Observed:
    seen = _Observed()
    with ExitStack() as stack:
        for name, linear in block.linears.items():
            stack.callback(linear.register_forward_pre_hook(seen.read_by(name)).remove)
        for module in block.module.modules():
            if not isinstance(module, nn.Linear) and any(True for _ in module.parameters(recurse=False)):
                stack.callback(module.register_forward_hook(seen.wrote).remove)
        stack.callback(block.module.register_forward_hook(seen.ended).remove)
        seen.statistics = block.statistics()
    return seen


def _check_drift(block: WalkedBlock, before: Tensor, after: Tensor) -> None:
    drift = float((after - before).float().norm() / before.float().norm().clamp(min=1e-12))
    if not drift <= _MAX_DRIFT[before.dtype]:
        raise InputError(
            f"moving scales between the layers of {block.name} changes its output by a share of {drift:.2g}, expected "
            "rounding alone; AWQ does not know this architecture, take gptq"
        )
