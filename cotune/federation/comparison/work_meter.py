"""Operations of all language models that run meanwhile, by tokens times parameters: what equal compute means here.

A pass over t tokens whose head gives r rows of logits costs, with N the parameters but the embeddings' d x V those of
the head and N_w those of both that learn,

    forward     2 (N t + d V r)
    backward    the same again, for the gradient by activations, and 2 (N_w t + ..) for that by the weights

Embeddings are looked up and cost nothing; products inside of attention, the scan of a recurrence, adapters beside the
weights and optimisers are left out: for short texts and small ranks they are a few per cent
(`tests/federation/comparison/test_work_meter.py` compares with every product that PyTorch computes). A pass whose
logits have a gradient is taken to go backwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel


class WorkMeter:
    """Counts while asked to.

    Attributes:
        flops: so far.

    Example:
        >>> meter = WorkMeter()
        >>> with meter.counting():  # doctest: +SKIP
        ...     model(input_ids=input_ids)
        >>> meter.flops
        0.0
    """

    def __init__(self) -> None:
        self.flops = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, every causal language model's passes count, whoever asks for them."""
        handle = register_module_forward_hook(self._on_pass, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _on_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        logits = output.get("logits") if isinstance(output, dict) else None
        if isinstance(module, PreTrainedModel) and isinstance(logits, torch.Tensor):
            num_tokens = (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()
            self.flops += pass_flops(module, num_tokens, logits)


def pass_flops(model: PreTrainedModel, num_tokens: int, logits: torch.Tensor) -> float:
    """Operations of one pass, and of its way back where the logits have a gradient.

    Args:
        model: a causal language model.
        num_tokens: t.
        logits: as it gave them, (.., V).
    """
    head: torch.Tensor = model.get_output_embeddings().weight
    embeddings = (one for one in model.modules() if isinstance(one, nn.Embedding))
    looked_up = {id(parameter) for one in embeddings for parameter in one.parameters()} | {id(head)}
    num_rows = logits.numel() // logits.shape[-1]

    def products(only_learning: bool) -> float:
        wanted: list[torch.Tensor] = [one for one in model.parameters() if one.requires_grad or not only_learning]
        body: int = sum(one.numel() for one in wanted if id(one) not in looked_up)
        return 2.0 * (body * num_tokens + (head.numel() * num_rows if any(one is head for one in wanted) else 0))

    forward = products(only_learning=False)
    return 2 * forward + products(only_learning=True) if logits.requires_grad else forward
