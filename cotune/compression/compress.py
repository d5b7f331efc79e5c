"""Several stages one after another, from a model to a smaller one, with nothing lost to an interrupt.

Each stage reads the folder of the one before and writes one of its own into the run folder:

    RUN/stages/01-prune/model          the model folder, there whole or not at all
    RUN/stages/01-prune/stage.json     written last: the stage is finished; its key and its report
    RUN/stages/01-prune/scratch        checkpoints of training, until it is finished
    RUN/stages/01-prune/metrics.jsonl  of training

A key is a digest of the stage's settings, of what it reads, and of the key before, so that `resume` takes what was
finished with the same settings and begins with the first stage that was not. The last folder is renamed to the result,
which is therefore there whole or not at all. Folders of earlier stages go as soon as the next one is finished.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from cotune.compression.calibration import CalibrationTexts
from cotune.compression.depth import Depth
from cotune.compression.gguf_export import K_KINDS, GgufExportConfig, check_gguf, check_gguf_source, check_k_quants
from cotune.compression.llama_folder import LlamaFolder
from cotune.compression.onnx_export import check_heads, check_onnx
from cotune.compression.pruner import count_of
from cotune.compression.stages import (
    Distil,
    Export,
    Prune,
    Quantise,
    Stage,
    StageOutcome,
    StageWork,
    Tell,
    check_stages,
)
from cotune.compression.stored_layers import stored_layers, stored_tensors
from cotune.data.templates import Example
from cotune.distillation.teacher import Teacher
from cotune.durable import remove_unfinished, replacing
from cotune.errors import InputError
from cotune.models.packed_folder import is_packed
from cotune.models.weights import DTYPES, digest_folder, find_model_folder
from cotune.tuning.loop import METRICS_FILE

Progress = Callable[[Stage, int, int, str], None]
"""Hears of progress inside a stage: done, total, a note."""

STAGES_FOLDER, STAGE_FILE = "stages", "stage.json"
_SPARE_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class CompressInputs:
    """What stages read besides the model."""

    calibration: CalibrationTexts | None = None
    """Texts that layers are measured with."""
    examples: Sequence[Example] = ()
    """Texts that recovery and distillation learn from."""
    max_length: int | None = None
    """Tokens of one of these; None for the model's context."""
    teacher: Callable[[], Teacher] | None = None
    """Makes the teacher when it is needed; None for the model itself."""
    teacher_name: str = ""
    """Tells a teacher from others, as its answers decide the result."""
    dtype: str | None = None
    """Of whole weights in the folders, float32, bfloat16 or float16; None for what the model's own file has most of."""
    seed: int = 0
    """Of all that is random."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage that is done.

    Attributes:
        number: counted from 1.
        stage: what was done.
        key: names settings and inputs, hex.
        source: the model folder that it read; None where that is gone again.
        folder: what it wrote; None where that is gone again.
        adapter: that stands beside it; None where there is none.
        report: of the stage, JSON values.
    """

    number: int
    stage: Stage
    key: str
    source: Path | None
    folder: Path | None
    adapter: Path | None
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CompressResult:
    """What came out.

    Attributes:
        out: the result.
        adapter: that belongs to it, beside it; None where there is none.
        steps: all stages, in order.
    """

    out: Path
    adapter: Path | None
    steps: tuple[Step, ...]


