"""A text in PyTorch behind the small interface of offline texts, so that both are measured by the same words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, PreTrainedModel


class TorchText:
    """One text in a model of transformers. Fits `OfflineText`, for one row of logits.

    Attributes:
        length: how many tokens it holds.

    Args:
        model: in evaluation mode, on the CPU.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.length = 0
        self._model = model
        self._cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def extend(self, token_ids: Sequence[int] | NDArray[np.int64], *, num_logits: int = 1) -> NDArray[np.float32]:
        """Append tokens; logits float32 (num_logits, vocab) after the last of them."""
        ids = torch.as_tensor(np.asarray(token_ids, np.int64)[None])
        logits = self._model(input_ids=ids, past_key_values=self._cache, logits_to_keep=num_logits).logits[0]
        self.length += ids.shape[1]
        found: NDArray[np.float32] = logits.float().numpy()
        return found

    def truncate(self, length: int) -> None:
        """Drop all tokens from place `length` on."""
        if length == 0:
            self.close()
        elif length < self.length:
            self._cache.crop(length - self.length)
        self.length = length

    def close(self) -> None:
        """Give keys and values back."""
        self._cache = DynamicCache(config=self._model.config)
