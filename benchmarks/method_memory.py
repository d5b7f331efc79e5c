"""Memory of each tuning method as measured, beside what `cotune plan` predicts from the shape alone.

Random weights in a Llama's layers: memory does not depend on what they say. Each method runs three steps in a child
process of its own, after the same steps on a tiny model; what counts is the child's peak beyond what was resident
with the weights loaded. A method is one entry of `CASES`; times are taken in turns in one process. A shape is one of
`SHAPES`, a published model of `KNOWN_CONFIGS`, or the config.json of a model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from finished_cells import FinishedCells
from measurement import Spread, Target, Timed, describe_machine, finish, interleave, make_parser, time_call
from model_shapes import named_config, random_model, read_config
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from cotune.data.batches import EncodedExample, TokenBatch
from cotune.errors import CotuneError, InputError
from cotune.evaluation.measured_memory import peak_bytes, run_measured
from cotune.evaluation.method_cost import MethodCost, MethodSettings, predict_cost, quantised_bytes
from cotune.evaluation.model_shape import KNOWN_CONFIGS, ModelShape
from cotune.evaluation.side_cost import SideSettings
from cotune.evaluation.workload import Workload
from cotune.generation.output_basis import OutputBasis
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.anatomy import decoder_layers
from cotune.models.backbone import Backbone
from cotune.models.low_bit import keep_differentiable, low_bit_placement
from cotune.models.selected import SelectedParameters, all_names, block_names
from cotune.models.weights import load_model
from cotune.tuning.adapter import Bottlenecks
from cotune.tuning.answer_loss import answer_nats
from cotune.tuning.attached import Attachable, AttachedTuner
from cotune.tuning.bias import BiasAndNorms
from cotune.tuning.feature_set import FeatureSet
from cotune.tuning.forward_gradient import ForwardGradientConfig, ForwardGradientTuner
from cotune.tuning.full import Full
from cotune.tuning.gradient import GradientState
from cotune.tuning.gradient_checkpointing import gradient_checkpointing
from cotune.tuning.ia3 import Ia3
from cotune.tuning.in_place import InPlaceState
from cotune.tuning.lora import Lora
from cotune.tuning.objectives import AnswerNats
from cotune.tuning.p_tuning import PTuning
from cotune.tuning.prefix import Prefix
from cotune.tuning.side import SideConfig, SideTuner, fresh_network, side_batches
from cotune.tuning.soft_prompt import SoftPrompt
from cotune.tuning.tune import Adaptation, TuneConfig
from cotune.tuning.tuner import Tuner
from cotune.tuning.vera import Vera
from cotune.tuning.zeroth_order import ZerothOrderConfig, ZerothOrderTuner
from cotune.wire.features import SequenceFeatures

EXAMPLES = """  python benchmarks/method_memory.py                       # two shapes, about ten minutes on one core
  python benchmarks/method_memory.py --shape small --method lora --method side
  python benchmarks/method_memory.py --resume              # go on where it was interrupted
  python benchmarks/method_memory.py --device cuda --dtype bfloat16
"""

SHAPES: dict[str, dict[str, Any]] = {
    # 49.3 M numbers, the model of the memory study in the project's notes.
    "llama-49m": {"D": 512, "F": 1536, "L": 12, "H": 8, "KV": 8, "V": 8192},
    # 104 M numbers in the proportions of Qwen2.5-0.5B: few key heads, a wide inner layer, a tied head.
    "qwen-like-104m": {"D": 896, "F": 4864, "L": 6, "H": 14, "KV": 2, "V": 16_384, "tied": True},
    # For a look at the benchmark itself.
    "small": {"D": 128, "F": 384, "L": 4, "H": 4, "KV": 2, "V": 2048},
}
TINY = {"D": 64, "F": 128, "L": 2, "H": 2, "KV": 2, "V": 256}

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a method may use."""

    config: PreTrainedConfig
    dtype: torch.dtype
    device: str
    batch: TokenBatch
    seed: int = 0

    def model(self, base_bits: int | None = None) -> PreTrainedModel:
        """A model with random weights, frozen.

        Args:
            base_bits: of the linear layers, 4 or 8; None for whole ones.

        Raises:
            InputError: bits without bitsandbytes.
        """
        if base_bits is None:
            return random_model(self.config, self.device, self.dtype, self.seed).eval().requires_grad_(False)
        dtype = self.load.dtype
        placement = low_bit_placement(base_bits, dtype=dtype, device=self.device)
        # By way of a folder, as `cotune tune --base-bits` loads it.
        with TemporaryDirectory() as folder:
            random_model(self.config, "cpu", self.dtype, self.seed).save_pretrained(folder)
            model = load_model(Path(folder), dtype=dtype, device=self.device, placement=placement)
        keep_differentiable(model)
        return model.eval().requires_grad_(False)

    @property
    def shape(self) -> ModelShape:
        return ModelShape.from_config(self.config.to_dict())

    @property
    def load(self) -> Workload:
        rows, length = self.batch.input_ids.shape
        return Workload(batch=rows, length=length - 1, dtype=str(self.dtype).rpartition(".")[2])


