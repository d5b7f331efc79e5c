"""What compressing a model is made of: one frozen description for each stage, which also does it.

    Prune       weights or whole parts go                           a model folder
    Distil      the model learns what a teacher says                a model folder
    Quantise    8, 4 or 3 bits for each weight of a linear layer    a model folder with packed weights
    Recover     LoRA on what is there                               merged, or beside weights of few bits
    Export      ONNX or GGUF                                        an offline model folder

They go in this order (`check_stages`), each reads the folder that the one before wrote, and `Recover` may follow any of
the first three. LoRA cannot go into quantised weights without losing their bits, so there it stays an adapter beside
them, trained on the weights as they are after rounding; both runtimes put it on when they open the model.

Zeros stay zeros: what is learnt about weights that were pruned one by one is dropped when it is merged, and where the
held-out texts then say that it made things worse, the weights stay as they were.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cotune.compression.calibration import CalibrationTexts, LayerProgress
from cotune.compression.depth import Depth
from cotune.compression.distil import DistilSettings, distil
from cotune.compression.fewer_layers import spread_layers, with_fewer_layers
from cotune.compression.gguf_adapter import export_gguf_adapter
from cotune.compression.gguf_export import GgufExportConfig, export_gguf
from cotune.compression.gptq import Gptq
from cotune.compression.grid import Grid
from cotune.compression.magnitude import Magnitude
from cotune.compression.model_folder import save_model
from cotune.compression.onnx_export import OnnxExportConfig, export_onnx
from cotune.compression.prune import PRUNERS, prune
from cotune.compression.pruner import Amount, Pruner, count_of, share_of, sparsity_of
from cotune.compression.quantise import QUANTISERS, Quantiser, quantise
from cotune.compression.quantised_folder import save_quantised
from cotune.compression.round_to_nearest import RoundToNearest
from cotune.compression.sparse_gpt import SparseGpt
from cotune.compression.sparsity import RowSparsity
from cotune.compression.teacher_cache import CachedTeacher
from cotune.compression.wanda import Wanda
from cotune.data.batches import EncodedExample
from cotune.data.templates import Example
from cotune.distillation.divergences import DIVERGENCES
from cotune.distillation.teacher import LocalTeacher, Teacher
from cotune.errors import InputError
from cotune.models.adapters import LoraShape
from cotune.models.backbone import Backbone
from cotune.models.packed_folder import is_packed
from cotune.models.selected import SelectedParameters
from cotune.models.weights import DTYPES
from cotune.tuning.attached import Tunable
from cotune.tuning.loop import EpochRecord, LoopConfig, LoopProgress
from cotune.tuning.lora import Lora, target_nats
from cotune.tuning.personal import encode_examples, split_examples
from cotune.tuning.tune import TuneConfig, tune

HELDOUT_SHARE = 0.1
"""Part of the texts that chooses the best epoch instead of training."""

Tell = Callable[[int, int, str], None]
"""Hears of progress inside a stage: done, total, a note."""


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """What a stage works on.

    Attributes:
        original: the model that all began with.
        source: folder of the model as it is.
        adapter: peft folder of a LoRA that stands beside it; None where there is none.
        out: folder to write; nothing is there yet, and nothing else is in the folder around it.
        scratch: folder for checkpoints.
        calibration: texts to measure layers with; None where there are none.
        examples: texts to learn from; may be empty.
        max_length: tokens of each of these; None for the model's context.
        teacher: makes whom to learn from; None for the original model.
        dtype: of whole weights in the folders.
        seed: of all that is random.
        resume: whether to go on from checkpoints.
        tell: hears of progress.
    """

    original: str
    source: Path
    adapter: Path | None
    out: Path
    scratch: Path
    calibration: CalibrationTexts | None
    examples: Sequence[Example]
    max_length: int | None
    teacher: Callable[[], Teacher] | None
    dtype: str
    seed: int
    resume: bool
    tell: Tell

    @property
    def adapter_out(self) -> Path:
        """Where an adapter is written that stands beside the model; nothing is there yet."""
        return self.out.with_name("adapter")

    def load(self) -> Backbone:
        """The model as it is, in float32, with the numbers that its folders can hold."""
        backbone = Backbone.from_pretrained(str(self.source))
        # Quantised weights are what they are: their folder holds them exactly.
        if self.dtype != "float32" and not is_packed(self.source):
            with torch.no_grad():
                for parameter in backbone.model.parameters():
                    parameter.copy_(parameter.to(DTYPES[self.dtype]))
        return backbone

    def texts(self, backbone: Backbone) -> tuple[list[EncodedExample], list[EncodedExample]]:
        """To learn from, and to choose the best epoch by."""
        encoded = encode_examples(backbone.tokenizer_json, self.examples, backbone.description, self.max_length)
        train, first, second = split_examples(encoded, HELDOUT_SHARE, self.seed)
        return train, [*first, *second]

    def tell_layer(self, progress: LayerProgress) -> None:
        self.tell(progress.index + 1, progress.num_layers, progress.name)

    def tell_step(self, progress: LoopProgress) -> None:
        self.tell(progress.step, progress.num_steps, f"loss {progress.loss:.3f}")


@dataclass(frozen=True, kw_only=True)
class StageOutcome:
    """What a stage made.

    Attributes:
        folder: of the model.
        adapter: that stands beside it.
        report: what became of it, JSON values.
    """

    folder: Path
    adapter: Path | None = None
    report: dict[str, Any]


class Stage(Protocol):
    """One step; a frozen description whose `repr` tells it from any other."""

    kind: ClassVar[str]
    """prune, distil, quantise, recover or export."""

    @property
    def label(self) -> str:
        """For people, short."""
        ...

    @property
    def needs_calibration(self) -> bool:
        """Whether it measures layers on texts."""
        ...

    @property
    def needs_examples(self) -> bool:
        """Whether it learns from texts."""
        ...

    def run(self, work: StageWork) -> StageOutcome:
        """Do it.

        Raises:
            InputError: the model, the texts or the disk do not allow it; nothing is left at `work.out`.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Take weights or parts away; see `cotune.compression.prune`.

    Example:
        >>> Prune(how=Depth(), amount=2).label
        'prune depth 2'
    """

    kind: ClassVar[str] = "prune"

    how: Pruner
    """A method with its settings."""
    amount: Amount
    """How much goes; what it means is the method's."""

    def __post_init__(self) -> None:
        if isinstance(self.how, Magnitude | Wanda | SparseGpt):
            sparsity_of(self.amount, RowSparsity)
        elif isinstance(self.how, Depth):
            count_of(self.amount)
        else:
            share_of(self.amount)

    @property
    def label(self) -> str:
        return f"prune {_name_in(PRUNERS, self.how)} {self.amount}"

    @property
    def needs_calibration(self) -> bool:
        return not isinstance(self.how, Magnitude)

    @property
    def needs_examples(self) -> bool:
        return False

    def run(self, work: StageWork) -> StageOutcome:
        """See `Stage`."""
        backbone = work.load()
        report = prune(backbone.model, self.how, self.amount, work.calibration, on_layer=work.tell_layer)
        save_model(work.out, backbone.model, source=str(work.source), dtype=work.dtype)
        return StageOutcome(folder=work.out, report=report.as_json())