def compress(
    model: str,
    stages: Sequence[Stage],
    out: Path,
    run: Path,
    inputs: CompressInputs | None = None,
    *,
    resume: bool = False,
    keeps_stages: bool = False,
    on_step: Callable[[Step], None] | None = None,
    progress: Progress | None = None,
) -> CompressResult:
    """Take a model through all stages.

    Args:
        model: a Hugging Face folder or hub name, or `starter`; stays as it is.
        stages: in order, see `check_stages`.
        out: what the result is called; nothing is there yet. An adapter beside it is called as `adapter_of` says.
        run: folder for what is unfinished, on the same disk as `out`.
        inputs: what stages read besides the model.
        resume: go on after the last stage that is finished in `run`, and inside the next one; else begin anew.
        keeps_stages: keep the folders of all stages in `run`.
        on_step: called after each stage, while its folder and the one before are there; after a resume also for
            those that were finished before.
        progress: called inside stages.

    Raises:
        InputError: the model, stages, texts or disk do not allow it. Nothing is at `out` then, and what was finished is
            in `run`.

    Example:
        >>> stages = [Prune(how=Depth(), amount=2), Quantise(bits=4), Export()]  # doctest: +SKIP
        >>> compress("my-model", stages, Path("small"), Path("small.run"), inputs)  # doctest: +SKIP
    """
    inputs = inputs or CompressInputs()
    source, dtype = check_request(model, stages, out, inputs, resume=resume)
    folder = run / STAGES_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        chain = _Chain(folder, stages, _keys(source, stages, inputs, dtype))
        first = chain.first_unfinished() if resume else 0
        if not chain.lacks_its_adapter(first):
            _check_free(adapter_of(out, stages))
        chain.clear_from(first, scratch_too=not resume)
        _check_room(source, stages[first:], folder, dtype)
        done = StageOutcome(folder=source, report={})
        steps: list[Step] = []
        for index, stage in enumerate(stages):
            before = done
            if index < first:
                done = chain.read(index)
            else:
                done = stage.run(
                    StageWork(
                        original=model,
                        source=before.folder,
                        adapter=before.adapter,
                        out=chain.place(index) / "model",
                        scratch=chain.place(index) / "scratch",
                        calibration=inputs.calibration,
                        examples=inputs.examples,
                        max_length=inputs.max_length,
                        teacher=inputs.teacher,
                        dtype=dtype,
                        seed=inputs.seed,
                        resume=resume,
                        tell=_tell(progress, stage),
                    )
                )
                chain.write(index, done)
            step = Step(
                number=index + 1,
                stage=stage,
                key=chain.keys[index],
                source=before.folder if before.folder.is_dir() else None,
                folder=done.folder if done.folder.is_dir() else None,
                adapter=done.adapter,
                report=done.report,
            )
            if on_step is not None:
                on_step(step)
            steps.append(step)
            if not keeps_stages and before.folder not in (source, done.folder):
                shutil.rmtree(before.folder, ignore_errors=True)
        return CompressResult(out=out, adapter=_move(done, out, adapter_of(out, stages), source), steps=tuple(steps))
    except OSError as error:
        raise InputError(
            f"{error.filename or out} cannot be written: {error.strerror or error}; what was finished is in {run}"
        ) from error


def check_request(
    model: str, stages: Sequence[Stage], out: Path, inputs: CompressInputs, *, resume: bool = False
) -> tuple[Path, str]:
    """Refuse what can be refused before anything is done; the arguments are those of `compress`.

    Returns:
        The model's folder, and the number type of whole weights in the folders to come.

    Raises:
        InputError: the result or its adapter is there, stages do not go together, texts are missing that they need, or
            the model is not one that they can be done to.
    """
    check_stages(stages)
    _check_free(out)
    if not resume:
        _check_free(adapter_of(out, stages))
    _check_inputs(stages, inputs)
    source = find_model_folder(model)
    dtype = dtype_of(source) if inputs.dtype is None else inputs.dtype
    check_model(source, model, stages, dtype)
    return source, dtype


def adapter_of(out: Path, stages: Sequence[Stage]) -> Path:
    """Where an adapter that cannot be merged is put: OUT.adapter, a peft folder, or OUT.adapter.gguf.

    Example:
        >>> adapter_of(Path("small"), [Export()]).name
        'small.adapter'
    """
    is_gguf = any(isinstance(stage, Export) and stage.runtime == "gguf" for stage in stages)
    return out.with_name(f"{out.name}.adapter{'.gguf' if is_gguf else ''}")


def dtype_of(folder: Path) -> str:
    """The number type that most of a folder's weights have.

    Example:
        >>> dtype_of(find_model_folder("starter"))
        'float16'
    """
    numbers: dict[str, int] = {}
    for tensor in stored_tensors(folder).values():
        numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + tensor.num_numbers
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    known = {names[kind]: num for kind, num in numbers.items() if kind in names}
    return max(known, key=lambda name: known[name], default="float32")


