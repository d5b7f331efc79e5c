"""What `cotune sandwich ask` and `fit` share: cloud and key, edge, prompts, and a fitted sandwich on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cotune.cli.run_folder import write_json
from cotune.durable import remove_folder
from cotune.errors import DataError, InputError

if TYPE_CHECKING:
    from cotune.sandwich.bilevel.problem import Vector
    from cotune.sandwich.cost import Price
    from cotune.sandwich.edge_adapter import EdgeAdapter, EdgeConfig, EdgeMerger, EdgeRewriter
    from cotune.sandwich.openai_cloud import OpenAiCloud
    from cotune.sandwich.rewriter_preferences import PreferenceConfig
    from cotune.tuning.copy_gate import CopyGate

KEY_VARIABLE = "COTUNE_CLOUD_KEY"
FITTED_FILE, ADAPTER_FOLDER, REWRITER_FOLDER = "sandwich.json", "adapter", "rewriter"
_MAX_FILE_BYTES = 1 << 22


@contextmanager
def open_cloud(
    url: str, key_variable: str | None, *, default_variable: str = KEY_VARIABLE, option: str = "--key-env"
) -> Iterator[OpenAiCloud]:
    """The cloud at a URL, with the key that stands in a variable of the environment.

    Args:
        key_variable: which one; None for the default one, if it is set.
        default_variable: see there.
        option: that names the variable, for errors.

    Raises:
        InputError: a variable that was named is not set, or the URL cannot be used.
    """
    from cotune.sandwich.openai_cloud import ApiKey, OpenAiCloud

    secret = os.environ.get(key_variable or default_variable)
    if secret is None and key_variable is not None:
        raise InputError(f"{option} is {key_variable}, and there is no such variable; set it to the API key")
    with closing(OpenAiCloud(url, None if secret is None else ApiKey(secret))) as cloud:
        yield cloud


def price_of(model: str, prices: Path | None) -> Price | None:
    """The model's price in a table; None where there is no table.

    Raises:
        InputError: the table lacks the model.
    """
    from cotune.sandwich.cost import read_prices

    if prices is None:
        return None
    table = read_prices(prices)
    if model not in table:
        raise InputError(
            f"{prices} has no price of {model!r:.80}, expected one of {', '.join(table) or 'none'}; add it"
        )
    return table[model]


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: a JSON list of texts where it ends in .json, else one a line.

    Raises:
        DataError: it holds none.
    """
    text = read_prompt_file(path)
    try:
        prompts = json.loads(text) if path.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        prompts = None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(each, str) for each in prompts):
        raise DataError("holds no prompts, expected a JSON list of texts or one prompt a line", path=path)
    return prompts


def read_prompt_file(path: Path) -> str:
    """The text of a small file.

    Raises:
        DataError: it cannot be read, is too large, or no UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise DataError(f"has more than {_MAX_FILE_BYTES} bytes, expected a few prompts", path=path)
        return data.decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from None
    except UnicodeDecodeError as error:
        raise DataError(f"is no UTF-8 at byte {error.start}; convert it first", path=path) from None


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A sandwich as `fit` leaves it.

    Attributes:
        folder: of the run.
        model: of the cloud.
        max_tokens: of its answers.
        prompt: for it.
        edge: the edge model; None for none.
        template, max_new_tokens: of the edge.
        hosted: of a soft prompt, the model that reads it, as `HostedModel.to_json` gives it; None for a cloud.
        is_rewriting: the edge works before the cloud too, with an adapter of its own.
        is_merging: it works behind the cloud.
        is_copying: it has a copy gate there; those of older runs have none.
    """

    folder: Path
    model: str
    max_tokens: int
    prompt: str
    edge: str | None
    template: str | None
    max_new_tokens: int | None
    hosted: dict[str, Any] | None = None
    is_rewriting: bool = False
    is_merging: bool = True
    is_copying: bool = False

    def save(self) -> None:
        """Write `sandwich.json`."""
        fields = {name: value for name, value in vars(self).items() if name != "folder"}
        write_json(self.folder / FITTED_FILE, fields)

    @classmethod
    def load(cls, folder: Path) -> Fitted:
        """What `save` wrote.

        Raises:
            DataError: the folder holds none.
        """
        path = folder / FITTED_FILE
        try:
            fields = json.loads(path.read_bytes()[:_MAX_FILE_BYTES])
            made = cls(folder=folder, **fields)
        except OSError as error:
            raise DataError(
                f"cannot be read: {error.strerror}; finish `cotune sandwich fit` first", path=path
            ) from None
        except (ValueError, TypeError, RecursionError):
            raise DataError("is no fitted sandwich", path=path) from None
        kinds = {"model": str, "max_tokens": int, "prompt": str}
        if not all(isinstance(getattr(made, name), kind) for name, kind in kinds.items()):
            raise DataError("is no fitted sandwich", path=path)
        return made


