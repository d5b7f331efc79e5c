from __future__ import annotations

from cotune.models.backbone import Backbone
from cotune.tuning.bias import BiasAndNorms


def test_biases_and_norms_are_counted_by_hand(backbone: Backbone) -> None:
    """Width 16, two layers. Llama: two norms each and one at the end, no biases.

    GPT-2: norms have a bias too; the biases of query, key and value 48, of the attention's output 16, of the
    feed-forward 64 and 16.
    """
    adapter = BiasAndNorms().fresh(backbone, (), seed=0)
    is_llama = backbone.spec.architecture.startswith("Llama")
    expected = 5 * 16 if is_llama else 5 * 32 + 2 * (48 + 16 + 64 + 16)
    assert adapter.num_parameters == expected
    assert all(tensor.ndim == 1 for tensor in adapter.params.values())
