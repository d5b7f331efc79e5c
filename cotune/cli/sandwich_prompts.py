"""The prompt variables of `cotune sandwich fit`, made from its options; and a model of one's own instead of a cloud."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cotune.cli.sandwich_edge import open_cloud, read_prompt_file, read_prompts
from cotune.errors import DataError, InputError

if TYPE_CHECKING:
    from cotune.sandwich.chat import CloudModel
    from cotune.sandwich.prompts.latent import LatentPrompt
    from cotune.sandwich.prompts.soft_prompt import HostedCloud
    from cotune.sandwich.prompts.variable import PromptVariable


@dataclass(frozen=True, kw_only=True)
class HostedModel:
    """A model in this process that reads soft prompts.

    Attributes:
        model: folder, hub name or `starter`.
        num_tokens, dim, seed: of the prefix and of the matrix from numbers to it.
    """

    model: str
    num_tokens: int
    dim: int
    seed: int

    def to_json(self) -> dict[str, Any]:
        """For `sandwich.json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Any) -> HostedModel:
        """What `to_json` gave.

        Raises:
            TypeError: it is none.
        """
        made = cls(**fields)
        kinds = {"model": str, "num_tokens": int, "dim": int, "seed": int}
        if not all(type(getattr(made, name)) is kind for name, kind in kinds.items()):
            raise TypeError
        return made

    def open(self) -> HostedCloud:
        """Load it.

        Raises:
            InputError: the model cannot be loaded.
        """
        from cotune.models.backbone import Backbone
        from cotune.sandwich.prompts.soft_prefix import SoftPrefix
        from cotune.sandwich.prompts.soft_prompt import HostedCloud

        backbone = Backbone.from_pretrained(self.model)
        return HostedCloud(SoftPrefix(backbone, num_tokens=self.num_tokens, dim=self.dim, seed=self.seed))


@contextmanager
def open_cloud_or_hosted(
    url: str | None, hosted: Mapping[str, Any] | None, key_variable: str | None
) -> Iterator[CloudModel]:
    """The cloud at a URL, or the model in this process that a soft prompt was fitted for.

    Raises:
        InputError: none of both, or both, or as `open_cloud`.
    """
    if hosted is not None:
        if url is not None:
            raise InputError("--cloud is given with a soft prompt, which no API reads; leave it out")
        try:
            described = HostedModel.from_json(hosted)
        except TypeError:
            raise InputError("the fitted sandwich names no hosted model that can be opened; fit it again") from None
        yield described.open()
        return
    if url is None:
        raise InputError("--cloud is missing, expected the base URL of an OpenAI-compatible API")
    with open_cloud(url, key_variable) as cloud:
        yield cloud


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """What the options say of the prompt.

    Attributes:
        prompts: file.
        writer: model of latent.
        num_tokens, dim, radius: of prefix, numbers and differences.
        cma_evaluations: prompts of one response by CMA-ES; None for slopes.
        num_samples: prompts of one estimate of categorical.
        seed: of all draws.
    """

    prompts: Path | None
    writer: str | None
    num_tokens: int
    dim: int
    radius: float
    cma_evaluations: int | None
    num_samples: int
    seed: int


def _pool(options: PromptOptions) -> PromptVariable:
    from cotune.sandwich.prompts.pool import PromptPool

    return PromptPool(read_prompts(_file(options, "one prompt a line, or a .json list of texts")))


def _categorical(options: PromptOptions) -> PromptVariable:
    from cotune.sandwich.prompts.categorical import CategoricalPrompt

    path = _file(options, "a .json list with a list of words or phrases for each place")
    places = _read_places(path)
    return CategoricalPrompt(places, num_samples=options.num_samples, seed=options.seed)


def _latent(options: PromptOptions) -> PromptVariable:
    from cotune.models.backbone import Backbone
    from cotune.sandwich.prompts.soft_prefix import SoftPrefix

    if options.writer is None:
        raise InputError("--variable is latent and no model writes the prompt, expected --writer or --edge")
    text = _one_text(_file(options, "a text that the writer goes on from, such as a few examples"))
    backbone = Backbone.from_pretrained(options.writer)
    prefix = SoftPrefix(backbone, num_tokens=options.num_tokens, dim=options.dim, seed=options.seed)
    return _searched(options, prefix.writer(text))


def _soft(options: PromptOptions) -> PromptVariable:
    from cotune.sandwich.prompts.soft_prompt import soft_words

    return _searched(options, soft_words)


VARIABLES: Mapping[str, Callable[[PromptOptions], PromptVariable]] = {
    "pool": _pool,
    "categorical": _categorical,
    "latent": _latent,
    "soft": _soft,
}


def make_variable(name: str, options: PromptOptions) -> PromptVariable:
    """The prompt variable of that name.

    Raises:
        InputError, DataError: an unknown name, or an option or file that it needs is missing.
    """
    if name not in VARIABLES:
        raise InputError(f"--variable is {name!r:.40}, expected one of {', '.join(VARIABLES)}")
    if options.cma_evaluations is not None and name not in ("latent", "soft"):
        raise InputError(f"--cma-evaluations is given and --variable is {name}, expected latent or soft")
    return VARIABLES[name](options)


def _searched(options: PromptOptions, write: Callable[[Any], str]) -> PromptVariable:
    from cotune.sandwich.prompts.cma_response import CmaResponse
    from cotune.sandwich.prompts.latent import LatentPrompt

    inner: LatentPrompt = LatentPrompt(write, dim=options.dim, smoothing_radius=options.radius, seed=options.seed)
    if options.cma_evaluations is None:
        return inner
    return CmaResponse(inner, spread=options.radius, max_evaluations=options.cma_evaluations, seed=options.seed)


def _file(options: PromptOptions, what: str) -> Path:
    if options.prompts is None:
        raise InputError(f"--prompts is missing, expected a file: {what}")
    return options.prompts


def _read_places(path: Path) -> list[list[str]]:
    try:
        places = json.loads(read_prompt_file(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        places = None
    if not isinstance(places, list) or not all(
        isinstance(place, list) and all(isinstance(word, str) for word in place) for place in places
    ):
        raise DataError("holds no places, expected a JSON list with a list of texts for each", path=path)
    return places


def _one_text(path: Path) -> str:
    text = read_prompt_file(path)
    if not text.strip():
        raise DataError("is empty, expected a text that the writer goes on from", path=path)
    return text
