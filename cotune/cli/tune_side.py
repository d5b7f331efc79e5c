"""`cotune tune --method side`: the plugin that `cotune device tune` makes, where the model is at hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cotune.cli.tune_settings import Summary, Tell, TuneSettings

if TYPE_CHECKING:
    from cotune.data.templates import Example
    from cotune.models.backbone import Backbone


def tune_side_network(backbone: Backbone, examples: list[Example], settings: TuneSettings, tell: Tell) -> Summary:
    """Train, save, and tell how it went."""
    from cotune.data.templates import common_prompt_format
    from cotune.device.own_texts import write_texts
    from cotune.tuning.backbone_start import ladder_from_backbone
    from cotune.tuning.feature_cache import FeatureCache
    from cotune.tuning.gate import GateConfig
    from cotune.tuning.loop import LoopConfig
    from cotune.tuning.personal import PersonalConfig, PublicParts, encode_examples, split_examples, tune_plugin
    from cotune.tuning.side import AttentionShape, SideConfig

    loop = LoopConfig(
        epochs=15 if settings.epochs is None else settings.epochs,
        learning_rate=1e-2 if settings.learning_rate is None else settings.learning_rate,
    )
    config = PersonalConfig(
        side=SideConfig(
            loop=loop,
            family=settings.family,
            side_width=settings.side_width,
            attention=AttentionShape.for_side(settings.side),
            init=settings.side_init,
            seed=settings.seed,
        ),
        gate=GateConfig.for_family(settings.family, seed=settings.seed),
        heldout_share=settings.heldout_share,
        max_length=settings.max_length,
        prompt_format=common_prompt_format(examples),
        seed=settings.seed,
    )
    cache = FeatureCache(
        settings.run / "features",
        backbone_digest=backbone.spec.backbone_digest,
        projections_digest=backbone.projections.digest,
    )
    public = PublicParts(tokenizer_json=backbone.tokenizer_json, output_basis=backbone.output_basis)
    network = None
    encoded = encode_examples(public.tokenizer_json, examples, backbone.description, config.max_length)
    if config.side.init == "backbone":
        for_side, _, _ = split_examples(encoded, config.heldout_share, config.seed)
        network = ladder_from_backbone(backbone, for_side, config.side)
    result = tune_plugin(
        backbone,
        public,
        examples,
        config,
        cache=cache,
        network=network,
        write=lambda plugin, prompts: write_texts(
            backbone,
            plugin,
            prompts,
            max_new_tokens=max(len(one.input_ids) - one.first_target for one in encoded),
            stop_token_ids=backbone.spec.eos_token_ids,
        ),
        run_dir=settings.run,
        resume=settings.resume,
        progress=tell,
    )
    result.plugin.save(settings.out)
    return {
        "num_parameters": result.plugin.num_parameters,
        "base_nats_per_token": result.summary.get("base_nats_per_token"),
        "heldout_nats_per_token": result.summary.get("side_nats_per_token"),
    }