class SaveEdge(Protocol):
    """Writes an edge's adapter when its model is itself again."""

    def __call__(self, x: Vector, folder: Path, *, with_gate: bool) -> None:
        """
        Args:
            x: its numbers.
            folder: where; an earlier one goes.
            with_gate: the copy gate, too, where the edge has one.
        """


@contextmanager
def open_edge(
    model: str, config: EdgeConfig, *, rank: int = 4, seed: int = 0, dtype: str = "float32", device: str = "cpu"
) -> Iterator[tuple[EdgeAdapter, SaveEdge]]:
    """An edge model with a fresh LoRA adapter, and a function that saves the adapter with given numbers.

    Raises:
        InputError: the model cannot be loaded.
    """
    from cotune.models.adapters import LoraAdapter, LoraShape
    from cotune.models.backbone import Backbone
    from cotune.sandwich.edge_adapter import edge_adapter

    backbone = Backbone.from_pretrained(model, dtype=dtype, device=device)
    fresh = LoraAdapter.fresh(backbone.model, LoraShape(rank=rank), seed=seed)
    last: list[tuple[LoraAdapter, CopyGate | None, Path]] = []
    with edge_adapter(backbone, fresh, config) as edge:

        def save(x: Vector, folder: Path, *, with_gate: bool) -> None:
            last.append((fresh.trained(edge.params(x)), edge.gate(x) if with_gate else None, folder))

        yield edge, save
    for adapter, gate, folder in last:  # now that the model is itself again
        if folder.exists():
            remove_folder(folder)
        adapter.save(folder, backbone.model)
        if gate is not None:
            gate.save(folder)


@contextmanager
def open_fitted_edge(
    fitted: Fitted, *, dtype: str = "float32", device: str = "cpu"
) -> Iterator[tuple[EdgeMerger | None, EdgeRewriter | None]]:
    """The halves of a fitted sandwich: merger and rewriter; None for what it does not have.

    Raises:
        InputError: the edge model or its adapter cannot be loaded.
    """
    from cotune.models.adapter_folder import load_adapter
    from cotune.models.backbone import Backbone
    from cotune.sandwich.edge_adapter import EdgeConfig, EdgeMerger, EdgeRewriter, edge_adapter
    from cotune.tuning.copy_gate import CopyGate

    is_working = fitted.is_merging or fitted.is_rewriting
    if fitted.edge is None or fitted.template is None or fitted.max_new_tokens is None or not is_working:
        yield None, None
        return
    backbone = Backbone.from_pretrained(fitted.edge, dtype=dtype, device=device)
    adapter = load_adapter(fitted.folder / ADAPTER_FOLDER, backbone.model)
    config = EdgeConfig(template=fitted.template, max_new_tokens=fitted.max_new_tokens, copies=fitted.is_copying)
    gate = CopyGate.load(fitted.folder / ADAPTER_FOLDER, backbone.spec.hidden_size) if fitted.is_copying else None
    before = load_adapter(fitted.folder / REWRITER_FOLDER, backbone.model) if fitted.is_rewriting else None
    with edge_adapter(backbone, adapter, config, gate=gate) as edge:
        rewriter = None if before is None else EdgeRewriter(edge, edge.numbers_of(before))
        yield EdgeMerger(edge, edge.start()) if fitted.is_merging else None, rewriter


def preferences_given(num_rounds: int | None, **settings: float | None) -> PreferenceConfig | None:
    """How a rewriter learns from pairs, by the options that were given; None where it does not.

    Args:
        num_rounds: None: not at all.
        settings: of `PreferenceConfig`, by name; None for its own.

    Raises:
        InputError: settings without rounds, or one that cannot be.
    """
    from cotune.sandwich.rewriter_preferences import PreferenceConfig

    named: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    if num_rounds is not None:
        try:
            return PreferenceConfig(num_rounds=num_rounds, **named)
        except InputError as error:
            # By the name that was typed.
            name, _, rest = str(error).partition(" ")
            raise InputError(f"--dpo-{name.removeprefix('num_').replace('_', '-')} {rest}") from None
    for name in named:
        raise InputError(f"--dpo-{name.replace('_', '-')} is given without --dpo-rounds, expected it too; add it")
    return None


def metric_named(name: str) -> Callable[[str, Sequence[str]], float]:
    """A metric of texts.

    Raises:
        InputError: an unknown name.
    """
    from cotune.evaluation import exact_match, rouge_l, token_f1

    metrics = {"token_f1": token_f1, "exact_match": exact_match, "rouge_l": rouge_l}
    if name not in metrics:
        raise InputError(f"--metric is {name!r:.40}, expected one of {', '.join(metrics)}")
    return metrics[name]