def check_model(source: Path, name: str, stages: Sequence[Stage], dtype: str) -> None:
    """Refuse a model that the stages cannot be done to, before any is begun.

    Raises:
        InputError: says why.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    _check_depth(source, stages)
    export = next((stage for stage in stages if isinstance(stage, Export)), None)
    changing = [stage.kind for stage in stages if not isinstance(stage, Export)]
    if changing and is_packed(source):
        raise InputError(
            f"{name} has quantised weights, which {changing[0]} cannot work on; give the model that it was made of, or "
            "export it as it is"
        )
    for tensor_name, tensor in stored_tensors(source).items():
        if tensor.dtype in ("F32", "BF16", "F16") and not bool(torch.isfinite(tensor.read()).all()):
            raise InputError(f"{tensor_name} of {name} holds nan or inf, expected finite weights; copy the model again")
    if export is not None:
        (check_gguf if export.runtime == "gguf" else check_onnx)()
        llama = LlamaFolder(source, context=export.config.context)
        if export.runtime == "onnx":
            check_heads(llama)
        else:
            check_gguf_source(llama)
        if isinstance(export.config, GgufExportConfig) and export.config.kind in K_KINDS:
            if any(isinstance(stage, Quantise) for stage in stages):
                raise InputError(
                    f"export is gguf:{export.config.kind}, which rounds once more what quantise has rounded; leave one "
                    "of them out, or export as gguf alone"
                )
            check_k_quants(llama, export.config.kind)


def _check_free(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} is there already, expected a new name; remove it, or name another one")


def _check_depth(source: Path, stages: Sequence[Stage]) -> None:
    """Refuse to take more blocks than there are."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True).get_text_config()
        left = num_layers = int(config.num_hidden_layers)
    except (AttributeError, ValueError, KeyError, TypeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{source / 'config.json'} cannot be used ({reason}); copy the model again") from error
    for stage in stages:
        if isinstance(stage, Prune) and isinstance(stage.how, Depth):
            left -= count_of(stage.amount)
        elif isinstance(stage, Distil) and stage.num_layers is not None:
            left = stage.num_layers if stage.num_layers <= left else 0
        if left < 1:
            raise InputError(
                f"{stage.label} asks for more blocks than are left of the model's {num_layers}; take fewer"
            )


def _check_inputs(stages: Sequence[Stage], inputs: CompressInputs) -> None:
    for stage in stages:
        if stage.needs_calibration and inputs.calibration is None:
            raise InputError(
                f"{stage.label} measures layers on texts and none came; give calibration texts, or take magnitude or "
                "rtn, which need none"
            )
        if stage.needs_examples and not inputs.examples:
            raise InputError(f"{stage.label} learns from texts and none came; give some, such as the calibration texts")
    first = stages[0]
    if isinstance(first, Distil) and first.num_layers is None and inputs.teacher is None:
        raise InputError(
            "distil comes first and its teacher is the model itself, so there is nothing to learn; give a number of "
            "layers for the student, another teacher, or prune before"
        )


def _keys(source: Path, stages: Sequence[Stage], inputs: CompressInputs, dtype: str) -> list[str]:
    texts = hashlib.sha256()
    for example in inputs.examples:
        texts.update(json.dumps([example.prompt, example.target, example.document]).encode())
    calibration = b"" if inputs.calibration is None else inputs.calibration.input_ids.tobytes()
    key, keys = digest_folder(source), []
    for stage in stages:
        about: list[Any] = [key, repr(stage), dtype, inputs.seed]
        if stage.needs_calibration:
            about.append(hashlib.sha256(calibration).hexdigest())
        if stage.needs_examples:
            about += [texts.hexdigest(), inputs.max_length]
        if isinstance(stage, Distil):
            about.append(inputs.teacher_name)
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        keys.append(key)
    return keys


@dataclass(frozen=True)
class _Chain:
    """The stages' folders."""

    folder: Path
    stages: Sequence[Stage]
    keys: list[str]

    def place(self, index: int) -> Path:
        return self.folder / f"{index + 1:02}-{self.stages[index].kind}"

    def first_unfinished(self) -> int:
        """The first stage that has to be done, given that all before it are; 0 where nothing can be used."""
        for index in reversed(range(len(self.stages))):
            done = self._known(index)
            if done is not None and done.folder.is_dir() and all(self._known(i) is not None for i in range(index)):
                return index + 1
        return 0

    def lacks_its_adapter(self, first: int) -> bool:
        """Whether all is finished, and the adapter has its last name already: the run was killed at its very end."""
        done = self._known(len(self.stages) - 1) if first == len(self.stages) else None
        return done is not None and done.adapter is not None and not done.adapter.exists()

    def clear_from(self, first: int, *, scratch_too: bool) -> None:
        """Remove what stages from `first` on left unfinished, and what belongs to other settings."""
        keep = {self.place(index).name for index in range(len(self.stages))}
        for path in self.folder.iterdir():
            if path.name not in keep:
                shutil.rmtree(path, ignore_errors=True)
        for index in range(first, len(self.stages)):
            place = self.place(index)
            place.mkdir(exist_ok=True)
            remove_unfinished(place, "model")
            (place / STAGE_FILE).unlink(missing_ok=True)
            shutil.rmtree(place / "model", ignore_errors=True)
            _remove(place / "adapter")
            if scratch_too:
                shutil.rmtree(place / "scratch", ignore_errors=True)

    def read(self, index: int) -> StageOutcome:
        done = self._known(index)
        assert done is not None
        return done

    def write(self, index: int, done: StageOutcome) -> None:
        """Say that a stage is finished."""
        told = {
            "key": self.keys[index],
            "label": self.stages[index].label,
            "folder": self._named(done.folder),
            "adapter": None if done.adapter is None else self._named(done.adapter),
            "report": done.report,
        }
        with replacing(self.place(index) / STAGE_FILE, mode=0o644) as unfinished:
            unfinished.write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        scratch = self.place(index) / "scratch"
        if (scratch / METRICS_FILE).is_file():
            (scratch / METRICS_FILE).replace(self.place(index) / METRICS_FILE)
        shutil.rmtree(scratch, ignore_errors=True)

    def _named(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _known(self, index: int) -> StageOutcome | None:
        """What a finished stage with the same key said."""
        try:
            told = json.loads((self.place(index) / STAGE_FILE).read_bytes())
            if told["key"] != self.keys[index]:
                return None
            adapter = None if told["adapter"] is None else self.folder / told["adapter"]
            return StageOutcome(folder=self.folder / told["folder"], adapter=adapter, report=told["report"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _check_room(source: Path, stages: Sequence[Stage], folder: Path, dtype: str) -> None:
    """Two stages' folders are on the disk at a time."""
    if not stages:
        return
    numbers = sum(layer.num_numbers for layer in stored_layers(source))
    sizes = [_most_bytes(stage, numbers, DTYPES[dtype].itemsize) for stage in stages]
    needed = max(sum(pair) for pair in zip([0, *sizes], sizes, strict=False)) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder} needs up to {needed / 2**20:,.0f} MiB for two stages at a time and {free / 2**20:,.0f} MiB are "
            "free there; make room, or name another disk"
        )


def _most_bytes(stage: Stage, numbers: int, itemsize: int) -> int:
    """What a stage may write, if those before it left all numbers."""
    if isinstance(stage, Quantise):
        return numbers * (itemsize if stage.embedding_bits is None else 1) + numbers // 8
    if isinstance(stage, Export):
        return numbers * 2
    # A recovery has checkpoints and an adapter, which are small beside the model; what is distilled has AdamW's means.
    return numbers * (itemsize + 12 if isinstance(stage, Distil) else itemsize)


def _move(done: StageOutcome, out: Path, adapter_out: Path, source: Path) -> Path | None:
    """Give the result its name, the adapter first: where the model is, all is."""
    assert done.folder != source
    if done.adapter is None:
        done.folder.rename(out)
        return None
    out.parent.mkdir(parents=True, exist_ok=True)
    if done.adapter.exists():
        done.adapter.rename(adapter_out)
    done.folder.rename(out)
    return adapter_out


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _tell(progress: Progress | None, stage: Stage) -> Tell:
    def tell(done: int, total: int, note: str) -> None:
        if progress is not None:
            progress(stage, done, total, note)

    return tell
