"""How a LoRA starts: at zero in a random direction, or from the model's weights, activations or gradients.

Where peft 0.21 has the initialisation, peft makes it. Those that move a part of the weights into the adapter (PiSSA,
OLoRA, CorDA, LoRA-GA) leave the model as it was and become ordinary adapters when they are trained; see
`cotune.models.residual_lora`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cotune.data.batches import EncodedExample, TokenBatch, pad_batch
from cotune.errors import InputError
from cotune.models.adapters import (
    LoraAdapter,
    LoraShape,
    checked_targets,
    has_transposed_weights,
    linear_sizes,
    lora_config,
)
from cotune.models.backbone import Backbone
from cotune.models.low_bit import dequantised, is_low_bit, original_weights
from cotune.models.peft_adapter import PeftAdapter, wrapped_in_peft
from cotune.models.residual_lora import ResidualLora
from cotune.models.seeded import seeded
from cotune.models.selected import SelectedParameters
from cotune.tuning.answer_loss import answer_nats

if TYPE_CHECKING:
    import peft
    from peft.tuners.lora.layer import LoraLayer
    from transformers import PreTrainedModel

NUM_CALIBRATION_EXAMPLES = 32
"""Texts that an initialisation looks at, at most."""
BATCH_SIZE = 4
MAX_EVA_PASSES = 2000
"""Forward passes of EVA, at most."""
# What peft leaves behind in the model's own layers.
_TRACES = (
    "eigens",
    "sample_count",
    "covariance_matrix",
    "corda_method",
    "rank",
    "_peft_loraga_grad",
    "_peft_loraga_grad_count",
)


@dataclass(frozen=True)
class Calibration:
    """What an initialisation may look at.

    Attributes:
        backbone: the model; plain.
        batches: of training texts.
    """

    backbone: Backbone
    batches: list[TokenBatch]


@dataclass(frozen=True, kw_only=True)
class LoraInit:
    """One way to start."""

    summary: str
    """For people, with its source."""
    peft_value: bool | str = True
    """peft's `init_lora_weights`."""
    prepare: Callable[[Calibration, peft.LoraConfig], None] | None = None
    """Before the adapter is in the model."""
    finish: Callable[[Calibration, peft.PeftModel], None] | None = None
    """When it is in the model."""
    moves_weights: bool = False
    """Whether a part of the model's weights moves into the adapter."""
    reads_texts: bool = False
    """Whether it looks at training texts."""
    reads_rows: bool = False
    """Whether peft reads weights as (out, in) only, which GPT-2's are not."""
    num_directions: int = 0
    """Singular vectors that it takes of each layer for each rank."""
    freezes_b: bool = False
    """Whether B stays as it is and A alone is trained."""


def initial_lora(
    backbone: Backbone, shape: LoraShape, init: str, examples: Sequence[EncodedExample], *, seed: int
) -> LoraAdapter | ResidualLora | PeftAdapter:
    """A LoRA to start from; the backbone is as before afterwards, bit for bit.

    Args:
        backbone: to adapt.
        shape: rank, strength and layers.
        init: a name in `INITS`.
        examples: training texts, for those that read them; the first few are enough.
        seed: of what is random.

    Raises:
        InputError: an unknown name, or one that does not go with the shape, the model or the texts.

    Example:
        >>> adapter = initial_lora(backbone, LoraShape(), "pissa", (), seed=0)  # doctest: +SKIP
    """
    if init not in INITS:
        raise InputError(f"init is {init!r}, expected one of {', '.join(INITS)}")
    how, model = INITS[init], backbone.model
    _check(how, init, shape, model, examples)
    config = lora_config(model, shape)
    config.init_lora_weights = how.peft_value
    chosen = examples[:NUM_CALIBRATION_EXAMPLES] if how.reads_texts else ()
    pad = backbone.spec.pad_token_id
    batches = [pad_batch(chosen[i : i + BATCH_SIZE], pad) for i in range(0, len(chosen), BATCH_SIZE)]
    calibration = Calibration(backbone, batches)
    with _own_weights(model, config if how.moves_weights else None) as own, seeded(seed), warnings.catch_warnings():
        # peft advises to save another way, which `ResidualLora` does.
        warnings.filterwarnings("ignore", message=".*init_lora_weights.*", category=UserWarning)
        # ... and to save memory by another order of things, which the guard of the weights does not go with.
        warnings.filterwarnings("ignore", message=".*with eva initialization.*", category=UserWarning)
        # For LoRA-GA weights alone have gradients, which is meant so.
        warnings.filterwarnings("ignore", message="Full backward hook is firing.*", category=UserWarning)
        try:
            if how.prepare is not None:
                how.prepare(calibration, config)
            with wrapped_in_peft(model, config, seed) as wrapped:
                if how.finish is not None:
                    with seeded(seed):
                        how.finish(calibration, wrapped)
                params = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
        except (RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"init {init} failed on this model ({error}); take another init") from error
        moved = {name: p.detach().clone() for name, p in model.named_parameters() if _is_moved(name, p, own)}
    if how.freezes_b:
        # A alone is trained; peft makes the same B again each time.
        return PeftAdapter(config=config, params=params)
    adapter = LoraAdapter(shape=shape, params=params)
    if not how.moves_weights:
        return adapter
    return ResidualLora(adapter=adapter, start=params, residual=SelectedParameters(params=moved))