# Gives a step inside; what the first argument returns is there before anything counts.
Run = Callable[[Scene, PreTrainedModel | None], AbstractContextManager[Step]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method that is measured."""

    run: Run
    """Everything that the method makes is made inside, and counts."""
    predicted: str
    """The planner's word for it."""
    has_checkpoints: bool = False
    base_bits: int | None = None
    """Of the model's linear layers; None for whole ones."""
    needs_model: bool = True
    """Whether a model is in the process; its weights do not count."""

    def model(self, scene: Scene) -> PreTrainedModel | None:
        """What is there before anything counts."""
        return scene.model(self.base_bits) if self.needs_model else None


@contextmanager
def run_inference(scene: Scene, model: PreTrainedModel | None) -> Iterator[Step]:
    assert model is not None
    params = dict(model.named_parameters())

    def step() -> None:
        with torch.no_grad():
            answer_nats(model, model.get_output_embeddings(), params, scene.batch).mean()

    yield step


@contextmanager
def run_attached(
    scene: Scene,
    model: PreTrainedModel | None,
    *,
    make: Callable[[PreTrainedModel], Attachable],
    chunked: bool = False,
) -> Iterator[Step]:
    """As `cotune tune` runs it."""
    assert model is not None
    fresh = make(model)
    with fresh.attach(model) as attached, gradient_checkpointing(model, enabled=chunked):
        tuner = AttachedTuner(attached, TuneConfig(what=Full()))
        state: GradientState = tuner.init(fresh.params)
        state.learning_rate = 1e-4

        yield lambda: tuner.step(state, scene.batch)


@contextmanager
def run_forward_only(
    scene: Scene,
    model: PreTrainedModel | None,
    *,
    make: Callable[[PreTrainedModel], Attachable],
    make_tuner: Callable[[PreTrainedModel], Tuner[InPlaceState, TokenBatch]],
) -> Iterator[Step]:
    """As `cotune tune --estimator` runs it: the state is the model's own parameters."""
    assert model is not None
    fresh = make(model)
    with fresh.attach(model) as attached:
        tuner = make_tuner(attached)
        state = tuner.init(fresh.params)
        state.learning_rate = 1e-9
        yield lambda: tuner.step(state, scene.batch)


def zeroth_order(model: PreTrainedModel) -> Tuner[InPlaceState, TokenBatch]:
    return ZerothOrderTuner(model, ZerothOrderConfig(), AnswerNats())


def forward_gradient(model: PreTrainedModel) -> Tuner[InPlaceState, TokenBatch]:
    return ForwardGradientTuner(model, ForwardGradientConfig(), AnswerNats())


def whole_model(model: PreTrainedModel) -> Attachable:
    return SelectedParameters.of(model, all_names(model))


def last_two_blocks(model: PreTrainedModel) -> Attachable:
    num_layers = len(decoder_layers(model))
    return SelectedParameters.of(model, block_names(model, [num_layers - 2, num_layers - 1]))


def fresh_lora(model: PreTrainedModel) -> Attachable:
    return LoraAdapter.fresh(model, LoraShape(rank=MethodSettings().rank))


def examples_of(batch: TokenBatch) -> list[EncodedExample]:
    return [EncodedExample(row, 1) for row in batch.input_ids]


@contextmanager
def run_side(scene: Scene, model: PreTrainedModel | None) -> Iterator[Step]:
    """On features that were made elsewhere: random ones, of the right sizes."""
    shape, rng = scene.shape, np.random.default_rng(scene.seed)
    settings, rows = SideSettings(), len(scene.batch.input_ids)
    dim = min(settings.basis_dim, shape.hidden)
    codes = rng.integers(-127, 128, (shape.vocab, dim), np.int8)
    basis = OutputBasis(codes, np.full(shape.vocab, 1e-3, np.float32))
    features = FeatureSet.from_sequences([random_features(scene, settings, rng) for _ in range(rows)])
    yield side_step(features, basis, rows * scene.load.length)


@contextmanager
def run_side_local(scene: Scene, model: PreTrainedModel | None) -> Iterator[Step]:
    """Features of the model in this process, made anew before each step."""
    assert model is not None
    backbone = Backbone.from_model(model, b"{}")
    basis, top_k = backbone.output_basis, min(SideSettings().top_k, scene.shape.vocab)
    examples = examples_of(scene.batch)

    def collect() -> FeatureSet:
        made = [backbone.features(example.input_ids, example.first_target, top_k) for example in examples]
        return FeatureSet.from_sequences(made)

    inner = side_step(collect(), basis, len(examples) * scene.load.length)

    def step() -> None:
        collect()
        inner()

    yield step


def side_step(features: FeatureSet, basis: OutputBasis, num_positions: int) -> Step:
    config = SideConfig(num_batch_positions=num_positions)
    network = fresh_network(features, basis, config)
    tuner = SideTuner(network, torch.from_numpy(basis.matrix()), config)
    state = tuner.init(dict(network.named_parameters()))
    state.learning_rate = 1e-3
    batches = side_batches(features, network, basis.vocab_size, config.family, num_positions, seed=0)

    def step() -> None:
        for batch in batches.epoch(0):
            tuner.step(state, batch)

    return step


def random_features(scene: Scene, settings: SideSettings, rng: np.random.Generator) -> SequenceFeatures:
    shape, num = scene.shape, scene.load.length
    taps, top_k = shape.layers + 1, min(settings.top_k, shape.vocab)
    first = rng.integers(0, shape.vocab - top_k + 1, (num, 1))
    return SequenceFeatures(
        target_ids=rng.integers(0, shape.vocab, num),
        tap_codes=rng.integers(-127, 128, (num, taps, min(settings.tap_dim, shape.hidden)), np.int8),
        tap_scales=np.full((num, taps), 0.01, np.float16),
        log_normalizer=np.full(num, 20.0, np.float32),
        target_logits=np.zeros(num, np.float32),
        top_ids=first + np.arange(top_k),
        top_logits=rng.standard_normal((num, top_k), np.float32),
        hidden=np.zeros((num, shape.hidden), np.float16),
    )


def tuned(what: Adaptation, *, chunked: bool = False) -> Run:
    """With gradients; what the model's own parameters were waits on disk, which no step sees."""
    return attached_case(lambda model: what.fresh(Backbone.from_model(model, b"{}"), [], seed=0), chunked=chunked)


def attached_case(make: Callable[[PreTrainedModel], Attachable], *, chunked: bool = False) -> Run:
    return partial(run_attached, make=make, chunked=chunked)


SETTINGS = MethodSettings()
LORA = Lora(shape=LoraShape(rank=SETTINGS.rank))
DORA = Lora(shape=LoraShape(rank=SETTINGS.rank, use_dora=True))
CASES: dict[str, Case] = {
    "inference": Case(run=run_inference, predicted="inference"),
    "full": Case(run=tuned(Full()), predicted="full"),
    "full + checkpoints": Case(run=tuned(Full(), chunked=True), predicted="full", has_checkpoints=True),
    "norms": Case(run=tuned(BiasAndNorms()), predicted="norms"),
    "blocks": Case(run=attached_case(last_two_blocks), predicted="blocks"),
    "lora": Case(run=tuned(LORA), predicted="lora"),
    "lora + checkpoints": Case(run=tuned(LORA, chunked=True), predicted="lora", has_checkpoints=True),
    "qlora, 4 bits": Case(run=tuned(LORA), predicted="qlora", base_bits=4),
    "dora": Case(run=tuned(DORA), predicted="dora"),
    "ia3": Case(run=tuned(Ia3()), predicted="ia3"),
    "vera": Case(run=tuned(Vera()), predicted="vera"),
    "adapter": Case(run=tuned(Bottlenecks(width=SETTINGS.width)), predicted="adapter"),
    "soft prompt": Case(run=tuned(SoftPrompt(num_virtual_tokens=SETTINGS.num_virtual_tokens)), predicted="soft_prompt"),
    "p-tuning": Case(run=tuned(PTuning(num_virtual_tokens=SETTINGS.num_virtual_tokens)), predicted="p_tuning"),
    "prefix": Case(run=tuned(Prefix(num_virtual_tokens=SETTINGS.num_virtual_tokens)), predicted="prefix"),
    "side": Case(run=run_side, predicted="side", needs_model=False),
    "side, features here": Case(run=run_side_local, predicted="side_local"),
    "mezo": Case(
        run=partial(run_forward_only, make=whole_model, make_tuner=zeroth_order),
        predicted="zeroth_order",
    ),
    "mezo, lora": Case(
        run=partial(run_forward_only, make=fresh_lora, make_tuner=zeroth_order), predicted="zeroth_order_lora"
    ),
    "forward gradient": Case(
        run=partial(run_forward_only, make=whole_model, make_tuner=forward_gradient),
        predicted="forward_gradient",
    ),
}


def can_run(case: Case) -> bool:
    """Whether what it needs is installed."""
    return case.base_bits is None or importlib.util.find_spec("bitsandbytes") is not None


# Whose steps are timed unless others are asked for.
TIMED = ("inference", "full", "lora", "adapter", "side", "side, features here")


def config_of(name: str) -> PreTrainedConfig:
    """The config of a shape.

    Args:
        name: of `SHAPES` or `KNOWN_CONFIGS`, a config.json, or a folder with one.

    Raises:
        InputError: there is no such shape or file.
    """
    if name in SHAPES:
        return sized(SHAPES[name])
    if name in KNOWN_CONFIGS:
        return named_config(name)
    if Path(name).exists():
        return read_config(Path(name))
    known = ", ".join([*SHAPES, *KNOWN_CONFIGS])
    raise InputError(f"shape is {name!r}, expected one of {known}, or a config.json of transformers")


def sized(sizes: dict[str, Any]) -> PreTrainedConfig:
    """A Llama of these sizes."""
    return AutoConfig.for_model(
        "llama",
        hidden_size=sizes["D"],
        intermediate_size=sizes["F"],
        num_hidden_layers=sizes["L"],
        num_attention_heads=sizes["H"],
        num_key_value_heads=sizes["KV"],
        vocab_size=sizes["V"],
        max_position_embeddings=4096,
        tie_word_embeddings=sizes.get("tied", False),
    )


def make_scene(config: PreTrainedConfig, *, dtype: str, device: str, batch: int, length: int, seed: int) -> Scene:
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length + 1))
    labels = ids.copy()
    labels[:, 0] = -100
    tokens = TokenBatch(input_ids=ids, attention_mask=np.ones_like(ids), labels=labels)
    return Scene(config=config, dtype=getattr(torch, dtype), device=device, batch=tokens, seed=seed)


