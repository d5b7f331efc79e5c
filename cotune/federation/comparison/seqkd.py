"""Sequence-level distillation (Kim and Rush, arXiv 1606.07947), one way: the cloud's model writes, the devices read.

    server     y' = the likeliest answer of the cloud's model, token by token, to each public prompt x
    device     L = CE on its own texts and on all (x, y')

Prompts and answers are downloaded once, as text, which any tokenizer reads; nothing goes up, so that nothing of a
device reaches another one, and the cloud's model stays as it is. Greedy decoding stands for the paper's beam.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from cotune.data.templates import Example
from cotune.federation.comparison.party import Party
from cotune.federation.comparison.scene import CLOUD, Account, Scene, learn_at
from cotune.federation.greedy_texts import write_greedily
from cotune.federation.json_array import from_json_array, to_json_array
from cotune.federation.number_ranges import check_at_least

TEXTS = "texts"


@dataclass(frozen=True, kw_only=True)
class SeqKd:
    """Devices learn from texts that the cloud's model wrote."""

    max_new_tokens: int = 16
    """Of an answer."""

    def __post_init__(self) -> None:
        check_at_least(1, max_new_tokens=self.max_new_tokens)

    def rounds(self, scene: Scene, account: Account) -> Iterator[Mapping[str, Party]]:
        """As `Contestant`."""
        parties = scene.start()
        yield parties
        with account.at(CLOUD):
            written = self.written(parties[CLOUD], scene.public)
        texts = {}
        for name, site in scene.sites.items():
            came = from_arrays(account.send_down(name, 1, to_arrays(written), digest=scene.cloud.digest))
            texts[name] = parties[name].read([*site.examples, *came], max_tokens=scene.max_tokens)
        for number in range(1, scene.num_rounds + 1):
            taught = {name: learn_at(scene, account, name, number, parties[name], texts[name]) for name in scene.sites}
            parties = taught | {CLOUD: parties[CLOUD]}
            yield parties

    def written(self, cloud: Party, public: Sequence[Example]) -> list[Example]:
        """The public prompts with the model's own answers; those that it leaves empty are left out."""
        with cloud.loaded() as model:
            answers = write_greedily(
                model, cloud.model.reader, [one.prompt for one in public], max_new_tokens=self.max_new_tokens
            )
        return [
            Example(one.prompt, answer.text) for one, answer in zip(public, answers, strict=True) if answer.text.strip()
        ]


def to_arrays(texts: Sequence[Example]) -> dict[str, NDArray[Any]]:
    """Texts as a message carries them."""
    return {TEXTS: to_json_array([[one.prompt, one.target] for one in texts], "the texts")}


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> list[Example]:
    """What `to_arrays` gave."""
    return [Example(prompt, target) for prompt, target in from_json_array(arrays[TEXTS], "the texts")]
