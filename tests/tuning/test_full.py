from __future__ import annotations

from cotune.models.backbone import Backbone
from cotune.tuning.full import Full


def test_every_parameter_is_tuned_from_its_own_value(backbone: Backbone) -> None:
    adapter = Full().fresh(backbone, (), seed=0)
    assert adapter.num_parameters == backbone.spec.num_parameters
    own = dict(backbone.model.named_parameters())
    assert {n: t.data_ptr() for n, t in adapter.params.items()} == {n: p.data_ptr() for n, p in own.items()}