def _check(
    how: LoraInit, init: str, shape: LoraShape, model: PreTrainedModel, examples: Sequence[EncodedExample]
) -> None:
    if how.reads_texts and not examples:
        raise InputError(f"init {init} looks at training texts and there are none; give examples, or another init")
    if (how.moves_weights or how.freezes_b) and shape.use_dora:
        raise InputError(f"init {init} does not go with DoRA, whose row lengths are of the whole weight; take default")
    if (how.moves_weights or how.freezes_b) and is_low_bit(model):
        raise InputError(f"init {init} reads whole weights and the model has low-bit ones; take default, eva or loftq")
    narrowest = min(
        min(sizes)
        for name, sizes in linear_sizes(model).items()
        if name.rpartition(".")[2] in checked_targets(model, shape.targets)
    )
    if how.num_directions * shape.rank > narrowest:
        raise InputError(
            f"rank is {shape.rank}, expected at most {narrowest // how.num_directions} for init {init}, because the "
            f"narrowest adapted layer has {narrowest} directions; lower the rank, adapt fewer layers, or take default"
        )
    if how.reads_rows and has_transposed_weights(model):
        raise InputError(
            f"init {init} of peft does not know weights as (in, out), as GPT-2 has them; take another init"
        )
    if init == "loftq" and not is_low_bit(model):
        raise InputError("init loftq makes up for a low-bit model and it has whole weights; give base bits")


@contextmanager
def _own_weights(model: PreTrainedModel, moving: peft.LoraConfig | None) -> Iterator[dict[str, Tensor]]:
    """Inside, the weights that the config adapts are copies and may be changed; afterwards all is as before.

    Args:
        model: the plain model.
        moving: None where nothing will be changed, and nothing is copied.
    """
    parameters = dict(model.named_parameters())
    targets = () if moving is None else tuple(f".{target}.weight" for target in moving.target_modules)
    own = {name: parameter.data for name, parameter in parameters.items() if name.endswith(targets)}
    was_training = model.training
    trainable = {name: parameter.requires_grad for name, parameter in parameters.items()}
    # Where peft fails in the middle, it leaves its hooks in the layers.
    hooks = [(hooks, dict(hooks)) for m in model.modules() for hooks in (m._forward_hooks, m._backward_hooks)]
    for name, data in own.items():
        parameters[name].data = data.clone()
    try:
        yield own
    finally:
        for name, data in own.items():
            parameters[name].data = data
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(trainable[name])
        for now, before in hooks:
            now.clear()
            now.update(before)
        for module in model.modules():
            for trace in _TRACES:
                module.__dict__.pop(trace, None)
        model.train(was_training)


def _is_moved(name: str, parameter: Tensor, own: dict[str, Tensor]) -> bool:
    return name in own and not torch.equal(parameter, own[name])


def _layers(wrapped: peft.PeftModel) -> list[LoraLayer]:
    from peft.tuners.lora.layer import LoraLayer

    return [module for module in wrapped.modules() if isinstance(module, LoraLayer)]


def _set_a(layer: LoraLayer, a: Tensor) -> None:
    old = layer.lora_A["default"].weight
    old.data.copy_(a.to(old))


def _orthonormal(calibration: Calibration, wrapped: peft.PeftModel) -> None:
    for layer in _layers(wrapped):
        a = layer.lora_A["default"].weight
        _set_a(layer, torch.nn.init.orthogonal_(torch.empty(a.shape)))


def _eva(calibration: Calibration, wrapped: peft.PeftModel) -> None:
    import peft

    rank = wrapped.peft_config["default"].r
    num_tokens = min(int(batch.attention_mask.sum()) for batch in calibration.batches)
    if num_tokens < rank:
        raise InputError(
            f"init eva needs at least {rank} tokens in each batch of texts for rank {rank}, and one has {num_tokens}; "
            "give longer texts or a smaller rank"
        )
    inputs = [
        {"input_ids": torch.from_numpy(b.input_ids), "attention_mask": torch.from_numpy(b.attention_mask)}
        for b in calibration.batches
    ]
    peft.initialize_lora_eva_weights(wrapped, dataloader=inputs, forward_fn=_counted_passes(), show_progress_bar=False)


