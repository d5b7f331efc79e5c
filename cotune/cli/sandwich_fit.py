"""`cotune sandwich fit`: tune prompt and edge adapter within a budget; and the scripted cloud to try it on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from cotune.cli.output import print_json, progress, stderr, stdout
from cotune.cli.sandwich_ask import (
    AllowList,
    CloudTimeout,
    CloudUrl,
    Detectors,
    DetectorTimeout,
    Dictionary,
    KeyEnv,
    LedgerFile,
    Prices,
)
from cotune.cli.sandwich_command import read_settings
from cotune.cli.sandwich_edge import (
    ADAPTER_FOLDER,
    REWRITER_FOLDER,
    Fitted,
    metric_named,
    open_edge,
    preferences_given,
    price_of,
)
from cotune.cli.sandwich_prompts import HostedModel, PromptOptions, make_variable, open_cloud_or_hosted
from cotune.cli.sandwich_reflection import ReflectionOptions, open_reflection
from cotune.errors import InputError

if TYPE_CHECKING:
    from cotune.sandwich.edge_adapter import EdgeRewriter
    from cotune.sandwich.examples import PrivateExample
    from cotune.sandwich.pipeline import Pipeline
    from cotune.sandwich.rewriter_tuning import RewriterConfig, TunedRewriter

_REFRESH_EVERY = 5


def fit(
    train: Annotated[
        str, typer.Argument(help="Requests and answers, any template of docs/data.md; `private`: a list.")
    ],
    validation: Annotated[str, typer.Option(help="Others, which the adapter and the choice are judged on.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: books, answers, result.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="pool: one prompt a line, or a .json list of texts. categorical: a .json list with a list of words "
            "for each place. latent: a text that the writer goes on from."
        ),
    ] = None,
    cloud: CloudUrl = None,
    model: Annotated[str | None, typer.Option(help="The cloud's name for its model.")] = None,
    variable: Annotated[
        str, typer.Option(help="What the prompt is: pool, categorical, latent, or soft, which no API reads.")
    ] = "pool",
    writer: Annotated[
        str | None, typer.Option(help="latent: the model that writes the prompt; that of --edge if left out.")
    ] = None,
    hosted: Annotated[
        str | None, typer.Option(help="soft: a model of your own in this process, instead of --cloud.")
    ] = None,
    prompt_dim: Annotated[int, typer.Option(help="latent, soft: numbers behind the prompt.")] = 10,
    prompt_tokens: Annotated[int, typer.Option(help="latent, soft: embeddings made of them.")] = 5,
    prompt_radius: Annotated[
        float,
        typer.Option(help="latent, soft: distance of differences, or first spread of CMA-ES; text is a staircase."),
    ] = 0.5,
    cma_evaluations: Annotated[
        int | None,
        typer.Option(help="latent, soft: search each response by CMA-ES with so many prompts, not by slopes."),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="categorical: prompts drawn for one estimate.")] = 20,
    metric: Annotated[str, typer.Option(help="token_f1, exact_match or rouge_l.")] = "token_f1",
    edge: Annotated[
        str | None,
        typer.Option(help="Edge model, a folder, hub name or `starter`; left out, only the prompt is tuned."),
    ] = None,
    tune_rewriter: Annotated[
        int | None,
        typer.Option(
            help="With --edge: first tune it to rewrite requests, so many rounds, on what the cloud answered."
        ),
    ] = None,
    dpo_rounds: Annotated[
        int | None,
        typer.Option(
            help="With --tune-rewriter: then so many rounds more, on pairs of rewrites ranked by final loss and leaks."
        ),
    ] = None,
    dpo_beta: Annotated[
        float | None, typer.Option(help="With --dpo-rounds: how strongly the rewriter before holds; 0.1 if left out.")
    ] = None,
    dpo_leak_weight: Annotated[
        float | None,
        typer.Option(help="With --dpo-rounds: of the share of `private` that a rewrite would send; 1 if left out."),
    ] = None,
    dpo_min_gap: Annotated[
        float | None,
        typer.Option(help="With --dpo-rounds: by how much the two of a pair must differ; 0.05 if left out."),
    ] = None,
    refit_steps: Annotated[
        int | None,
        typer.Option(
            help="With --edge: learn anew under the chosen prompt for at most so many steps, from all but the "
            "certificate's examples; 160 if left out, 0: never."
        ),
    ] = None,
    always_merge: Annotated[
        bool,
        typer.Option(
            "--always-merge",
            help="With --edge: keep it behind the cloud also where the cloud's answers as they are do as well.",
        ),
    ] = False,
    no_copy: Annotated[
        bool,
        typer.Option(
            "--no-copy",
            help="With --edge: it writes all of its answer itself, and goes on with nothing of the cloud's.",
        ),
    ] = False,
    gradients: Annotated[
        str, typer.Option(help="Of the adapter: backprop, or zeroth_order for little memory.")
    ] = "backprop",
    smoothing_radius: Annotated[float, typer.Option(help="zeroth_order: distance to either side.")] = 1e-2,
    rank: Annotated[int, typer.Option(help="Of the edge's LoRA adapter.")] = 4,
    constraint: Annotated[str, typer.Option(help="none (F alone), penalty or cut.")] = "cut",
    tolerance: Annotated[
        float, typer.Option(help="How much worse than the best the prompt may be, in units of its loss (0 to 1).")
    ] = 0.02,
    penalty: Annotated[float, typer.Option(help="With penalty: its weight.")] = 1.0,
    race: Annotated[
        int | None, typer.Option(help="pool: first race the prompts on TRAIN until so many are left; cheaper than all.")
    ] = None,
    grow_every: Annotated[
        int | None,
        typer.Option(help="pool: each so many looks, a model reads failures and writes 2 prompts, which race."),
    ] = None,
    reflect_model: Annotated[
        str | None,
        typer.Option(help="With --grow-every: another model for that, by the cloud's name; --model's if left out."),
    ] = None,
    reflect_cloud: Annotated[
        str | None, typer.Option(help="With --reflect-model: base URL of another OpenAI-compatible API that has it.")
    ] = None,
    reflect_key_env: Annotated[
        str | None,
        typer.Option(help="With --reflect-cloud: variable with its API key; COTUNE_REFLECT_KEY if left out and set."),
    ] = None,
    reflect_prices: Annotated[
        Path | None, typer.Option(help="With --reflect-model: a price table of its own; --prices if left out.")
    ] = None,
    reflect_edge: Annotated[
        bool, typer.Option("--reflect-edge", help="With --grow-every: the model of --edge does it; nothing is sent.")
    ] = False,
    pool_size: Annotated[
        int | None, typer.Option(help="With --grow-every: prompts after a race; as many as in PROMPTS if left out.")
    ] = None,
    show_targets: Annotated[
        bool, typer.Option("--show-targets", help="With --grow-every: targets are shown too, redacted.")
    ] = False,
    steps: Annotated[int, typer.Option(help="At most.")] = 60,
    x_rate: Annotated[float, typer.Option(help="Of the adapter (Adam).")] = 2e-3,
    y_rate: Annotated[float, typer.Option(help="Of the prompt.")] = 0.5,
    batch_size: Annotated[int, typer.Option(help="Examples in one step.")] = 8,
    cloud_weight: Annotated[float, typer.Option(help="Of the cloud's own answer in the prompt's loss.")] = 0.0,
    token_weight: Annotated[
        float, typer.Option(help="Of the length of the cloud's answers in the prompt's loss.")
    ] = 0.0,
    certificate_share: Annotated[float, typer.Option(help="Of TRAIN, kept for the certificate.")] = 0.25,
    limit: Annotated[int | None, typer.Option(help="Examples of each file at most.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Of the cloud's answers.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(help="Of the edge's answers.")] = 64,
    num_parallel: Annotated[int, typer.Option(help="Requests to the cloud at once.")] = 4,
    budget_calls: Annotated[int | None, typer.Option(help="The most requests, failed ones included.")] = None,
    budget_tokens: Annotated[int | None, typer.Option(help="The most tokens, in and out.")] = None,
    budget_usd: Annotated[float | None, typer.Option(help="The most dollars; needs --prices.")] = None,
    budget_seconds: Annotated[float | None, typer.Option(help="The most time.")] = None,
    prices: Prices = None,
    key_env: KeyEnv = None,
    cloud_timeout: CloudTimeout = 120.0,
    detectors: Detectors = None,
    dictionary: Dictionary = None,
    allow_list: AllowList = None,
    detector_timeout: DetectorTimeout = 5.0,
    ledger: LedgerFile = None,
    seed: Annotated[int, typer.Option(help="Of batches, directions and the fresh adapter.")] = 0,
    pay: Annotated[bool, typer.Option("--pay", help="Do it; without this, only what it would cost is shown.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in OUT; no answer is paid for twice.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Choose a prompt for a closed cloud and tune the edge's adapter to its answers, together, within a budget.

    Without --pay nothing is sent: everything is redacted, and the cost is projected.

    Examples:

        cotune sandwich fit train.jsonl --validation val.jsonl --prompts prompts.txt --cloud http://127.0.0.1:7070/v1
        --model starter --out run

        cotune sandwich fit train.jsonl --validation val.jsonl --prompts prompts.txt --cloud https://api.example.org/v1
        --model m --prices prices.json --out run --edge starter --budget-usd 2 --pay

        cotune sandwich fit ... --out run --budget-usd 3 --pay --resume

        cotune sandwich fit ... --prompts prompts.txt --grow-every 2 --pool-size 6 --out run --budget-calls 500 --pay

        cotune sandwich fit ... --grow-every 2 --reflect-model big --reflect-cloud https://api.example.org/v1 --pay ...

        cotune sandwich fit ... --edge starter --tune-rewriter 2 --dpo-rounds 2 --out run --budget-calls 500 --pay

        cotune sandwich fit train.jsonl --validation val.jsonl --variable soft --hosted starter --out run
        --cma-evaluations 20
    """
    from cotune.ledger import EgressLedger
    from cotune.sandwich.bilevel.solve import Constraint, Refresh, SolveConfig
    from cotune.sandwich.budget import Budget
    from cotune.sandwich.cloud_gate import CloudGate, RetryRules
    from cotune.sandwich.examples import read_private_examples
    from cotune.sandwich.fit import RUN_FILE, FitConfig, project
    from cotune.sandwich.fit import fit as fit_sandwich
    from cotune.sandwich.pipeline import Pipeline, PipelineConfig
    from cotune.sandwich.prompts.growth import GrowthConfig
    from cotune.sandwich.prompts.race import RaceConfig
    from cotune.sandwich.redact import Redactor
    from cotune.sandwich.refit import RefitConfig
    from cotune.sandwich.rewrite_trials import DrawConfig
    from cotune.sandwich.rewriter_tuning import RewriterConfig
    from cotune.sandwich.text_problem import TextProblemConfig

    budget = Budget(calls=budget_calls, tokens=budget_tokens, usd=budget_usd, seconds=budget_seconds)
    if pay and budget == Budget():
        raise InputError("--pay is given without a budget, expected one such as --budget-usd 1 or --budget-calls 200")
    if pay and not resume and (out / RUN_FILE).exists():
        raise InputError(f"{out} holds a run already; go on with --resume, or choose another folder")
    if grow_every is None and (pool_size is not None or show_targets):
        raise InputError("--pool-size or --show-targets is given without --grow-every, expected it too; add it")
    reflecting = ReflectionOptions(
        model=reflect_model,
        cloud=reflect_cloud,
        key_variable=reflect_key_env,
        prices=reflect_prices,
        other_prices=prices,
        is_here=reflect_edge,
    )
    reflecting.check(is_growing=grow_every is not None, has_edge=edge is not None)
    if tune_rewriter is not None and edge is None:
        raise InputError("--tune-rewriter is given without --edge, expected the model that rewrites; add it")
    if always_merge and edge is None:
        raise InputError("--always-merge is given without --edge, expected the model that merges; add it")
    if refit_steps is not None and edge is None:
        raise InputError("--refit-steps is given without --edge, expected the model that learns; add it")
    if no_copy and edge is None:
        raise InputError("--no-copy is given without --edge, expected the model that merges; add it")
    preferences = preferences_given(dpo_rounds, beta=dpo_beta, leak_weight=dpo_leak_weight, min_gap=dpo_min_gap)
    if preferences is not None and tune_rewriter is None:
        raise InputError("--dpo-rounds is given without --tune-rewriter, expected the rounds before; add it")
    rewriting = None
    if tune_rewriter is not None:
        draw = DrawConfig(num_batch_examples=batch_size, seed=seed)
        rewriting = RewriterConfig(num_rounds=tune_rewriter, draw=draw, preferences=preferences)
    refitting: RefitConfig | None = RefitConfig()
    if refit_steps is not None:
        refitting = RefitConfig(num_steps=refit_steps) if refit_steps else None
    score = metric_named(metric)
    if (hosted is not None) != (variable == "soft"):
        raise InputError(
            f"--variable is {variable!r:.40} and --hosted is {hosted}, expected --hosted with soft and not else"
        )
    name = model or hosted
    if name is None:
        raise InputError("--model is missing, expected the cloud's name for its model")
    prompt = make_variable(
        variable,
        PromptOptions(
            prompts=prompts,
            writer=writer or edge,
            num_tokens=prompt_tokens,
            dim=prompt_dim,
            radius=prompt_radius,
            cma_evaluations=cma_evaluations,
            num_samples=num_samples,
            seed=seed,
        ),
    )
    own = None if hosted is None else HostedModel(model=hosted, num_tokens=prompt_tokens, dim=prompt_dim, seed=seed)
    described = own.to_json() if own else None
    drawn_by = seed if limit else None
    learnt = read_private_examples(train, limit=limit, seed=drawn_by)
    judged = read_private_examples(validation, limit=limit, seed=drawn_by)
    config = FitConfig(
        solve=SolveConfig(
            constraint=cast("Constraint", constraint),
            tolerance=tolerance,
            penalty=penalty,
            num_steps=steps,
            x_rate=x_rate,
            y_rate=y_rate,
            x_rule="adam",
            refresh_every=_REFRESH_EVERY,
            grow_every=1 if grow_every is None else grow_every,
        ),
        losses=TextProblemConfig(
            num_batch_examples=batch_size, cloud_weight=cloud_weight, token_weight=token_weight, seed=seed
        ),
        certificate_share=certificate_share,
        race=None if race is None else RaceConfig(num_left=race),
        growth=None
        if grow_every is None
        else GrowthConfig(max_prompts=pool_size, shows_targets=show_targets, seed=seed),
        refit=refitting,
        always_merges=always_merge,
    )
    with ExitStack() as stack:
        redactor = stack.enter_context(
            Redactor(read_settings(detectors, dictionary, allow_list), timeout_s=detector_timeout)
        )
        gate = CloudGate(
            stack.enter_context(open_cloud_or_hosted(cloud, described, key_env)),
            price=price_of(name, prices),
            ledger=None if ledger is None else stack.enter_context(EgressLedger(ledger)),
            retry=RetryRules(timeout_s=cloud_timeout),
        )
        reflection = stack.enter_context(open_reflection(reflecting))
        sizes = PipelineConfig(model=name, max_tokens=max_tokens, num_parallel=num_parallel)
        pipeline = Pipeline(redactor, gate, sizes)
        projection = project(
            pipeline,
            learnt,
            judged,
            prompt,
            budget=budget,
            folder=out,
            config=config,
            is_reflecting_here=reflecting.is_here,
            rewriter=rewriting,
        )
        if not pay:
            if as_json:
                print_json(projection.to_json())
            else:
                stdout.print(projection.to_text(), markup=False, soft_wrap=True)
                stderr.print("nothing was sent; add --pay and a budget to do it", markup=False)
            return
        if not as_json:
            stderr.print(projection.to_text(), markup=False, soft_wrap=True)
        edge_config = None
        tuned = save = make_rewriter = None
        rewriters: list[TunedRewriter] = []
        if edge is not None:
            from cotune.sandwich.edge_adapter import REWRITE_TEMPLATE, EdgeConfig, EdgeRewriter
            from cotune.sandwich.prompts.reflection import EdgeReflection
            from cotune.sandwich.rewriter_tuning import tune_rewriter as tune

            edge_config = EdgeConfig(
                max_new_tokens=max_new_tokens,
                gradients=cast("Literal['backprop', 'zeroth_order']", gradients),
                smoothing_radius=smoothing_radius,
                copies=not no_copy,
                seed=seed,
            )
            tuned, save = stack.enter_context(open_edge(edge, edge_config, rank=rank, seed=seed))
            reflection = EdgeReflection(tuned) if reflecting.is_here else reflection

            def rewrites_by(
                how: RewriterConfig, line: Pipeline, examples: Sequence[PrivateExample], key: bytes
            ) -> EdgeRewriter:
                found = tune(tuned, line, tuned.start(), examples, score, REWRITE_TEMPLATE, how, key=key)
                rewriters.append(found)
                return EdgeRewriter(tuned, found.x)

            make_rewriter = None if rewriting is None else partial(rewrites_by, rewriting)

        advance = stack.enter_context(progress("fitting", enabled=not as_json))

        def told(seen: Refresh) -> None:
            advance(min(seen.step, steps), steps, f"loss {seen.upper:.3f}, gap {seen.gap:.3f}")

        result = fit_sandwich(
            pipeline,
            learnt,
            judged,
            score,
            variable=prompt,
            budget=budget,
            folder=out,
            edge=tuned,
            make_rewriter=make_rewriter,
            rewriter_settings=repr(rewriting) if rewriting else "",
            reflection=reflection,
            config=config,
            resume=resume,
            on_refresh=told,
            on_refit=lambda done, most: advance(done, most, "the edge learns anew"),
        )
        if save is not None:
            save(result.x, out / ADAPTER_FOLDER, with_gate=True)
            for each in rewriters:
                # Before the cloud there is nothing to copy, so its gate is nobody's.
                save(each.x, out / REWRITER_FOLDER, with_gate=False)
        Fitted(
            folder=out,
            model=name,
            max_tokens=max_tokens,
            prompt=result.prompt,
            edge=edge,
            template=edge_config.template if edge_config else None,
            max_new_tokens=max_new_tokens if edge_config else None,
            hosted=described,
            is_rewriting=bool(rewriters),
            is_merging=result.is_merging,
            is_copying=edge_config.copies if edge_config else False,
        ).save()
    if as_json:
        print_json({**result.to_json(), "rewriter": rewriters[0].to_json() if rewriters else None})
    else:
        stdout.print(result.to_text(), markup=False, soft_wrap=True)
        for each in rewriters:
            stdout.print(each.to_text(), markup=False, soft_wrap=True)


def script(
    file: Annotated[Path, typer.Argument(help='JSON list of rules: {"if": PATTERN, "say": TEXT}.')],
    port: Annotated[int, typer.Option(help="On loopback; 0 for any free one.")] = 7080,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when it listens.")] = False,
) -> None:
    """Serve a scripted cloud on loopback, to try `ask` and `fit` without paying anybody; its model is `scripted`.

    Example:

        cotune sandwich script rules.json --port 7080
    """
    from cotune.sandwich.scripted_cloud import MODEL, read_script, scripted_server

    with scripted_server(read_script(file), port=port) as server:
        if as_json:
            print_json({"url": server.base_url, "model": MODEL})
        else:
            stdout.print(f"listening on {server.base_url}, model {MODEL}; end with Ctrl-C", markup=False)
        stop = threading.Event()
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: stop.set())
        stop.wait()
        stderr.print(f"answered {len(server.bodies):,} requests", markup=False)
