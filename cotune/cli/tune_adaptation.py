"""`cotune tune` with any method that is attached to the model: LoRA, prompts, the model's own parameters, ..."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cotune.cli.tune_settings import Summary, Tell, Trained, TuneSettings, spent, text_room
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.data.templates import Example
    from cotune.models.backbone import Backbone
    from cotune.tuning.adaptations import AdaptationOptions
    from cotune.tuning.estimators import Estimator
    from cotune.tuning.objectives import Score
    from cotune.tuning.tune import TuneConfig

# Starts that do not look at the texts, which is what a private run needs.
INITS_WITHOUT_DATA = ("default", "gaussian", "orthonormal", "orthogonal", "pissa", "olora", "loftq")


def tune_adaptation(backbone: Backbone, examples: list[Example], settings: TuneSettings, tell: Tell) -> Trained:
    """Train, save, and tell how it went."""
    from cotune.tuning.adaptations import ADAPTATIONS
    from cotune.tuning.personal import encode_examples, split_examples
    from cotune.tuning.tune import tune

    method, options = settings.method, adaptation_options(settings)
    config = tune_config(settings)
    longest = text_room(settings, backbone.spec.max_context, ADAPTATIONS[method].num_virtual_tokens(options))
    encoded = encode_examples(
        backbone.tokenizer_json, examples, backbone.description, longest, labels=settings.labels or ()
    )
    train, first, second = split_examples(encoded, settings.heldout_share, settings.seed)
    result = tune(
        backbone,
        train,
        config,
        estimator=estimator(settings),
        heldout=[*first, *second],
        run_dir=settings.run / method,
        resume=settings.resume,
        progress=lambda p: tell(method, p.step, p.num_steps, f"loss {p.loss:.3f}"),
    )
    result.adapter.save(settings.out, backbone.model)
    if settings.merged is not None:
        result.adapter.merge(backbone.model).save_model(settings.merged, backbone.model, backbone.tokenizer_json)
    heldout = {record.epoch: record.heldout_loss for record in result.curve}
    before, after = heldout.get(0), heldout.get(result.best_epoch)
    summary: Summary = {
        "num_parameters": result.num_trained,
        **_judged(settings.objective, before, after),
        "best_epoch": result.best_epoch,
        **({} if settings.merged is None else {"merged": str(settings.merged)}),
        **({} if result.account is None else spent(result.account)),
    }
    return Trained(summary=summary, curve=result.curve, best_epoch=result.best_epoch, texts=train)


def _judged(objective: str, before: float | None, after: float | None) -> Summary:
    """Held-out losses, or the score that was raised."""
    if objective == "nats":
        return {"base_nats_per_token": before, "heldout_nats_per_token": after}
    scores = {f"base_{objective}": before, f"heldout_{objective}": after}
    return {name: None if loss is None else 1 - loss for name, loss in scores.items()}


def estimator(settings: TuneSettings) -> Estimator:
    """How the parameters are updated.

    Raises:
        InputError: an unknown name, or options that do not go with it.
    """
    from cotune.evaluation.text_metrics import exact_match, rouge_l, token_f1
    from cotune.tuning.choice_objectives import LabelAccuracy
    from cotune.tuning.estimators import PrivateDescent, PrivateZerothOrder, estimator_named
    from cotune.tuning.text_objectives import TextScore

    if settings.dp_epsilon is None:
        metrics = {"rouge_l": rouge_l, "token_f1": token_f1, "exact_match": exact_match}
        scores: dict[str, Score[Any]] = {name: TextScore(name=name, metric=metrics[name]) for name in metrics}
        return estimator_named(
            settings.estimator,
            zo_eps=settings.zo_eps,
            num_directions=settings.directions,
            rule=settings.zo_rule,
            sparse_share=settings.sparse_share,
            sparse_by=settings.sparse_by,
            score={**scores, "accuracy": LabelAccuracy(words=settings.labels or ())}.get(settings.objective),
            forward_mode=settings.forward_mode or None,
        )
    if settings.estimator == "forward_gradient":
        raise InputError(
            "--estimator is 'forward_gradient' and --dp-epsilon is given, expected backprop or zeroth_order: its gate "
            "looks at the texts without noise"
        )
    if settings.sparse_share is not None or settings.objective != "nats":
        raise InputError(
            "--dp-epsilon is given with --sparse-share or --objective, which it does not cover; leave them out"
        )
    if settings.method == "blocks" or (settings.init or "default") not in INITS_WITHOUT_DATA:
        raise InputError(
            f"--dp-epsilon is given, but --method {settings.method} --init {settings.init or 'default'} looks at the "
            "private texts before the private run; take another one"
        )
    clip = 1.0 if settings.dp_clip is None else settings.dp_clip
    budget: dict[str, Any] = {"epsilon": settings.dp_epsilon, "delta": settings.dp_delta, "clip": clip}
    given = {"zo_eps": settings.zo_eps, "num_directions": settings.directions, "rule": settings.zo_rule}
    if settings.estimator == "backprop":
        # Refuses the options of other estimators.
        estimator_named("backprop", **given)
        return PrivateDescent(**budget)
    make: Callable[..., Estimator] = PrivateZerothOrder
    return make(**budget, **{name: value for name, value in given.items() if value is not None})


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
    method, how = ADAPTATIONS[settings.method], estimator(settings)
    if settings.merged is not None and not method.is_mergeable:
        raise InputError(
            f"--merged is given, but what method {settings.method} trains is no part of the model's weights; "
            "leave --merged out"
        )
    return TuneConfig(
        what=what,
        loop=LoopConfig(
            epochs=how.epochs if settings.epochs is None else settings.epochs,
            learning_rate=next(
                rate for rate in (settings.learning_rate, how.learning_rate, method.learning_rate) if rate is not None
            ),
        ),
        num_batch_sequences=settings.batch_size,
        gradient_checkpointing=settings.gradient_checkpointing,
        seed=settings.seed,
    )