@dataclass(frozen=True, kw_only=True)
class Distil:
    """Learn what a teacher says of each next token; see `cotune.compression.distil`."""

    kind: ClassVar[str] = "distil"

    settings: DistilSettings = field(default_factory=DistilSettings)
    """Loss, own texts, epochs; `seed` is that of the run."""
    num_layers: int | None = None
    """Decoder layers that the student keeps, spread evenly; None keeps all."""

    def __post_init__(self) -> None:
        if self.num_layers is not None and self.num_layers < 1:
            raise InputError(f"num_layers is {self.num_layers}, expected at least 1 layer for the student")

    @property
    def label(self) -> str:
        kept = "" if self.num_layers is None else f" to {self.num_layers} layers"
        kinds = {name: type(make(0.5)) for name, make in DIVERGENCES.items()}
        return f"distil {_name_in(kinds, self.settings.divergence)}{kept}"

    @property
    def needs_calibration(self) -> bool:
        return False

    @property
    def needs_examples(self) -> bool:
        return True

    def run(self, work: StageWork) -> StageOutcome:
        """See `Stage`. With `top_k` the teacher is asked about each text once, also over interruptions."""
        student = work.load()
        if self.num_layers is not None:
            student = with_fewer_layers(student, spread_layers(student.spec.num_layers, self.num_layers))
        texts, heldout = work.texts(student)
        teacher = LocalTeacher(Backbone.from_pretrained(work.original)) if work.teacher is None else work.teacher()
        settings = replace(self.settings, seed=work.seed)
        if settings.top_k is not None:
            cached = CachedTeacher(teacher, work.scratch / "teacher")
            cached.reserve([*texts, *heldout], settings.top_k)
            teacher = cached
        result = distil(
            student,
            teacher,
            texts,
            settings,
            heldout=heldout,
            run_dir=work.scratch,
            resume=work.resume,
            progress=work.tell_step,
        )
        told = _merged(student, result.adapter, heldout, result.curve)
        save_model(work.out, student.model, source=str(work.source), dtype=work.dtype)
        report = {"best_epoch": result.best_epoch, "num_trained": result.num_trained, **told}
        return StageOutcome(folder=work.out, report=report)


