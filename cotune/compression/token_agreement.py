"""Does an exported model write what its source writes?

The source is run in PyTorch, in float32 with exactly the weights that the export holds: rounded weights as what their
codes stand for. Greedy tokens of both are compared prompt by prompt, up to the first that differs. From there on texts
differ anyway, so the rest is judged on the source's text: at which share of positions the exported model would have
chosen the same token.

Where they differ, the same graph is asked again with float32 activations. If that agrees with the source, rounding
activations to int8 is the cause; if not, but logits differ by no more than sums in another order do, it is that.
Anything else is no rounding, and called so. llama.cpp keeps keys and values in half precision, which moves logits by up
to a hundredth of their spread, and rounds activations to int8 in every quantised format, for which a twenty-fifth was
seen in the root mean square with random weights; differences up to a hundredth, and a tenth, are put down to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import DynamicCache, PreTrainedModel

from cotune.compression.gguf_export import check_gguf
from cotune.compression.llama_folder import LlamaFolder
from cotune.compression.onnx_export import check_onnx, read_config
from cotune.compression.written_weights import WrittenWeights
from cotune.device.offline.folder import OfflineFolder
from cotune.device.offline.model import OfflineModel, OfflineSettings, OfflineText
from cotune.device.offline.onnx_model import PLAIN_FILE, OnnxModel
from cotune.device.offline.runtimes import RUNTIMES
from cotune.errors import InputError
from cotune.models.weights import load_model

INT8_ACTIVATIONS, ORDER_OF_SUMS, UNEXPLAINED = "int8 activations", "order of sums", "unexplained"
HALF_CACHE = "half-precision cache"
"""Why two tokens differ."""

_SUMS_DIFFER_BY = 1e-3
"""Of the spread of a position's logits: what float32 sums in another order may differ by."""
_HALF_CACHE_DIFFERS_BY = 0.01
"""The same of llama.cpp with whole weights."""
_LLAMA_CPP_DIFFERS_BY = 0.1
"""The root mean square of what llama.cpp's rounded activations move logits by, over the same spread."""
_SETTINGS = OfflineSettings(num_threads=1)

Explain = Callable[[Sequence[int], NDArray[np.float32], NDArray[np.float32]], str]
"""From a text, and the source's and the exported model's logits (vocab,) behind it, to the cause of a difference."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first token of a prompt's answer that is another one.

    Attributes:
        prompt: which prompt, counted from 0.
        position: which token of the answer, counted from 0.
        source_token, exported_token: what each wrote.
        source_margin: logit of its own token minus that of the other one, in the source.
        exported_margin: the same in the exported model, of its own token.
        largest_error: between the two models' logits at this position.
        spread: standard deviation of the source's logits there.
        cause: one of the three above.
    """

    prompt: int
    position: int
    source_token: int
    exported_token: int
    source_margin: float
    exported_margin: float
    largest_error: float
    spread: float
    cause: str

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt}, token {self.position}: {self.source_token} became {self.exported_token}; margins "
            f"{self.source_margin:.3g} and {self.exported_margin:.3g}, logits differ by up to "
            f"{self.largest_error:.3g} of a spread of {self.spread:.3g}: {self.cause}"
        )


@dataclass(frozen=True, kw_only=True)
class TokenAgreement:
    """What came out.

    Attributes:
        num_prompts, num_tokens: prompts, and tokens of the source's answers.
        num_same: positions of the source's text where the exported model chooses the same token.
        largest_error: between logits at any of them.
        differences: the first of each prompt that has one.
    """

    num_prompts: int
    num_tokens: int
    num_same: int
    largest_error: float
    differences: tuple[Difference, ...]

    @property
    def agrees(self) -> bool:
        """All tokens are the same."""
        return not self.differences

    @property
    def is_explained(self) -> bool:
        """No token differs for another reason than rounding."""
        return all(difference.cause != UNEXPLAINED for difference in self.differences)

    def __str__(self) -> str:
        lines = [
            f"{self.num_prompts - len(self.differences)} of {self.num_prompts} texts are the same token by token, "
            f"{self.num_same} of {self.num_tokens} choices on the source's text, logits differ by up to "
            f"{self.largest_error:.3g}"
        ]
        return "\n".join([*lines, *map(str, self.differences)])


