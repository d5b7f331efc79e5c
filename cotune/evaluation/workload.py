"""What a tuning step works on, and in which number types: the half of a cost that is not the model's."""

from __future__ import annotations

from dataclasses import dataclass

from cotune.errors import InputError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of the numbers that methods attach to a model (LoRA, adapters, prompts) and of every loss.
FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One step.

    Example:
        >>> load = Workload(batch=4, length=256)
        >>> load.num_tokens, load.num_targets
        (1024, 1024)
    """

    batch: int = 1
    """B, texts in one step."""
    length: int = 256
    """T, tokens that each text feeds to the model; the longest, where they differ."""
    targets: int | None = None
    """Tokens of each text that are answers, whose logits are computed; None: all."""
    dtype: str = "float32"
    """Of the model's weights and activations: float32, bfloat16 or float16."""
    has_mask: bool = False
    """Attention reads a mask, as it does where texts of different lengths come with one. It then keeps a mask for
    each layer, and keys and values as wide as the queries."""

    def __post_init__(self) -> None:
        for name in ("batch", "length"):
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        if self.targets is not None and not 1 <= self.targets <= self.length:
            raise InputError(f"targets is {self.targets}, expected 1 to the length, {self.length}")
        if self.dtype not in DTYPE_BYTES:
            raise InputError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPE_BYTES)}")

    @property
    def num_tokens(self) -> int:
        """n = B T."""
        return self.batch * self.length

    @property
    def num_targets(self) -> int:
        """N, positions whose logits are computed."""
        return self.batch * (self.length if self.targets is None else self.targets)

    @property
    def number_bytes(self) -> int:
        """a, bytes of one number of the model and of its activations."""
        return DTYPE_BYTES[self.dtype]
