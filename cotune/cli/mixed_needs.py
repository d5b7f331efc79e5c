"""What both classes of `mixed` need of a model: `cotune.federation` cannot know it, as the planner is above it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cotune.federation.settings import FederationSettings
    from cotune.models.backbone import Backbone

MIXED = "mixed"


def with_needs(settings: FederationSettings, backbone: Backbone, dtype: str) -> FederationSettings:
    """The settings with what both classes of `mixed` need of this model, where they give the devices' memory alone.

    Raises:
        InputError: the model's memory cannot be predicted.
    """
    own = settings.options.get(MIXED)
    if not isinstance(own, Mapping) or "memory_bytes" not in own or {"lora_bytes", "seed_bytes"} <= own.keys():
        return settings
    from cotune.evaluation.method_cost import MethodSettings, predict_cost
    from cotune.evaluation.model_shape import ModelShape
    from cotune.evaluation.plan import RUNTIME_BYTES
    from cotune.evaluation.workload import Workload

    shape = ModelShape.from_config(backbone.model.config.to_dict())
    sizes = MethodSettings(rank=settings.adapter.rank, num_blocks=1)
    needs = {}
    for name, method, batch in (
        ("lora_bytes", "lora", settings.steps.batch_size),
        ("seed_bytes", "zeroth_order_lora", _seed_batch(own)),
    ):
        load = Workload(batch=batch, length=settings.data.max_length, dtype=dtype)
        needs[name] = predict_cost(shape, method, load, sizes).peak + RUNTIME_BYTES
    return replace(settings, options={**settings.options, MIXED: {**needs, **own}})


def _seed_batch(own: Mapping[str, Any]) -> int:
    """Texts of a seed device's step."""
    from cotune.federation.mixed import SeedSteps

    table = own.get("seed_mode", {})
    return int(table.get("batch_size", SeedSteps.batch_size)) if isinstance(table, Mapping) else SeedSteps.batch_size