def measure_steps(case: Case, args: argparse.Namespace, config: PreTrainedConfig) -> dict[str, Any]:
    """In this process: `peak_bytes` beyond the weights, and the median `step_s` of the steps in which it was found.

    `args` has dtype, device, seed, batch, length and steps.
    """
    options = {"dtype": args.dtype, "device": args.device, "seed": args.seed}
    seconds: list[float] = []

    def steps(scene: Scene, model: PreTrainedModel | None) -> None:
        seconds.clear()
        with case.run(scene, model) as step:
            for _ in range(args.steps):
                started_s = time.perf_counter()
                finished(step, args.device)
                seconds.append(time.perf_counter() - started_s)

    # The same on a tiny model: what is loaded at the first use of anything must not count.
    tiny = make_scene(sized(TINY), batch=2, length=16, **options)
    steps(tiny, case.model(tiny))
    scene = make_scene(config, batch=args.batch, length=args.length, **options)
    model = case.model(scene)
    return {"peak_bytes": peak_bytes(lambda: steps(scene, model), args.device), "step_s": statistics.median(seconds)}


def base_bytes(case: Case, scene: Scene) -> int:
    """Of the model that is loaded before anything counts."""
    if not case.needs_model:
        return 0
    if case.base_bits is not None:
        return quantised_bytes(scene.shape, scene.load, case.base_bits)
    return scene.load.number_bytes * scene.shape.num_parameters


