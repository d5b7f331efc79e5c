"""What `cotune tune` refuses before it loads anything: options that are out of range, or do not go together."""

from __future__ import annotations

import math
from collections.abc import Mapping

from cotune.cli.tune_settings import TuneSettings
from cotune.durable import is_free
from cotune.errors import InputError

# Written out, because the table of the methods needs PyTorch, which takes seconds; a test compares them.
ATTACHED_METHODS = (
    *("full", "lora", "dora", "rslora", "ia3", "vera", "adapter"),
    *("soft_prompt", "p_tuning", "prefix", "bias", "blocks"),
)
METHODS = (*ATTACHED_METHODS, "side")
ESTIMATOR_NAMES = ("backprop", "zeroth_order", "forward_gradient")
OBJECTIVES = ("nats", "rouge_l", "token_f1", "exact_match", "accuracy")
ZO_RULES = ("plain", "momentum", "adam")
SPARSE_CRITERIA = ("gradient", "magnitude")
SIDES = ("ladder", "attention")
SIDE_INITS = ("random", "backbone")
# The file that tells that a folder holds a result; peft's methods all have the same.
_PEFT_FILE = "adapter_config.json"
RESULT_FILES = {
    "side": "plugin.json",
    "adapter": "bottleneck.safetensors",
    **dict.fromkeys(("full", "bias", "blocks"), "selected.safetensors"),
}

# What the command has where nothing is said; of the attached methods alone, and of side alone.
_ATTACHED_ONLY: dict[str, object] = {
    "merged": None,
    "gradient_checkpointing": False,
    "base_bits": None,
    "batch_size": 8,
    "rank": None,
    "alpha": None,
    "init": None,
    "width": None,
    "virtual_tokens": None,
    "memory_budget_bytes": None,
    "estimator": "backprop",
    "zo_eps": None,
    "directions": None,
    "zo_rule": None,
    "sparse_share": None,
    "sparse_by": None,
    "objective": "nats",
    "labels": None,
    "forward_mode": False,
}
_SIDE_ONLY: dict[str, object] = {"family": "parallel", "side": "ladder", "side_width": 64, "side_init": "random"}
_POSITIVE = ("learning_rate", "alpha", "zo_eps", "dp_epsilon", "dp_clip")
_COUNTS = ("epochs", "limit", "batch_size", "directions", "rank", "width", "virtual_tokens", "side_width")
# What every generator of random numbers takes.
_LARGEST_SEED = 2**63 - 1


