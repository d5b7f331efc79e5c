"""Generate in one process: the built-in model, an untrained side network, and the four modes.

An untrained side network changes nothing in the modes that add to the base model, which is the point of its zero start.
"""

import torch

from cotune.device.side_network import open_side_network
from cotune.generation.gate import Gate
from cotune.generation.reference import Personal, generate
from cotune.generation.request import GenerationRequest
from cotune.generation.text import TextCodec
from cotune.models.backbone import Backbone
from cotune.models.tap_ladder import TapLadder, TapLadderConfig
from cotune.tuning.plugin_folder import build_plugin

backbone = Backbone.from_pretrained("starter")
about = backbone.description
shape = TapLadderConfig(num_taps=about.num_taps, tap_dim=about.tap_dim, basis_dim=about.basis_dim)
plugin = build_plugin(
    TapLadder(shape, torch.Generator().manual_seed(0)),
    gate=None,
    family="parallel",
    backbone_digest=about.backbone_digest,
    projections_digest=about.projections_digest,
    tokenizer_digest=about.tokenizer_digest,
    tokenizer_json=backbone.tokenizer_json,
    output_basis=backbone.output_basis,
)
gate = Gate(weight=torch.randn(about.hidden_size, generator=torch.Generator().manual_seed(1)).numpy())
personal = Personal(corrector=open_side_network(plugin), output_basis=backbone.output_basis, gate=gate)

text = TextCodec(backbone.tokenizer_json)
prompt = "User: Write a short note to Anna about lunch on Friday.\nAssistant:"
for mode in ("integration", "spa"):
    request = GenerationRequest(
        prompt_ids=text.encode_prompt(prompt), mode=mode, max_new_tokens=40, stop_token_ids=about.stop_token_ids
    )
    base, both = generate(backbone, None, request), generate(backbone, personal, request)
    assert base.token_ids == both.token_ids
    consulted = sum(decision.consulted for decision in both.decisions)
    print(
        f"{mode:12} asked the device {consulted:2} times in {len(both.token_ids)} tokens:{text.decode(both.token_ids)}"
    )