def predict(case: Case, scene: Scene) -> MethodCost:
    """By the planner."""
    return predict_cost(scene.shape, case.predicted, scene.load, has_checkpoints=case.has_checkpoints)


def scene_of(name: str, args: argparse.Namespace) -> Scene:
    return make_scene(
        config_of(name), dtype=args.dtype, device=args.device, batch=args.batch, length=args.length, seed=args.seed
    )


def measure_peaks(name: str, args: argparse.Namespace, cells: FinishedCells) -> None:
    """The peaks of all methods on one shape that are not measured yet; each is kept as soon as it is."""
    for method in args.method:
        if (name, method) in cells:
            continue
        arguments = [str(Path(__file__)), "--child", method, "--shape", name, "--seed", str(args.seed)]
        arguments += ["--batch", str(args.batch), "--length", str(args.length), "--steps", str(args.steps)]
        arguments += ["--dtype", args.dtype, "--device", args.device, "--threads", str(args.threads)]
        peaks = [run_measured(arguments, timeout_s=args.timeout_s)["peak_bytes"] for _ in range(args.runs)]
        cells.keep([{"shape": name, "method": method, "peak_bytes": peaks}])
        print(f"{name} {method}: {Spread.of([peak / 1e6 for peak in peaks]).median:.0f} MB above the weights")


