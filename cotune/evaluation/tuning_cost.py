"""What a run of tuning took, beside what `cotune plan` predicts for it from the model's shape."""

from __future__ import annotations

from dataclasses import dataclass

from cotune.errors import InputError
from cotune.evaluation.method_cost import MethodSettings, predict_cost, quantised_bytes
from cotune.evaluation.model_shape import ModelShape
from cotune.evaluation.workload import Workload

# Words of `cotune tune --method` and `--estimator` to the planner's word; what is not here has no prediction.
PLANNED = {
    ("full", "backprop"): "full",
    ("lora", "backprop"): "lora",
    ("dora", "backprop"): "dora",
    ("rslora", "backprop"): "rslora",
    ("ia3", "backprop"): "ia3",
    ("vera", "backprop"): "vera",
    ("adapter", "backprop"): "adapter",
    ("soft_prompt", "backprop"): "soft_prompt",
    ("p_tuning", "backprop"): "p_tuning",
    ("prefix", "backprop"): "prefix",
    ("bias", "backprop"): "norms",
    ("full", "zeroth_order"): "zeroth_order",
    ("lora", "zeroth_order"): "zeroth_order_lora",
    ("full", "forward_gradient"): "forward_gradient",
}


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Of one step.

    Attributes:
        peak_bytes: the most at one time beyond the model's own weights.
        flops: operations.
    """

    peak_bytes: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """Of a whole run.

    Attributes:
        num_steps: that were taken.
        num_tokens: of training texts, each as often as it was read.
        seconds: of training, with its held-out losses.
        peak_bytes: held at most beyond the loaded model; None where the system does not count them.
        predicted: by the planner; None for what it does not know.
    """

    num_steps: int
    num_tokens: int
    seconds: float
    peak_bytes: int | None
    predicted: Predicted | None

    @property
    def tokens_per_s(self) -> float | None:
        """None for a run without time."""
        return self.num_tokens / self.seconds if self.seconds > 0 else None


def predict_run(
    config: dict[str, object],
    method: str,
    estimator: str,
    load: Workload,
    settings: MethodSettings,
    *,
    has_checkpoints: bool = False,
    base_bits: int | None = None,
) -> Predicted | None:
    """What the planner says of a step of `cotune tune`; None where it knows no such method or model.

    Args:
        config: the model's, as its config.json has it.
        method, estimator: words of `cotune tune`.
        load: of the fullest step.
        settings: sizes of the method.
        has_checkpoints: with gradient checkpointing.
        base_bits: of the frozen model's linear layers; None for whole ones.

    Example:
        >>> config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        ...           "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500}
        >>> predict_run(config, "lora", "backprop", Workload(length=32), MethodSettings()).peak_bytes > 0
        True
        >>> predict_run({"model_type": "gpt2"}, "lora", "backprop", Workload(length=32), MethodSettings()) is None
        True
    """
    word = PLANNED.get((method, estimator))
    if base_bits is not None:
        word = "qlora" if word == "lora" else None
    if word is None:
        return None
    try:
        shape = ModelShape.from_config(config)
        cost = predict_cost(shape, word, load, settings, has_checkpoints=has_checkpoints)
    except InputError:
        return None
    weights = load.number_bytes * shape.num_parameters if base_bits is None else quantised_bytes(shape, load, base_bits)
    return Predicted(peak_bytes=cost.peak - weights, flops=cost.flops)
