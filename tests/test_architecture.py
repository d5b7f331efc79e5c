"""The rooms of docs/architecture.md: who may import whom, what stays free of PyTorch, and the public names."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import cotune

PACKAGE = Path(cotune.__file__).parent
TABLE = Path(__file__).parents[1] / "docs" / "architecture.md"
HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib")


def read_table(text: str) -> dict[str, tuple[set[str], str]]:
    """By room: the rooms that it may import, and what the last column says."""
    rows: dict[str, tuple[set[str], str]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 4 and cells[0].startswith("`"):
            imports = {name.strip() for name in cells[2].split(",") if name.strip()}
            rows[cells[0].strip("`")] = (imports, cells[3])
    return rows


ROOMS = read_table(TABLE.read_text(encoding="utf-8"))
NO_TORCH = sorted(room for room, (_, torch) in ROOMS.items() if torch == "no torch")


def imported_rooms(source: str) -> dict[str, int]:
    """The rooms that a module imports anywhere, also inside functions, and a line for each."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from cotune import plugin` names the room in its second half.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "cotune" and rest:
                found.setdefault(rest.split(".")[0], node.lineno)
    return found


def wrong_imports(room: str, source: str) -> list[str]:
    """What a module of `room` imports although the table does not allow it."""
    allowed, _ = ROOMS[room]
    if allowed == {"all"}:
        return []
    return [
        f"line {line}: {room} imports {other}"
        for other, line in imported_rooms(source).items()
        if other in ROOMS and other != room and other not in allowed
    ]


def modules_of(room: str) -> list[Path]:
    single = PACKAGE / f"{room}.py"
    return [single] if single.is_file() else sorted((PACKAGE / room).rglob("*.py"))


def test_the_table_lists_exactly_the_rooms_that_exist() -> None:
    here = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    here |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(ROOMS) == here
    named = set().union(*(imports for imports, _ in ROOMS.values())) - {"all"}
    assert named <= set(ROOMS)


def test_the_table_has_no_circle() -> None:
    left = {room: set(imports) - {"all"} for room, (imports, _) in ROOMS.items()}
    while left:
        free = [room for room, imports in left.items() if not imports & left.keys()]
        assert free, f"these rooms import each other: {sorted(left)}"
        for room in free:
            del left[room]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_row_names(room: str) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}, {complaint}"
        for path in modules_of(room)
        for complaint in wrong_imports(room, path.read_text(encoding="utf-8"))
    ]
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        "import cotune.models.backbone",
        "from cotune.models import Backbone",
        "from cotune import models",
        "def late():\n    from cotune.models.backbone import Backbone",
        "if TYPE_CHECKING:\n    import cotune.models as m",
    ],
)
def test_every_form_of_import_is_seen(source: str) -> None:
    assert wrong_imports("device", source)
    assert not wrong_imports("tuning", source)
    assert not wrong_imports("cli", source)


def all_modules(room: str) -> list[str]:
    """Dotted names of a room and of every module in it."""
    base = f"cotune.{room}"
    folder = PACKAGE / room
    if not folder.is_dir():
        return [base]
    return [base, *(module.name for module in pkgutil.walk_packages([str(folder)], prefix=base + "."))]


def loaded_after(modules: list[str], libraries: tuple[str, ...]) -> list[str]:
    """Which of these libraries a fresh interpreter has loaded after importing the modules."""
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(*[name for name in {libraries!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.split()


def test_rooms_without_torch_import_neither_torch_nor_its_friends() -> None:
    """All of them in one process: whatever any of them loads would be there at the end."""
    assert {"wire", "generation", "device", "cloud"} <= set(NO_TORCH)
    assert loaded_after([module for room in NO_TORCH for module in all_modules(room)], HEAVY) == []


def test_rooms_with_torch_load_transformers_and_peft_only_where_they_are_used() -> None:
    """They take three times as long as PyTorch to load, and a device that tunes a side network needs neither."""
    late = ("transformers", "peft", "bitsandbytes", "huggingface_hub", "datasets", "matplotlib", "sklearn", "opacus")
    assert loaded_after([module for room in ("models", "tuning") for module in all_modules(room)], late) == []


def test_the_check_of_loaded_libraries_sees_what_is_loaded() -> None:
    assert loaded_after(all_modules("wire"), ("numpy", "websockets", *HEAVY)) == ["numpy", "websockets"]


def test_importing_cotune_loads_almost_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import cotune; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["cotune"]


PUBLIC = {
    "cotune": ["__version__"],
    "cotune.data": [
        "DATASETS",
        "DEMO_PERSONA",
        "DatasetSplits",
        "EncodedExample",
        "Example",
        "Exchange",
        "Persona",
        "TEMPLATES",
        "Template",
        "TokenBatch",
        "draw",
        "encode_example",
        "fit_example",
        "format_answer",
        "format_request",
        "generate_exchanges",
        "generate_persona_exchanges",
        "persona_split",
        "read_examples",
        "read_prompts",
        "read_splits",
        "token_batches",
    ],
    "cotune.evaluation": [
        "AggregateMetrics",
        "CorpusScore",
        "GenerationMetrics",
        "ReportMetrics",
        "accuracy",
        "aggregate_generations",
        "bits_per_byte",
        "bootstrap_interval",
        "exact_match",
        "nats_per_token",
        "normalize_answer",
        "perplexity",
        "render_report",
        "rouge_l",
        "score_corpus",
        "token_f1",
        "write_report",
    ],
    "cotune.models": [
        "AttentionLadder",
        "AttentionLadderConfig",
        "Backbone",
        "BackboneCursor",
        "BackboneSpec",
        "ForwardStates",
        "Projections",
        "SIDE_NETWORKS",
        "SideNetwork",
        "SpaLadder",
        "SpaLadderConfig",
        "TapLadder",
        "TapLadderConfig",
        "fake_quantise",
        "load_side_network",
    ],
    "cotune.tuning": [
        "ADAPTATIONS",
        "AdaptationOptions",
        "AdapterConfig",
        "AdapterResult",
        "AdapterTuner",
        "CollectProgress",
        "ESTIMATORS",
        "EpochRecord",
        "FeatureCache",
        "FeatureSet",
        "GateConfig",
        "GateData",
        "GateResult",
        "GateTuner",
        "LoopConfig",
        "LoopProgress",
        "LoopResult",
        "LoraConfig",
        "LoraResult",
        "LoraTuner",
        "METHODS",
        "PrivateDescent",
        "QualityPoint",
        "SideConfig",
        "SideEvaluation",
        "SideResult",
        "SideTuner",
        "TuneConfig",
        "TuneResult",
        "adaptation_named",
        "build_plugin",
        "choose_threshold",
        "collect_features",
        "decision_table",
        "estimator_named",
        "evaluate_side",
        "nats_per_token",
        "quality_curve",
        "run_loop",
        "target_nats",
        "tune",
        "tune_adapter",
        "tune_gate",
        "tune_lora",
        "tune_side",
    ],
}


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == PUBLIC[package]
    for name in module.__all__:
        assert hasattr(module, name)


def test_every_room_with_public_names_is_pinned() -> None:
    found = {
        ".".join(("cotune", *path.parent.relative_to(PACKAGE).parts))
        for path in PACKAGE.rglob("__init__.py")
        if "__all__" in path.read_text(encoding="utf-8")
    }
    assert found == PUBLIC.keys()
