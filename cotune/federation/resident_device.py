"""A device from its settings: a backbone that stays loaded, its texts, its key, and the trainer that serves it.

name = "kitchen"                    # as registered
folder = "/run/cotune/kitchen"      # where the trainer listens; a short path
key = "kitchen.key"                 # `DeviceKey.save`
secret = "run.secret"               # the run's, the same on all devices
ledger = "ledger.jsonl"             # everything that leaves, by kind, bytes and digest
model = "starter"                   # the same as the server's

[data]
path = "my-texts.jsonl"

[adapter]                           # the same as the server's

For `coplms`, also:

[co_tuning]
small_model = "my-small-model"      # the device's own, of any architecture and tokenizer
folder = "kitchen-state"            # what it learns for itself, which stays

`python -m cotune.federation.resident_device device.toml` serves until SIGTERM.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cotune.data import read_examples
from cotune.errors import CotuneError, InputError
from cotune.federation.backbone_model import ResidentBackbone
from cotune.federation.causal_model import CausalModel
from cotune.federation.co_tuning_device import CoTuningDevice
from cotune.federation.co_tuning_parts import scale_of
from cotune.federation.device_agent import DeviceAgent
from cotune.federation.fresh_adapter import fresh_adapter
from cotune.federation.resident_trainer import ResidentTrainer
from cotune.federation.run_secret import RunSecret
from cotune.federation.settings import AdapterSettings
from cotune.federation.signing import DeviceKey
from cotune.federation.tables import read_toml
from cotune.file_cache import DEFAULT_MAX_BYTES
from cotune.ledger import EgressLedger
from cotune.models.backbone import Backbone
from cotune.tuning.personal import encode_examples

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OwnTexts:
    """What the device learns from. It stays there."""

    path: str
    """As for `cotune tune`."""
    template: str | None = None
    """How columns become prompts; found by itself if left out."""
    limit: int | None = None
    """Texts in all, at most."""
    max_length: int = 256
    """Tokens of one text."""


@dataclass(frozen=True, kw_only=True)
class CoTuningSettings:
    """The device's side of `coplms`."""

    small_model: str
    """A Hugging Face folder or a Hub name: any causal language model with a fast tokenizer."""
    folder: str
    """Where the small model and the private adapter are kept after each round, and readings of texts. Nobody else's."""
    proxy_digest: str = ""
    """On a device without room for the proxy, whose `model` is empty: `base_digest` of the server's `server.json`."""
    max_cache_bytes: int = DEFAULT_MAX_BYTES
    """Of readings."""


@dataclass(frozen=True, kw_only=True)
class DeviceSettings:
    """One device."""

    name: str
    """As registered."""
    folder: str
    """Where the trainer listens."""
    key: str
    """File of the device's private key."""
    secret: str
    """File of the run's secret."""
    data: OwnTexts
    """Its texts."""
    model: str = "starter"
    """A Hugging Face folder, a Hub name, or starter; with `coplms` the proxy."""
    co_tuning: CoTuningSettings | None = None
    """Only with `coplms`."""
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    """What is tuned; the same on all devices."""
    ledger: str | None = None
    """File that tells everything that leaves; none if left out."""
    seed: int = 0
    """Of the order of texts."""
    dtype: str = "float32"
    """Of the backbone: float32, bfloat16 or float16."""
    torch_device: str = "cpu"
    """A PyTorch device, such as cpu or cuda."""

    @classmethod
    def read(cls, path: Path | str) -> DeviceSettings:
        """A TOML file.

        Raises:
            InputError: it cannot be read, or a key or value is wrong; names it.
        """
        return read_toml(cls, path)


class LedgeredAgent:
    """An agent whose ledger is on the disk before a reply leaves, so that `kill -9` loses no line of it.

    Args:
        agent: does the work.
        ledger: that it tells; None if it tells none.
    """

    def __init__(self, agent: DeviceAgent, ledger: EgressLedger | None) -> None:
        self._agent, self._ledger = agent, ledger

    def handle(self, data: bytes) -> bytes:
        return self._flushed(self._agent.handle(data))

    def introduce(self, question: bytes) -> bytes:
        return self._flushed(self._agent.introduce(question))

    def _flushed(self, sent: bytes) -> bytes:
        if self._ledger is not None:
            self._ledger.flush()
        return sent