@dataclass(frozen=True, kw_only=True)
class Quantise:
    """Round the linear layers to few bits; see `cotune.compression.quantise`.

    Example:
        >>> Quantise(how=RoundToNearest(), bits=8).label
        'quantise rtn 8 bits'
    """

    kind: ClassVar[str] = "quantise"

    how: Quantiser = field(default_factory=Gptq)
    """A method with its settings."""
    bits: int = 4
    """8, 4 or 3."""
    group_size: int | None = 32
    """Weights with one scale: 32, 64 or 128 along a row, or None for a row."""
    is_symmetric: bool = False
    """Without zero points."""
    embedding_bits: int | None = 8
    """Of embedding and head; None leaves them whole. In small models they are most of the size."""

    def __post_init__(self) -> None:
        for bits in (self.bits, *(() if self.embedding_bits is None else (self.embedding_bits,))):
            Grid(bits=bits, group_size=self.group_size, is_symmetric=self.is_symmetric)

    @property
    def label(self) -> str:
        return f"quantise {_name_in(QUANTISERS, self.how)} {self.bits} bits"

    @property
    def needs_calibration(self) -> bool:
        return not isinstance(self.how, RoundToNearest)

    @property
    def needs_examples(self) -> bool:
        return False

    def run(self, work: StageWork) -> StageOutcome:
        """See `Stage`."""
        backbone = work.load()
        report = quantise(
            backbone.model,
            self.how,
            bits=self.bits,
            group_size=self.group_size,
            is_symmetric=self.is_symmetric,
            calibration=work.calibration,
            embedding_bits=self.embedding_bits,
            head_bits=self.embedding_bits,
            on_layer=work.tell_layer,
        )
        save_quantised(work.out, backbone.model, report.packed, method=report.method, source=str(work.source))
        return StageOutcome(folder=work.out, report=report.as_json())


@dataclass(frozen=True, kw_only=True)
class Recover:
    """LoRA on all linear layers: merged into whole weights, beside quantised ones."""

    kind: ClassVar[str] = "recover"

    rank: int = 8
    """Of the LoRA; its strength alpha is twice that."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(epochs=1, learning_rate=1e-3))
    """Epochs and learning rate."""
    num_batch_sequences: int = 8
    """Sequences in one step."""

    def __post_init__(self) -> None:
        self.config(0)

    @property
    def label(self) -> str:
        return f"recover LoRA rank {self.rank}"

    @property
    def needs_calibration(self) -> bool:
        return False

    @property
    def needs_examples(self) -> bool:
        return True

    def run(self, work: StageWork) -> StageOutcome:
        """See `Stage`. Of a quantised model the folder stays where it is, and only an adapter is written."""
        backbone = work.load()
        texts, heldout = work.texts(backbone)
        result = tune(
            backbone,
            texts,
            self.config(work.seed),
            heldout=heldout,
            run_dir=work.scratch,
            resume=work.resume,
            progress=work.tell_step,
        )
        report: dict[str, Any] = {"best_epoch": result.best_epoch, "num_trained": result.num_trained}
        if is_packed(work.source):
            result.adapter.save(work.adapter_out, backbone.model)
            report |= {"is_merged": False, **_losses(result.curve)}
            return StageOutcome(folder=work.source, adapter=work.adapter_out, report=report)
        report |= {"is_merged": True, **_merged(backbone, result.adapter, heldout, result.curve)}
        save_model(work.out, backbone.model, source=str(work.source), dtype=work.dtype)
        return StageOutcome(folder=work.out, report=report)

    def config(self, seed: int) -> TuneConfig:
        """What is tuned, and how."""
        shape = LoraShape(rank=self.rank, alpha=2.0 * self.rank)
        return TuneConfig(
            what=Lora(shape=shape), loop=self.loop, num_batch_sequences=self.num_batch_sequences, seed=seed
        )


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write an offline model folder.

    Example:
        >>> Export(config=GgufExportConfig(kind="Q8_0")).label
        'export gguf Q8_0'
    """

    kind: ClassVar[str] = "export"

    config: OnnxExportConfig | GgufExportConfig = field(default_factory=OnnxExportConfig)
    """How; its class says for which runtime."""

    @property
    def runtime(self) -> str:
        """onnx or gguf."""
        return "onnx" if isinstance(self.config, OnnxExportConfig) else "gguf"

    @property
    def label(self) -> str:
        if isinstance(self.config, GgufExportConfig):
            return f"export gguf {self.config.kind}"
        bits = self.config.rounding.bits
        return "export onnx" if bits is None else f"export onnx {bits} bits"

    @property
    def needs_calibration(self) -> bool:
        return False

    @property
    def needs_examples(self) -> bool:
        return False

    def run(self, work: StageWork) -> StageOutcome:
        """See `Stage`. An adapter beside the model becomes one that the runtime reads."""
        if work.adapter is not None:
            if self.runtime == "gguf":
                export_gguf_adapter(work.adapter, str(work.source), work.adapter_out)
            else:
                shutil.copytree(work.adapter, work.adapter_out)
        if isinstance(self.config, GgufExportConfig):
            export_gguf(work.source, work.out, self.config)
        else:
            export_onnx(work.source, work.out, self.config)
        adapter = None if work.adapter is None else work.adapter_out
        return StageOutcome(folder=work.out, adapter=adapter, report={"runtime": self.runtime})