def _counted_passes() -> Callable[[Any, Any], Any]:
    """peft reads the texts again and again until nothing changes, without an end of its own."""
    num_passes = 0

    def run(model: Any, inputs: Any) -> Any:
        nonlocal num_passes
        num_passes += 1
        if num_passes > MAX_EVA_PASSES:
            raise InputError(
                f"init eva found no stable directions in {MAX_EVA_PASSES} passes over the texts; "
                "give more or longer texts, or take another init"
            )
        return model(**inputs)

    return run


def _use_eva(calibration: Calibration, config: peft.LoraConfig) -> None:
    import peft

    # rho = 1: each layer keeps its rank.
    config.eva_config = peft.EvaConfig(rho=1.0)


def _use_corda(calibration: Calibration, config: peft.LoraConfig) -> None:
    from peft.tuners.lora.config import CordaConfig

    model = calibration.backbone.model
    config.corda_config = CordaConfig(corda_method="kpm", verbose=False)

    def read_texts() -> None:
        # One text at a time, without padding, which peft would count in.
        for batch in calibration.batches:
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
                model(input_ids=torch.from_numpy(ids[mask == 1][None]).to(model.device), use_cache=False)

    # Only now: it needs attrs, which peft does not declare and nothing else here uses.
    from peft.tuners.lora.corda import preprocess_corda

    preprocess_corda(model, config, run_model=read_texts)


def _use_lora_ga(calibration: Calibration, config: peft.LoraConfig) -> None:
    import peft
    from peft.tuners.lora.loraga import preprocess_loraga

    model = calibration.backbone.model
    config.lora_ga_config = peft.LoraGAConfig()

    def take_gradients() -> None:
        model.eval()  # no dropout
        with torch.enable_grad():
            for batch in calibration.batches:
                leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
                loss = answer_nats(model, model.get_output_embeddings(), leaves, batch).mean()
                loss.backward()  # type: ignore[no-untyped-call]

    preprocess_loraga(model, config, take_gradients)


def _loftq(calibration: Calibration, wrapped: peft.PeftModel) -> None:
    """A and B from the largest singular vectors of what rounding took away, W - Q(W): LoftQ with one step."""
    from peft.tuners.lora.layer import LoraLayer

    layers = {
        name.removeprefix("base_model.model."): m for name, m in wrapped.named_modules() if isinstance(m, LoraLayer)
    }
    for name, weight in original_weights(calibration.backbone.spec.name, [f"{name}.weight" for name in layers]):
        layer = layers[name.removesuffix(".weight")]
        lost = weight.float() - dequantised(layer.get_base_layer()).float().cpu()
        u, s, vh = torch.linalg.svd(lost, full_matrices=False)
        rank = min(layer.r["default"], len(s))
        root = (s[:rank] / layer.scaling["default"]).sqrt()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        a.data.zero_()[:rank] = (root[:, None] * vh[:rank]).to(a)
        b.data.zero_()[:, :rank] = (u[:, :rank] * root).to(b)


INITS: dict[str, LoraInit] = {
    "default": LoraInit(summary="A random (Kaiming), B zero; LoRA, arXiv 2106.09685"),
    "gaussian": LoraInit(summary="A normal with deviation 1 / rank, B zero", peft_value="gaussian"),
    "orthonormal": LoraInit(summary="rows of A orthonormal, B zero", finish=_orthonormal),
    "orthogonal": LoraInit(summary="A and B orthogonal to each other, B A = 0; even ranks", peft_value="orthogonal"),
    "pissa": LoraInit(
        summary="largest singular vectors of the weights; PiSSA, arXiv 2404.02948",
        peft_value="pissa",
        num_directions=1,
        moves_weights=True,
    ),
    "olora": LoraInit(
        summary="QR of the weights; OLoRA, arXiv 2406.01775", peft_value="olora", moves_weights=True, reads_rows=True
    ),
    "eva": LoraInit(
        summary="principal components of the activations; EVA, arXiv 2410.07170",
        peft_value="eva",
        num_directions=1,
        prepare=_use_eva,
        finish=_eva,
        reads_texts=True,
    ),
    "corda": LoraInit(
        summary="weights times the activations' covariance; CorDA, arXiv 2406.05223",
        peft_value="corda",
        num_directions=1,
        prepare=_use_corda,
        moves_weights=True,
        reads_texts=True,
    ),
    "lora_ga": LoraInit(
        summary="largest singular vectors of the gradient; LoRA-GA, arXiv 2407.05000",
        peft_value="lora_ga",
        num_directions=2,
        prepare=_use_lora_ga,
        moves_weights=True,
        reads_texts=True,
    ),
    "mica": LoraInit(
        summary="B frozen at the smallest singular vectors, A from zero; MiCA, arXiv 2604.01694",
        peft_value="mica",
        num_directions=1,
        freezes_b=True,
    ),
    "loftq": LoraInit(summary="makes up for a low-bit model's rounding; LoftQ, arXiv 2310.08659", finish=_loftq),
}