def compare_tokens(
    source: str | Path, exported: Path, prompts: Sequence[str], *, max_new_tokens: int = 32
) -> TokenAgreement:
    """Hold an exported folder against the model that it was made of.

    Args:
        source: the model, as it was given to `export_onnx` or `export_gguf`.
        exported: the offline folder.
        prompts: texts to go on from.
        max_new_tokens: of each.

    Raises:
        InputError: there are no prompts, or one is too long; the folder is no export, damaged, or another model's; what
            runs it is not installed.

    Example:
        >>> print(compare_tokens("starter", Path("starter-int4"), ["User: hello"]))  # doctest: +SKIP
        1 of 1 texts are the same token by token, ...
    """
    folder = OfflineFolder.open(exported)
    llama = _source_of(folder, source)
    tokenizer = Tokenizer.from_str(folder.tokenizer_json.decode())
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    room = folder.description.context - max_new_tokens
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not 1 <= len(ids) <= room:
            raise InputError(
                f"a prompt has {len(ids)} tokens ({prompt!r:.40}), expected 1 to {room}, so that {max_new_tokens} fit "
                "behind it"
            )
    if not encoded:
        raise InputError("prompts are none, expected at least one text")
    reference, explain = _REFERENCES[folder.description.runtime](folder, llama)
    model = RUNTIMES[folder.description.runtime](folder, _SETTINGS)
    try:
        return _compare(reference, model, explain, encoded, max_new_tokens)
    finally:
        model.close()


def cause_of(source: NDArray[np.float32], exported: NDArray[np.float32], with_floats: NDArray[np.float32]) -> str:
    """Why logits of one position differ.

    Args:
        source: logits (vocab,) of the source.
        exported: of the graph as it is.
        with_floats: of the graph with float32 activations.

    Example:
        >>> cause_of(np.array([0.0, 2.0]), np.array([0.0, 2.1]), np.array([0.0, 2.0001]))
        'int8 activations'
    """
    allowed = _SUMS_DIFFER_BY * float(source.std())
    if float(np.abs(with_floats - source).max()) > allowed:
        return UNEXPLAINED
    return INT8_ACTIVATIONS if float(np.abs(exported - source).max()) > allowed else ORDER_OF_SUMS


def reference_model(written: WrittenWeights) -> PreTrainedModel:
    """The source in PyTorch, float32, with the weights that an export holds."""
    model = load_model(written.folder.path, dtype="float32", device="cpu").eval()
    model.requires_grad_(False)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for module in written.modules():
            own[f"{module}.weight"].copy_(torch.from_numpy(written.dequantised(module)))
    return model


def _source_of(folder: OfflineFolder, source: str | Path) -> LlamaFolder:
    """The source as it was exported."""
    llama = LlamaFolder(source, context=folder.description.context)
    if folder.description.source_digest != llama.digest:
        raise InputError(
            f"{folder.path} was made of the model {folder.description.source_digest[:12]}, {source} is "
            f"{llama.digest[:12]}; name the model that it was made of, or export again"
        )
    return llama


def _onnx_reference(folder: OfflineFolder, source: LlamaFolder) -> tuple[PreTrainedModel, Explain]:
    check_onnx()
    exact: list[OfflineText] = []

    def explain(text: Sequence[int], mine: NDArray[np.float32], theirs: NDArray[np.float32]) -> str:
        if not exact:
            exact.append(_with_float_activations(folder).open())
        exact[0].truncate(0)
        return cause_of(mine, theirs, exact[0].extend(text)[0])

    return reference_model(WrittenWeights(source, read_config(folder.path).rounding)), explain


def _with_float_activations(folder: OfflineFolder) -> OfflineModel:
    """The graph that devices run without an adapter, with float32 where its quantised layers read int8."""
    # onnx is not everywhere where this module is imported.
    import onnx

    from cotune.compression.llama_graph import with_activations

    has_plain = PLAIN_FILE in folder.description.files
    graph = onnx.load(str(folder.path / PLAIN_FILE if has_plain else folder.model_file), load_external_data=False)
    return OnnxModel(folder, _SETTINGS, graph=with_activations(graph, 32).SerializeToString())