@contextmanager
def resident_agent(settings: DeviceSettings) -> Iterator[LedgeredAgent]:
    """The device with its backbone loaded, for as long as this is open.

    Raises:
        InputError: the model, the texts, the key or the secret cannot be used.
    """
    if settings.co_tuning is not None:
        with _co_tuning_agent(settings, settings.co_tuning) as found:
            yield found
        return
    key, secret = DeviceKey.load(settings.key), RunSecret.load(settings.secret)
    data = settings.data
    texts = read_examples(data.path, data.template, data.limit, settings.seed)
    backbone = Backbone.from_pretrained(settings.model, dtype=settings.dtype, device=settings.torch_device)
    with ExitStack() as stack:
        adapter = fresh_adapter(settings.adapter, backbone, seed=settings.seed)
        resident = stack.enter_context(ResidentBackbone(backbone, adapter))
        encoded = encode_examples(backbone.tokenizer_json, texts, backbone.description, data.max_length)
        ledger = None if settings.ledger is None else stack.enter_context(EgressLedger(Path(settings.ledger)))
        agent = DeviceAgent(
            settings.name,
            resident.with_texts(encoded),
            base_digest=backbone.spec.backbone_digest,
            secret=secret,
            key=key,
            seed=settings.seed,
            ledger=ledger,
        )
        yield LedgeredAgent(agent, ledger)


@contextmanager
def _co_tuning_agent(settings: DeviceSettings, own: CoTuningSettings) -> Iterator[LedgeredAgent]:
    """A device with a model of its own; its models are loaded while they work, and not now."""
    if bool(settings.model) == bool(own.proxy_digest):
        raise InputError(
            f"model is {settings.model!r} and co_tuning.proxy_digest {own.proxy_digest!r:.20}, expected one of them: "
            "the proxy, or on a device without room for it the proxy's digest"
        )
    key, secret, data = DeviceKey.load(settings.key), RunSecret.load(settings.secret), settings.data
    texts = read_examples(data.path, data.template, data.limit, settings.seed)
    proxy = CausalModel(settings.model, settings.dtype, settings.torch_device) if settings.model else None
    device = CoTuningDevice(
        texts,
        small=CausalModel(own.small_model, settings.dtype, settings.torch_device),
        proxy=proxy,
        folder=Path(own.folder),
        scale=scale_of(settings.adapter),
        max_tokens=data.max_length,
        max_cache_bytes=own.max_cache_bytes,
    )
    # What cannot be used is said now and not in the first round.
    device.check()
    with ExitStack() as stack:
        ledger = None if settings.ledger is None else stack.enter_context(EgressLedger(Path(settings.ledger)))
        agent = DeviceAgent(
            settings.name,
            device,
            base_digest=own.proxy_digest if proxy is None else proxy.digest,
            secret=secret,
            key=key,
            seed=settings.seed,
            ledger=ledger,
            works=device.works,
        )
        yield LedgeredAgent(agent, ledger)


def serve_device(settings: DeviceSettings) -> None:
    """Serve the device until SIGTERM or SIGINT. Only in the main thread.

    Raises:
        InputError: as for `resident_agent`, or another trainer listens in the folder.
    """
    with resident_agent(settings) as agent, ResidentTrainer(agent, settings.folder) as trainer:
        logger.info("%s listens in %s", settings.name, settings.folder)
        trainer.serve_until_signalled()


def main(arguments: Sequence[str]) -> int:
    """The program: one argument, the settings."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if len(arguments) != 1:
        print("expected one argument, a TOML file of the device's settings", file=sys.stderr)
        return 2
    try:
        serve_device(DeviceSettings.read(arguments[0]))
    except CotuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
