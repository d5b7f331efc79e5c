"""Any causal language model of transformers in a folder, in memory for as long as a `with` block and no longer.

`Backbone` wants a decoder with taps; here a model only has to give logits, so that a recurrent one is as good as any.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cotune.distillation.paired_texts import Reader
from cotune.errors import InputError
from cotune.models.weights import digest_folder, find_model_folder, load_model, quiet, read_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class CausalModel:
    """A model that is not loaded.

    Attributes:
        name: a folder, a Hub name, or `starter`.
        dtype: of the weights in memory: float32, bfloat16 or float16.
        torch_device: a PyTorch device, such as cpu or cuda.

    Example:
        >>> CausalModel("starter").reader.end_id
        2
    """

    name: str
    dtype: str = "float32"
    torch_device: str = "cpu"

    @cached_property
    def folder(self) -> Path:
        """Where it is.

        Raises:
            InputError: there is no such model.
        """
        return find_model_folder(self.name)

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, of its weights as they are stored."""
        return digest_folder(self.folder)

    @cached_property
    def tokenizer_json(self) -> bytes:
        """The bytes of its tokenizer."""
        return read_tokenizer(self.folder)

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256, hex, of its tokenizer."""
        return hashlib.sha256(self.tokenizer_json).hexdigest()

    @cached_property
    def size_bytes(self) -> int:
        """Of its weights and its tokenizer on disk: what a device downloads once."""
        files = [*self.folder.glob("*.safetensors"), self.folder / "config.json", self.folder / "tokenizer.json"]
        return sum(file.stat().st_size for file in files)

    @cached_property
    def reader(self) -> Reader:
        """How it reads texts.

        Raises:
            InputError: its config names no end token, or its tokenizer has more tokens than it.
        """
        own = self._config
        ends = own.eos_token_id
        end_id = ends[0] if isinstance(ends, list | tuple) and ends else ends
        if not isinstance(end_id, int):
            raise InputError(f"{self.name} has eos_token_id {ends!r}, expected the token that ends a text; set it")
        return Reader.of_model(self.tokenizer_json, end_id=end_id, vocab_size=int(own.vocab_size))

    def fitting(self, max_tokens: int) -> int:
        """At most as many tokens as its context takes; a recurrent model takes any number."""
        most = getattr(self._config, "max_position_embeddings", None)
        return max_tokens if most is None else min(max_tokens, int(most))

    @cached_property
    def _config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
        except (ValueError, KeyError, OSError) as error:
            raise InputError(f"the config of {self.name} cannot be read: {str(error).splitlines()[0]}") from None
        own: PretrainedConfig = config.get_text_config()
        return own

    @contextmanager
    def loaded(self) -> Iterator[PreTrainedModel]:
        """The frozen model in evaluation mode. Afterwards its tensors are empty, whoever still holds them.

        Raises:
            InputError: it cannot be loaded, or has another vocabulary than its config says.
        """
        model = load_model(self.folder, dtype=self.dtype, device=self.torch_device).eval().requires_grad_(False)
        rows = int(model.get_output_embeddings().weight.shape[0])
        if rows != len(self.reader.table):
            raise InputError(
                f"{self.name} has {rows} rows in its output embedding and vocab_size {len(self.reader.table)} in its "
                "config, expected the same; correct config.json"
            )
        try:
            # Texts are padded where nobody looks, about which transformers would give advice.
            with quiet():
                yield model
        finally:
            # Modules refer to each other in circles and go at some time; the memory is given back now.
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.data = tensor.data.new_empty(0)