def check_settings(settings: TuneSettings) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        InputError: an option is unknown, out of range, or without use beside another one; the message names it.
    """
    _check_ranges(settings)
    _check_words(settings)
    _check_method(settings)
    _check_estimator(settings)
    _check_privacy(settings)
    if settings.base_bits is not None and settings.merged is not None:
        raise InputError("--base-bits and --merged are given, but low-bit weights take nothing in; drop one of them")
    _check_folders(settings)


def option(name: str) -> str:
    """How a field of the settings is written on the command line."""
    return {"memory_budget_bytes": "--memory-budget"}.get(name, "--" + name.replace("_", "-"))


def foreign_options(method: str) -> Mapping[str, object]:
    """Fields of the settings that a method has nothing to do with, and what they are where nothing is said."""
    return _ATTACHED_ONLY if method == "side" else _SIDE_ONLY


def _check_ranges(settings: TuneSettings) -> None:
    for name in _POSITIVE:
        value = getattr(settings, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{option(name)} is {value}, expected a positive number")
    for name in _COUNTS:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InputError(f"{option(name)} is {value}, expected at least 1")
    if settings.max_length is not None and settings.max_length < 2:
        raise InputError(
            f"--max-length is {settings.max_length}, expected at least 2: one token of the prompt and one of the target"
        )
    if not 0 <= settings.heldout_share < 1:
        raise InputError(f"--heldout-share is {settings.heldout_share}, expected 0 to below 1, such as 0.2")
    if settings.share is not None and not 0 < settings.share <= 1:
        raise InputError(f"--share is {settings.share}, expected above 0 and at most 1, such as 0.1")
    if settings.sparse_share is not None and not 0 < settings.sparse_share <= 1:
        raise InputError(f"--sparse-share is {settings.sparse_share}, expected above 0 and at most 1, such as 0.01")
    if not 0 <= settings.seed <= _LARGEST_SEED:
        raise InputError(f"--seed is {settings.seed}, expected 0 to {_LARGEST_SEED}")


def _check_words(settings: TuneSettings) -> None:
    for name, known in (
        ("method", METHODS),
        ("side", SIDES),
        ("side_init", SIDE_INITS),
        ("estimator", ESTIMATOR_NAMES),
        ("objective", OBJECTIVES),
        ("zo_rule", ZO_RULES),
        ("sparse_by", SPARSE_CRITERIA),
    ):
        value = getattr(settings, name)
        if value is not None and value not in known:
            raise InputError(f"{option(name)} is {value!r}, expected one of {', '.join(known)}")


def _check_method(settings: TuneSettings) -> None:
    if settings.side_init == "backbone" and settings.side != "attention":
        raise InputError(
            f"--side-init is 'backbone' and --side {settings.side!r}, expected --side attention, or random"
        )
    foreign = foreign_options(settings.method)
    given = [option(name) for name, default in foreign.items() if getattr(settings, name) != default]
    if given:
        raise InputError(f"--method is {settings.method!r}, which has no {' and no '.join(given)}; leave it out")


def _check_estimator(settings: TuneSettings) -> None:
    if settings.objective != "nats" and settings.estimator != "zeroth_order":
        raise InputError(
            f"--objective is {settings.objective!r} and --estimator {settings.estimator!r}, expected zeroth_order, "
            "which needs no gradient of it"
        )
    if settings.labels is not None and settings.objective != "accuracy":
        raise InputError(
            f"--labels is given and --objective is {settings.objective!r}, expected accuracy; or leave --labels out"
        )
    if settings.sparse_by is not None and settings.sparse_share is None:
        raise InputError("--sparse-by is given without --sparse-share; give that too, or leave it out")
    if settings.forward_mode and settings.zo_eps is not None:
        raise InputError("--zo-eps is given with --forward-mode, whose derivatives are exact; drop one of them")
    if settings.gradient_checkpointing and settings.estimator != "backprop":
        raise InputError(
            f"--gradient-checkpointing is given and --estimator is {settings.estimator!r}, which keeps nothing for a "
            "backward pass; leave it out"
        )


def _check_privacy(settings: TuneSettings) -> None:
    if settings.dp_epsilon is None:
        if settings.dp_delta is not None or settings.dp_clip is not None:
            raise InputError("--dp-delta or --dp-clip is given without --dp-epsilon; give that too, or leave them out")
        return
    if settings.dp_delta is not None and not 0 < settings.dp_delta < 1:
        raise InputError(f"--dp-delta is {settings.dp_delta}, expected above 0 and below 1, such as 1e-5")
    if settings.heldout_share > 0:
        raise InputError(
            f"--heldout-share is {settings.heldout_share} and --dp-epsilon is given, which does not cover a choice by "
            "held-out texts; leave it out, or give 0"
        )
    if settings.gradient_checkpointing:
        raise InputError(
            "--gradient-checkpointing and --dp-epsilon are given, but the gradients of single texts come from what a "
            "pass keeps; drop one of them, or take a smaller --batch-size, which here decides memory alone"
        )


def _check_folders(settings: TuneSettings) -> None:
    result_file = RESULT_FILES.get(settings.method, _PEFT_FILE)
    for folder, name, earlier in ((settings.out, "--out", result_file), (settings.merged, "--merged", None)):
        if folder is not None and not is_free(folder, earlier=earlier):
            raise InputError(f"{name} is {folder}, which holds something else; give a new folder")
    if settings.merged is None:
        return
    merged = settings.merged.resolve()
    for folder in (settings.out.resolve(), settings.run.resolve()):
        if merged == folder or merged in folder.parents or folder in merged.parents:
            raise InputError(
                f"--merged is {settings.merged} and --out {settings.out}, expected two folders of which none is in the "
                "other or in its run"
            )
