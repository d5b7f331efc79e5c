"""A few numbers as embeddings in front of a text, through a fixed random matrix (BBT, arXiv 2201.03514).

    p = p_0 + A z        p (tokens, hidden), z (dim,), A random and frozen, as large as the embeddings are spread

Two uses: the edge's model writes an instruction from them, which any chat API can be sent; or a model that is hosted by
oneself reads them as its prompt. A chat API takes text alone, so that the second is never for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.models.anatomy import num_multiplying
from cotune.models.backbone import Backbone
from cotune.sandwich.account import Account
from cotune.sandwich.bilevel.problem import Vector

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SoftPrefix:
    """Embeddings from numbers, in front of what a backbone reads.

    Args:
        backbone: whose embeddings are read; serves nobody else meanwhile.
        num_tokens: positions of the prefix.
        dim: of z.
        seed: of A, and of the tokens whose embeddings are p_0.

    Raises:
        InputError: numbers that cannot be.
    """

    def __init__(self, backbone: Backbone, *, num_tokens: int, dim: int, seed: int = 0) -> None:
        if num_tokens < 1 or dim < 1:
            raise InputError(f"num_tokens is {num_tokens} and dim {dim}, expected at least 1 of both")
        self.dim, self.num_tokens = dim, num_tokens
        self._backbone, self._model = backbone, backbone.model
        self._tokenizer = Tokenizer.from_str(backbone.tokenizer_json.decode())
        embedding = self._model.get_input_embeddings().weight.detach()
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(len(embedding), (num_tokens,), generator=generator)
        self._start = embedding[tokens].float().cpu()  # (tokens, hidden)
        spread = float(embedding.float().std()) / dim**0.5
        self._matrix = spread * torch.randn(num_tokens * embedding.shape[1], dim, generator=generator)

    def embeddings(self, z: Vector) -> Tensor:
        """p, float32 (tokens, hidden)."""
        moved: Tensor = self._matrix @ torch.from_numpy(z).float()
        found: Tensor = self._start + moved.reshape(self._start.shape)
        return found

    @torch.no_grad()
    def losses(self, z: Vector, examples: Sequence[EncodedExample]) -> Vector:
        """1 - exp(-mean nats) of each example's target behind the prefix, in [0, 1]: black box, forwards only."""
        found = []
        for example in examples:
            ids = torch.from_numpy(example.input_ids)
            logits = self._model(inputs_embeds=self._read(z, ids)[:, :-1]).logits[0].float()
            targets = ids[example.first_target :].to(logits.device)
            nats = F.cross_entropy(logits[-len(targets) :], targets)
            found.append(1 - float(torch.exp(-nats)))
        return np.array(found)

    def write(self, z: Vector, text: str, *, max_new_tokens: int) -> str:
        """What the model writes greedily behind prefix and text.

        Raises:
            InputError: it does not fit the model's context.
        """
        return self.write_counted(z, text, max_new_tokens=max_new_tokens)[0]

    @torch.no_grad()
    def write_counted(self, z: Vector, text: str, *, max_new_tokens: int) -> tuple[str, int]:
        """As `write`, and how many tokens the model wrote, an end of the text among them."""
        ids = torch.tensor(self._tokenizer.encode(text).ids)
        longest = self.num_tokens + len(ids) + max_new_tokens
        if longest > self._backbone.spec.max_context or max_new_tokens < 1:
            raise InputError(
                f"prefix, text and answer take {longest} positions, expected at most {self._backbone.spec.max_context} "
                "and at least one of the answer; shorten one"
            )
        output = self._model(inputs_embeds=self._read(z, ids), use_cache=True)
        written: list[int] = []
        while True:
            written.append(int(output.logits[0, -1].argmax()))
            if written[-1] in self._backbone.spec.eos_token_ids or len(written) == max_new_tokens:
                break
            last = torch.tensor([written[-1:]], device=self._model.device)
            output = self._model(input_ids=last, past_key_values=output.past_key_values, use_cache=True)
        return self._tokenizer.decode(written, skip_special_tokens=True).strip(), len(written)

    def num_tokens_of(self, text: str) -> int:
        """How many tokens the model makes of a text."""
        return len(self._tokenizer.encode(text).ids)

    def writer(self, text: str, *, max_new_tokens: int = 40) -> PrefixWriter:
        """For a `LatentPrompt`: writes instructions behind `text`, such as a few examples."""
        return PrefixWriter(self, text, max_new_tokens)

    @property
    def num_parameters(self) -> int:
        """Of the model, see `num_multiplying`."""
        return num_multiplying(self._model)

    def _read(self, z: Vector, ids: Tensor) -> Tensor:
        model: PreTrainedModel = self._model
        embedded = model.get_input_embeddings()(ids.to(model.device))
        return torch.cat([self.embeddings(z).to(embedded), embedded])[None]


class PrefixWriter:
    """From numbers to the instruction that a model writes behind prefix and text.

    Two numbers that write the same instruction are the same prompt, which is paid for once.

    Args:
        prefix: of the model.
        text: that it goes on from.
        max_new_tokens: of an instruction.
    """

    def __init__(self, prefix: SoftPrefix, text: str, max_new_tokens: int) -> None:
        self._prefix, self._text, self._max_new_tokens = prefix, text, max_new_tokens
        self._num_parameters, self._num_read = prefix.num_parameters, prefix.num_tokens + prefix.num_tokens_of(text)
        self._account = Account()

    def count_in(self, account: Account) -> None:
        """From now on, count tokens there."""
        self._account = account

    def __call__(self, z: Vector) -> str:
        """The instruction of z."""
        written, num_written = self._prefix.write_counted(z, self._text, max_new_tokens=self._max_new_tokens)
        self._account.edge(forward_tokens=self._num_read + num_written, num_parameters=self._num_parameters)
        return written
