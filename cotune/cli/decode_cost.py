"""What a model costs to run: `python -m cotune.cli.decode_cost FOLDER ...` measures one in this process, as JSON.

A prompt of random tokens is read, then tokens follow one by one, several times over; an exported folder by its own
runtime, without PyTorch in the process, any other by PyTorch. Speeds are the median and the quartiles of the single
passes, after one round that does not count. Memory is by how much the process grew at most while the model was loaded
and wrote once, weights included and libraries not; that is the second time that it is loaded here, since the first one
also pays for what libraries set up once.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cotune.device.offline.folder import DESCRIPTION_FILE
from cotune.errors import InputError
from cotune.evaluation.measured_memory import peak_bytes, run_measured


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """What is measured."""

    num_prompt_tokens: int = 64
    """Read at once, fewer in a model of a shorter context."""
    num_new_tokens: int = 32
    """Then written."""
    num_rounds: int = 5
    """That count."""
    num_threads: int = 1
    """That compute."""
    dtype: str = "bfloat16"
    """Of the weights in PyTorch; exported models have their own."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second.

    Attributes:
        median, low, high: of single passes; the last two are the quartiles.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, num_tokens: int, seconds: Sequence[float]) -> Speed:
        """Of passes of so many tokens each.

        Example:
            >>> Speed.of(10, [1.0, 2.0, 4.0])
            Speed(median=5.0, low=3.75, high=7.5)
        """
        low, median, high = statistics.quantiles([num_tokens / each for each in seconds], n=4, method="inclusive")
        return cls(median=median, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class DecodeCost:
    """What was measured.

    Attributes:
        runtime: onnxruntime, llama.cpp or torch.
        dtype: of the weights in PyTorch; empty elsewhere.
        num_threads: that computed.
        prefill, decode: tokens of the prompt, and new ones, per second.
        peak_bytes: memory, see above; None where the system has no such count.
    """

    runtime: str
    dtype: str
    num_threads: int
    prefill: Speed
    decode: Speed
    peak_bytes: int | None

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> DecodeCost:
        """What a child printed."""
        speeds = {name: Speed(**found[name]) for name in ("prefill", "decode")}
        return cls(**{**found, **speeds})


class Runner(Protocol):
    """A loaded model."""

    def begin(self) -> None:
        """Forget all tokens."""
        ...

    def read(self, token_ids: Sequence[int]) -> None:
        """Compute the logits behind these tokens, which follow those before."""
        ...


def measure_decode(folder: Path, settings: DecodeSettings, *, timeout_s: float = 1800.0) -> DecodeCost:
    """Measure in a child process.

    Raises:
        CotuneError: it failed; says why.
    """
    options = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(settings).items()]
    threads = str(settings.num_threads)
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    arguments = ["-m", "cotune.cli.decode_cost", str(folder), *options]
    return DecodeCost.from_json(run_measured(arguments, environment=environment, timeout_s=timeout_s))


def decode_cost(folder: Path, settings: DecodeSettings) -> DecodeCost:
    """Measure in this process; see `measure_decode`."""
    is_exported = (folder / DESCRIPTION_FILE).is_file()
    load, runtime, vocab_size, context = (_offline if is_exported else _torch)(folder, settings)
    num_prompt = min(settings.num_prompt_tokens, max(1, context - settings.num_new_tokens - 1))
    num_new = min(settings.num_new_tokens, context - num_prompt)
    ids = np.random.default_rng(0).integers(0, vocab_size, num_prompt + num_new).tolist()
    prompt, rest = ids[:num_prompt], ids[num_prompt:]

    def write(runner: Runner) -> tuple[float, list[float]]:
        runner.begin()
        return _timed(partial(runner.read, prompt)), [_timed(partial(runner.read, [token])) for token in rest]

    runner = load()
    write(runner)
    rounds = [write(runner) for _ in range(settings.num_rounds)]
    del runner
    gc.collect()
    try:
        peak: int | None = peak_bytes(lambda: write(load()))
    except InputError:
        peak = None
    return DecodeCost(
        runtime=runtime,
        dtype="" if is_exported else settings.dtype,
        num_threads=settings.num_threads,
        prefill=Speed.of(num_prompt, [prefill_s for prefill_s, _ in rounds]),
        decode=Speed.of(1, [each for _, seconds in rounds for each in seconds]),
        peak_bytes=peak,
    )


Load = tuple[Callable[[], Runner], str, int, int]
"""What makes a runner, the runtime's name, words, context."""


def _offline(folder: Path, settings: DecodeSettings) -> Load:
    from cotune.device.offline.folder import OfflineFolder
    from cotune.device.offline.model import OfflineModel, OfflineSettings
    from cotune.device.offline.runtimes import load_offline_model

    description = OfflineFolder.open(folder).description
    context = min(description.context, settings.num_prompt_tokens + settings.num_new_tokens)

    class OfflineRunner:
        def __init__(self) -> None:
            own = OfflineSettings(context=context, num_threads=settings.num_threads)
            self._model: OfflineModel = load_offline_model(folder, own)
            self._text = self._model.open()

        def begin(self) -> None:
            self._text.truncate(0)

        def read(self, token_ids: Sequence[int]) -> None:
            self._text.extend(token_ids)

    return (
        OfflineRunner,
        {"onnx": "onnxruntime", "gguf": "llama.cpp"}[description.runtime],
        *_size(description.vocab_size, context),
    )


def _torch(folder: Path, settings: DecodeSettings) -> Load:
    import torch
    from transformers import AutoConfig, DynamicCache

    from cotune.models.weights import load_model

    torch.set_num_threads(settings.num_threads)
    config = AutoConfig.from_pretrained(folder).get_text_config()

    class TorchRunner:
        def __init__(self) -> None:
            self._model = load_model(folder, dtype=settings.dtype, device="cpu").eval()
            self.begin()

        def begin(self) -> None:
            self._cache = DynamicCache(config=self._model.config)

        def read(self, token_ids: Sequence[int]) -> None:
            with torch.inference_mode():
                self._model(input_ids=torch.tensor([list(token_ids)]), past_key_values=self._cache, logits_to_keep=1)

    return TorchRunner, "torch", *_size(config.vocab_size, config.max_position_embeddings)


def _size(vocab_size: int, context: int) -> tuple[int, int]:
    return int(vocab_size), int(context)


def _timed(work: Callable[[], None]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def main(arguments: Sequence[str] | None = None) -> None:
    """The child's own command line."""
    parser = argparse.ArgumentParser(description="What a model costs to run, as JSON.")
    parser.add_argument("folder", type=Path)
    for name, default in asdict(DecodeSettings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args(arguments))
    cost = decode_cost(given.pop("folder"), DecodeSettings(**given))
    print(json.dumps(asdict(cost)))


if __name__ == "__main__":
    main()