def beside_predictions(scene: Scene, peaks: Mapping[str, Sequence[int]]) -> dict[str, dict[str, Any]]:
    """What was measured of each method, and what the planner says.

    Args:
        scene: the shape and its load.
        peaks: bytes beyond the weights, by method.
    """
    rows = {}
    for method, found in peaks.items():
        cost, base = predict(CASES[method], scene), base_bytes(CASES[method], scene)
        above = Spread.of([peak / 1e6 for peak in found])
        predicted_mb = (cost.peak - base) / 1e6
        rows[method] = {
            "base_mb": base / 1e6,
            "measured_above_mb": above,
            "predicted_above_mb": predicted_mb,
            "ratio_above": predicted_mb / above.median,
            "ratio_whole": cost.peak / 1e6 / (above.median + base / 1e6),
            "predicted": cost,
        }
    return rows


def measure_times(name: str, args: argparse.Namespace, methods: list[str]) -> dict[str, Any]:
    """Seconds of a step, the methods in turns, so that noise hits all alike."""
    scene = scene_of(name, args)
    with ExitStack() as alive:
        calls: dict[str, Timed] = {}
        for method in methods:
            step = alive.enter_context(CASES[method].run(scene, CASES[method].model(scene)))
            calls[method] = time_call(partial(finished, step, args.device))
        times = interleave(calls, runs=args.timed_runs, calls_per_run=1, warm_up=1)
    for method, found in times.items():
        cost, seconds = predict(CASES[method], scene), found["ms"].median / 1e3
        found["tokens_per_s"] = scene.load.num_tokens / seconds
        found |= {"gflop": cost.flops / 1e9, "gflop_per_s": cost.flops / seconds / 1e9}
    return times


