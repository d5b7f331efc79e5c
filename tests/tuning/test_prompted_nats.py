from __future__ import annotations

import numpy as np
import pytest

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone
from cotune.tuning.lora import target_nats
from cotune.tuning.prompted_nats import prompted_nats


def test_they_are_those_of_the_backbone_where_both_can_be_had(
    backbone: Backbone, examples: list[EncodedExample]
) -> None:
    lora = LoraAdapter.fresh(backbone.model, LoraShape(rank=2))
    lora = lora.trained({name: tensor + 0.1 for name, tensor in lora.params.items()})
    with lora.attach(backbone.model) as model:
        np.testing.assert_allclose(prompted_nats(model, examples), target_nats(backbone, examples), atol=1e-5)
        with pytest.raises(InputError, match="no examples"):
            prompted_nats(model, [])