ORDER = (Prune.kind, Distil.kind, Quantise.kind, Export.kind)
"""Of the stages; `Recover` stands behind any of the first three."""


def with_recovery(stages: Sequence[Stage], recover: Recover) -> list[Stage]:
    """The same stages with a recovery behind each that changes weights.

    Example:
        >>> [stage.kind for stage in with_recovery([Prune(how=Depth(), amount=1), Export()], Recover())]
        ['prune', 'recover', 'export']
    """
    return [each for stage in stages for each in ((stage,) if stage.kind == Export.kind else (stage, recover))]


def check_stages(stages: Sequence[Stage]) -> None:
    """Refuse stages that do not go together, before any is begun.

    Raises:
        InputError: there is none, they are in another order, or there are two where one alone makes sense.
    """
    if not stages:
        raise InputError("there is no stage, expected at least one of prune, distil, quantise and export")
    kinds = [stage.kind for stage in stages if stage.kind != Recover.kind]
    if not kinds:
        raise InputError("recover stands alone, expected a stage that it makes up for; use tune to tune a model")
    if kinds != sorted(kinds, key=ORDER.index):
        raise InputError(f"the stages are {', '.join(kinds)}, expected them in the order {', '.join(ORDER)}")
    for kind in (Quantise.kind, Export.kind):
        if kinds.count(kind) > 1:
            raise InputError(f"the stages have {kind} {kinds.count(kind)} times, expected it once")
    if stages[-1].kind == Recover.kind and Export.kind in kinds:
        raise InputError("recover stands behind export, expected it before: an exported model is not tuned")


def _merged(
    backbone: Backbone, adapter: Tunable, heldout: Sequence[EncodedExample], curve: Sequence[EpochRecord]
) -> dict[str, Any]:
    """Put what was learnt into the model's weights, which have their zeros afterwards; held-out losses."""
    model, told = backbone.model, _losses(curve)
    zeros = _zeros(model)
    nats_before = _nats(backbone, heldout) if zeros else None
    learnt: SelectedParameters = adapter.merge(model)
    own = dict(model.named_parameters())
    before = {name: own[name].detach().clone() for name in learnt.params} if zeros else {}
    with torch.no_grad():
        for name, tensor in learnt.params.items():
            own[name].copy_(tensor)
        for name, is_zero in zeros.items():
            own[name].masked_fill_(is_zero, 0)
    if zeros:
        # What the curve says is of weights without zeros.
        nats_after = _nats(backbone, heldout)
        is_worse = nats_before is not None and nats_after is not None and nats_after > nats_before
        with torch.no_grad():
            for name in before if is_worse else ():
                own[name].copy_(before[name])
        told |= {
            "nats_before": nats_before,
            "nats_after": nats_before if is_worse else nats_after,
            "is_taken_back": is_worse,
        }
    return told


def _nats(backbone: Backbone, heldout: Sequence[EncodedExample]) -> float | None:
    """Mean -log p of held-out targets; None without any."""
    if not heldout:
        return None
    # A backbone keeps things that were made of its weights.
    fresh = Backbone.from_model(backbone.model, backbone.tokenizer_json)
    return float(target_nats(fresh, heldout).mean())


def _zeros(model: PreTrainedModel) -> dict[str, Tensor]:
    """Where zeros were set, by the weights' names. A few happen to be in any model, and are nobody's choice."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            is_zero = module.weight.detach() == 0
            if float(is_zero.float().mean()) > 0.01:
                found[f"{name}.weight"] = is_zero
    return found


def _losses(curve: Sequence[EpochRecord]) -> dict[str, Any]:
    """Held-out losses before and at the best epoch, None without held-out texts."""
    known = [record.heldout_loss for record in curve if record.heldout_loss is not None]
    return {"nats_before": known[0] if known else None, "nats_after": min(known) if known else None}


def _name_in(known: Mapping[str, type[Any]], one: object) -> str:
    return next((name for name, kind in known.items() if type(one) is kind), type(one).__name__)
