"""The options of an offline model, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.device.offline.model import OfflineModel
    from cotune.device.offline.writer import OfflineWriter

OfflineOption = Annotated[
    Path | None,
    typer.Option(
        "--offline",
        help="Folder of an offline model (`cotune compress --export`): writes alone, or while the cloud is away.",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option(help="With --offline: CPU threads of a step; all that this process may use if left out.")
]
ContextOption = Annotated[
    int | None, typer.Option(help="With --offline: tokens of a text; as many as the model was made for if left out.")
]
AdapterOption = Annotated[
    Path | None,
    typer.Option(help="With --offline: LoRA adapter of the model, a peft folder (ONNX) or a .gguf file (llama.cpp)."),
]
MemoryLimitOption = Annotated[
    str | None, typer.Option(help="With --offline: memory it may take, such as 512MiB; what is free if left out.")
]
PatienceOption = Annotated[
    float,
    typer.Option("--fallback-after", help="With --offline: seconds of silence after which the cloud counts as away."),
]


_CLOUD_WORDS = (
    *("mode", "schedule", "answer", "draft_from", "deadline_ms", "num_beams", "length_penalty", "top_k", "window"),
    *("rtt_ms", "timeout_s", "tls_ca", "cloud_token_file", "fallback_after"),
)


def refuse_cloud_words(invocation: typer.Context) -> None:
    """Refuse options that mean nothing without a cloud, where an offline model is alone.

    Raises:
        InputError: one is given, even with the value that it has when left out.
    """
    for parameter in invocation.command.params:
        source = invocation.get_parameter_source(parameter.name or "")
        if parameter.name in _CLOUD_WORDS and source is not None and source.name == "COMMANDLINE":
            raise InputError(f"{parameter.opts[0]} needs PLUGIN and --cloud, expected it left out with --offline alone")


@dataclass(frozen=True, kw_only=True)
class OfflineChoice:
    """What a command was given about its offline model; `path` is None where there is none."""

    path: Path | None
    threads: int | None
    context: int | None
    adapter: Path | None
    memory_limit: str | None

    def __post_init__(self) -> None:
        if self.path is not None:
            return
        for name in ("threads", "context", "adapter", "memory_limit"):
            if getattr(self, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} is given without --offline, expected the model it is for")

    def load(self, *, num_texts: int = 1) -> OfflineModel:
        """The model, ready.

        Args:
            num_texts: at once; fewer where memory has no room for so many.

        Raises:
            InputError: it cannot be used, or does not fit.
        """
        from cotune.cli.memory_size import parse_bytes
        from cotune.device.offline.model import OfflineSettings
        from cotune.device.offline.runtimes import load_offline_model

        assert self.path is not None
        limit = None if self.memory_limit is None else parse_bytes(self.memory_limit, "--memory-limit")
        settings = OfflineSettings(
            context=self.context,
            num_threads=self.threads,
            memory_limit_bytes=limit,
            num_texts=num_texts,
            has_adapter=self.adapter is not None,
        )
        return load_offline_model(self.path, settings)

    def writer(self, *, num_texts: int = 1, num_drafts: int = 0) -> OfflineWriter:
        """The model with its adapter.

        Args:
            num_texts: that it writes at once.
            num_drafts: texts that it drafts for at once, beside them.
        """
        from cotune.device.offline.writer import OfflineWriter

        model = self.load(num_texts=num_texts + num_drafts)
        adapter = None if self.adapter is None else model.load_adapter(self.adapter)
        return OfflineWriter(model, adapter=adapter, num_texts=min(num_texts, max(1, model.num_texts - num_drafts)))