def _gguf_reference(folder: OfflineFolder, source: LlamaFolder) -> tuple[PreTrainedModel, Explain]:
    check_gguf()
    from cotune.compression.gguf_model import has_whole_weights, load_gguf

    is_whole = has_whole_weights(folder.model_file)

    def explain(text: Sequence[int], mine: NDArray[np.float32], theirs: NDArray[np.float32]) -> str:
        share = float(np.abs(theirs - mine).max()) / float(mine.std())
        if share <= _SUMS_DIFFER_BY:
            return ORDER_OF_SUMS
        if share <= _HALF_CACHE_DIFFERS_BY:
            return HALF_CACHE
        moved = float(np.sqrt(np.mean((theirs - mine) ** 2))) / float(mine.std())
        return INT8_ACTIVATIONS if moved <= _LLAMA_CPP_DIFFERS_BY and not is_whole else UNEXPLAINED

    return load_gguf(folder.model_file, source), explain


_REFERENCES: dict[str, Callable[[OfflineFolder, LlamaFolder], tuple[PreTrainedModel, Explain]]] = {
    "onnx": _onnx_reference,
    "gguf": _gguf_reference,
}


def _compare(
    source: PreTrainedModel, exported: OfflineModel, explain: Explain, prompts: Sequence[list[int]], max_new_tokens: int
) -> TokenAgreement:
    differences: list[Difference] = []
    num_same, largest_error = 0, 0.0
    with closing(exported.open()) as text:
        for index, prompt in enumerate(prompts):
            tokens, logits = _greedy(source, prompt, max_new_tokens)
            text.truncate(0)
            theirs = text.extend([*prompt, *tokens[:-1]], num_logits=max_new_tokens)
            num_same += int((theirs.argmax(1) == tokens).sum())
            largest_error = max(largest_error, float(np.abs(theirs - logits).max()))
            written = _exported_greedy(text, prompt, max_new_tokens)
            at = next((i for i, pair in enumerate(zip(tokens, written, strict=True)) if pair[0] != pair[1]), None)
            if at is not None:
                cause = explain([*prompt, *tokens[:at]], logits[at], theirs[at])
                differences.append(_difference(index, at, int(tokens[at]), written[at], logits[at], theirs[at], cause))
    return TokenAgreement(
        num_prompts=len(prompts),
        num_tokens=len(prompts) * max_new_tokens,
        num_same=num_same,
        largest_error=largest_error,
        differences=tuple(differences),
    )


def _difference(
    prompt: int,
    position: int,
    mine: int,
    other: int,
    source: NDArray[np.float32],
    exported: NDArray[np.float32],
    cause: str,
) -> Difference:
    return Difference(
        prompt=prompt,
        position=position,
        source_token=mine,
        exported_token=other,
        source_margin=float(source[mine] - source[other]),
        exported_margin=float(exported[other] - exported[mine]),
        largest_error=float(np.abs(exported - source).max()),
        spread=float(source.std()),
        cause=cause,
    )


def _greedy(
    model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Tokens (max_new_tokens,), and the logits (max_new_tokens, vocab) that they were chosen from."""
    cache, pending = DynamicCache(config=model.config), torch.tensor([list(prompt)])
    logits: list[NDArray[np.float32]] = []
    with torch.no_grad():
        for _ in range(max_new_tokens):
            last = model(input_ids=pending, past_key_values=cache, logits_to_keep=1).logits[0, -1]
            logits.append(last.numpy())
            pending = last.argmax().reshape(1, 1)
    stacked = np.stack(logits)
    return stacked.argmax(1), stacked


def _exported_greedy(text: OfflineText, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """Token by token, as a device does."""
    text.truncate(0)
    tokens: list[int] = []
    pending = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(int(text.extend(pending)[0].argmax()))
        pending = tokens[-1:]
    return tokens