def finished(step: Step, device: str) -> None:
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def targets_of(name: str, memory: dict[str, Any], times: dict[str, Any]) -> list[Target]:
    """The goals that these methods are held against."""
    found = []
    for method, row in memory.items():
        error = 100 * abs(row["ratio_above"] - 1)
        found.append(
            Target(
                what=f"{name}, {method}: prediction off the peak above the weights", measured=error, limit=15, unit="%"
            )
        )
    if {"full", "side", "side, features here"} <= memory.keys():
        full = memory["full"]["measured_above_mb"].median
        for side in ("side", "side, features here"):
            share = 100 * memory[side]["measured_above_mb"].median / full
            what = f"{name}, {side}: peak above the weights, of full tuning's"
            found.append(Target(what=what, measured=share, limit=25, unit="%"))
    for method in memory:
        if "inference" in memory and CASES[method].predicted.startswith("zeroth_order"):
            share = 100 * (_whole_mb(memory[method]) / _whole_mb(memory["inference"]) - 1)
            found.append(Target(what=f"{name}, {method}: memory above inference's", measured=share, limit=5, unit="%"))
    if {"lora", "side", "side, features here"} <= times.keys():
        lora = times["lora"]["ms"].median
        for side in ("side", "side, features here"):
            what = f"{name}, {side}: time of a step, of LoRA's"
            found.append(Target(what=what, measured=times[side]["ms"].median / lora, limit=0.5, unit="times"))
    return found


def _whole_mb(row: dict[str, Any]) -> float:
    return float(row["base_mb"] + row["measured_above_mb"].median)


def show(name: str, memory: dict[str, Any], times: dict[str, Any]) -> None:
    table = Table(title=f"{name}: MB above the weights", title_justify="left", box=None)
    for column in ("method", "weights", "measured", "predicted", "ratio", "whole", "ms a step", "GFLOP/s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, row in memory.items():
        timed = times.get(method)
        table.add_row(
            method,
            f"{row['base_mb']:.0f}",
            f"{row['measured_above_mb'].median:.0f}",
            f"{row['predicted_above_mb']:.0f}",
            f"{row['ratio_above']:.3f}",
            f"{row['ratio_whole']:.3f}",
            "" if timed is None else f"{timed['ms'].median:.0f}",
            "" if timed is None else f"{timed['gflop_per_s']:.0f}",
        )
    Console().print(table)


def main() -> None:
    """Entry point."""
    parser = make_parser("method_memory", __doc__ or "", EXAMPLES)
    parser.add_argument(
        "--shape",
        action="append",
        help=f"of {', '.join([*SHAPES, *KNOWN_CONFIGS])}, or a config.json; may be repeated (default: the first two)",
    )
    parser.add_argument("--method", action="append", choices=CASES, help="may be repeated (default: all)")
    parser.add_argument("--batch", type=int, default=4, help="texts in a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="in which the peak is looked for (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="processes for each method (default: %(default)s)")
    parser.add_argument("--timed-runs", type=int, default=5, help="turns of the timing (default: %(default)s)")
    parser.add_argument("--time", action="append", choices=CASES, help="methods to time (default: five of them)")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="of a process (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="measure only the peaks that the result file lacks")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child is not None:
        try:
            found = measure_steps(CASES[args.child], args, config_of(args.shape[0]))
        except CotuneError as error:
            sys.exit(f"error: {error}")
        print(json.dumps(found))
        return
    machine = describe_machine()
    args.shape = args.shape or [name for name in SHAPES if name != "small"]
    args.method = args.method or [name for name, case in CASES.items() if can_run(case)]
    args.time = args.time if args.time is not None else [name for name in TIMED if name in args.method]
    cells = FinishedCells("method_memory", args, ("shape", "method"), free=("shape", "method", "time", "timed_runs"))
    for name in args.shape:
        measure_peaks(name, args, cells)
    results: dict[str, Any] = {"rows": cells.rows, "shapes": {}}
    targets: list[Target] = []
    for name in args.shape:
        scene = scene_of(name, args)
        found = {row["method"]: row["peak_bytes"] for row in cells.rows if row["shape"] == name}
        memory = beside_predictions(scene, {method: found[method] for method in args.method})
        times = measure_times(name, args, args.time) if args.time else {}
        num_parameters = scene.shape.num_parameters
        results["shapes"][name] = {"num_parameters": num_parameters, "methods": memory, "times": times}
        targets += targets_of(name, memory, times)
        show(name, memory, times)
    finish("method_memory", args, machine, results, targets)


if __name__ == "__main__":
    main()
