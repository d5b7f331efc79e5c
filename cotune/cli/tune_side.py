"""`cotune tune --method side`: the plugin that `cotune device tune` makes, where the model is at hand."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from cotune.cli.tune_settings import Tell, Trained, TuneSettings, spent, text_room
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.data.templates import Example
    from cotune.models.backbone import Backbone
    from cotune.tuning.feature_cache import FeatureCache
    from cotune.tuning.personal import PersonalConfig, PublicParts


def tune_side_network(backbone: Backbone, examples: list[Example], settings: TuneSettings, tell: Tell) -> Trained:
    """Train, save, and tell how it went.

    Raises:
        InputError: a private run from the backbone, which would look at the texts first.
    """
    from cotune.data.templates import common_prompt_format
    from cotune.device.own_texts import write_texts
    from cotune.tuning.backbone_start import ladder_from_backbone
    from cotune.tuning.feature_cache import FeatureCache
    from cotune.tuning.gate import GateConfig
    from cotune.tuning.loop import LoopConfig
    from cotune.tuning.personal import PersonalConfig, PublicParts, encode_examples, split_examples, tune_plugin
    from cotune.tuning.side import AttentionShape, SideConfig

    if settings.dp_epsilon is not None and settings.side_init == "backbone":
        raise InputError(
            "--dp-epsilon is given, but --side-init backbone looks at the private texts before the private run; take "
            "random"
        )
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
        max_length=text_room(settings, backbone.spec.max_context),
        prompt_format=common_prompt_format(examples),
        seed=settings.seed,
    )
    cache = FeatureCache(
        settings.run / "features",
        backbone_digest=backbone.spec.backbone_digest,
        projections_digest=backbone.projections.digest,
    )
    public = PublicParts(tokenizer_json=backbone.tokenizer_json, output_basis=backbone.output_basis)
    if settings.dp_epsilon is not None:
        return _tune_privately(backbone, public, examples, config, cache, settings, tell)
    encoded = encode_examples(public.tokenizer_json, examples, backbone.description, config.max_length)
    for_side, _, _ = split_examples(encoded, config.heldout_share, config.seed)
    network = None
    if config.side.init == "backbone":
        network = ladder_from_backbone(backbone, for_side, config.side)
    result = tune_plugin(
        backbone,
        public,
        examples,
        config,
        cache=cache,
        network=network,
        write=partial(write_texts, backbone),
        run_dir=settings.run,
        resume=settings.resume,
        progress=tell,
    )
    result.plugin.save(settings.out)
    summary = {
        "num_parameters": result.plugin.num_parameters,
        "base_nats_per_token": result.summary.get("base_nats_per_token"),
        "heldout_nats_per_token": result.summary.get("side_nats_per_token"),
    }
    return Trained(summary=summary, curve=result.side_curve, best_epoch=result.best_epoch, texts=for_side)


def _tune_privately(
    backbone: Backbone,
    public: PublicParts,
    examples: list[Example],
    config: PersonalConfig,
    cache: FeatureCache,
    settings: TuneSettings,
    tell: Tell,
) -> Trained:
    """Every text counts and none judges: what held-out texts or a gate decide is not covered by the promise."""
    from cotune.tuning.feature_cache import collect_features
    from cotune.tuning.personal import encode_examples, ungated_plugin
    from cotune.tuning.private import PrivateConfig, tune_side_private

    encoded = encode_examples(public.tokenizer_json, examples, backbone.description, config.max_length)
    features = collect_features(
        cache,
        backbone,
        encoded,
        config.top_k,
        lambda p: tell("features", p.num_done, p.num_sequences, ""),
        prompt_window=config.side.prompt_window,
    )
    assert settings.dp_epsilon is not None
    private = PrivateConfig.for_budget(
        len(encoded),
        epsilon=settings.dp_epsilon,
        delta=settings.dp_delta,
        clip=1.0 if settings.dp_clip is None else settings.dp_clip,
        loop=config.side.loop,
        weight_decay=config.side.weight_decay,
    )
    side, account = tune_side_private(
        features,
        public.output_basis,
        config.side,
        private,
        run_dir=settings.run / "side",
        resume=settings.resume,
        progress=lambda p: tell("side network", p.step, p.num_steps, f"loss {p.loss:.3f}"),
    )
    plugin = ungated_plugin(
        side.network,
        config.side.family,
        backbone.description,
        public,
        {
            "num_examples": len(encoded),
            "num_target_tokens": len(features),
            "epochs": config.side.loop.epochs,
            "seed": config.seed,
            "prompt_format": config.prompt_format,
            "privacy": account.summary(),
        },
    )
    plugin.save(settings.out)
    summary = {"num_parameters": plugin.num_parameters, "heldout_nats_per_token": None, **spent(account)}
    return Trained(summary=summary, curve=side.curve, best_epoch=side.best_epoch, texts=encoded)
