"""`cotune tune` with any method that is attached to the model: LoRA, prompts, the model's own parameters, ..."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cotune.cli.tune_settings import Summary, Tell, TuneSettings
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.data.templates import Example
    from cotune.models.backbone import Backbone
    from cotune.tuning.adaptations import AdaptationOptions
    from cotune.tuning.tune import TuneConfig


def tune_adaptation(backbone: Backbone, examples: list[Example], settings: TuneSettings, tell: Tell) -> Summary:
    """Train, save, and tell how it went."""
    from cotune.tuning.adaptations import ADAPTATIONS
    from cotune.tuning.estimators import tuner_named
    from cotune.tuning.personal import encode_examples, split_examples
    from cotune.tuning.tune import tune

    method, options = settings.method, adaptation_options(settings)
    config = tune_config(settings)
    # A prompt takes its part of the context.
    longest = settings.max_length or backbone.spec.max_context - ADAPTATIONS[method].num_virtual_tokens(options)
    encoded = encode_examples(backbone.tokenizer_json, examples, backbone.description, longest)
    train, first, second = split_examples(encoded, settings.heldout_share, settings.seed)
    result = tune(
        backbone,
        train,
        config,
        make_tuner=tuner_named("backprop"),
        heldout=[*first, *second],
        run_dir=settings.run / method,
        resume=settings.resume,
        progress=lambda p: tell(method, p.step, p.num_steps, f"loss {p.loss:.3f}"),
    )
    result.adapter.save(settings.out, backbone.model)
    if settings.merged is not None:
        result.adapter.merge(backbone.model).save_model(settings.merged, backbone.model, backbone.tokenizer_json)
    heldout = {record.epoch: record.heldout_loss for record in result.curve}
    return {
        "num_parameters": result.num_trained,
        "base_nats_per_token": heldout.get(0),
        "heldout_nats_per_token": heldout.get(result.best_epoch),
        "best_epoch": result.best_epoch,
        **({} if settings.merged is None else {"merged": str(settings.merged)}),
    }


def adaptation_options(settings: TuneSettings) -> AdaptationOptions:
    """What was said about the method."""
    from cotune.tuning.adaptations import AdaptationOptions

    return AdaptationOptions(
        rank=settings.rank,
        alpha=settings.alpha,
        init=settings.init,
        width=settings.width,
        num_virtual_tokens=settings.virtual_tokens,
        memory_budget_bytes=settings.memory_budget_bytes,
        gradient_checkpointing=settings.gradient_checkpointing,
        num_batch_sequences=settings.batch_size,
    )


def tune_config(settings: TuneSettings) -> TuneConfig:
    """What to tune and how long, resolved.

    Raises:
        InputError: an unknown method, an option that it does not have, or one that makes no sense.
    """
    from cotune.tuning.adaptations import ADAPTATIONS, adaptation_named
    from cotune.tuning.loop import LoopConfig
    from cotune.tuning.tune import TuneConfig

    what = adaptation_named(settings.method, adaptation_options(settings))
    method = ADAPTATIONS[settings.method]
    if settings.merged is not None and not method.is_mergeable:
        raise InputError(
            f"--merged is given, but what method {settings.method} trains is no part of the model's weights; "
            "leave --merged out"
        )
    return TuneConfig(
        what=what,
        loop=LoopConfig(
            epochs=3 if settings.epochs is None else settings.epochs,
            learning_rate=method.learning_rate if settings.learning_rate is None else settings.learning_rate,
        ),
        num_batch_sequences=settings.batch_size,
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=settings.seed,
    )
