"""GEPA and MIPROv2, through DSPy, as arms: the cloud's instruction, within the same tokens and through the same door.

`pip install 'cotune[dspy]'`. DSPy asks through a model of ours, so that all it sends is redacted, counted against the
budget and written down like any other arm's requests; the same cloud answers and reflects. When the budget is over, the
model says so instead of answering, at no cost, and the best instruction so far is taken.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sandwich_arms import CloudAlone
from sandwich_bench import Arm, Bench, Learnt

from cotune.errors import BudgetError, InputError, RedactionError
from cotune.sandwich.chat import ChatRequest
from cotune.sandwich.pipeline import Pipeline

if TYPE_CHECKING:
    from types import ModuleType

REFLECTION_TOKENS = 256
NUM_CANDIDATES = 6
MAX_TRIALS = 30
NO_ANSWER = "[the budget is over]"  # DSPy takes an empty text for a broken model


def has_dspy() -> bool:
    """Whether these arms can run here."""
    return importlib.util.find_spec("dspy") is not None


def gepa(bench: Bench) -> Learnt:
    """Instructions that the cloud proposes from failures, kept by Pareto (arXiv 2507.19457)."""
    dspy = _dspy(bench)
    asking = _Asking(dspy, bench)

    def metric(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
        score = bench.task.metric(pred.answer, [gold.answer])
        return dspy.Prediction(score=score, feedback=f"The answer should be: {gold.answer}")

    optimiser = dspy.GEPA(
        metric=metric,
        max_metric_calls=asking.num_metric_calls,
        reflection_lm=asking.reflecting,
        reflection_minibatch_size=min(3, len(bench.task.train)),
        num_threads=1,
        seed=bench.seed,
        gepa_kwargs={"stop_callbacks": [lambda _: asking.gate_is_spent]},
    )
    return asking.learnt(optimiser.compile(asking.program, trainset=asking.train, valset=asking.validation))


def mipro(bench: Bench) -> Learnt:
    """Instructions that the cloud proposes, chosen by Bayesian search (MIPROv2, arXiv 2406.11695), without examples."""
    dspy = _dspy(bench)
    if importlib.util.find_spec("optuna") is None:
        raise InputError("MIPROv2 needs the package optuna; install it with: pip install 'cotune[dspy]'")
    asking = _Asking(dspy, bench)

    def metric(gold: Any, pred: Any, trace: Any = None) -> float:
        return bench.task.metric(pred.answer, [gold.answer])

    optimiser = dspy.MIPROv2(
        metric=metric,
        prompt_model=asking.reflecting,
        task_model=asking.answering,
        max_bootstrapped_demos=0,
        max_labeled_demos=0,
        auto=None,
        num_candidates=NUM_CANDIDATES,
        num_threads=1,
        seed=bench.seed,
    )
    found = optimiser.compile(
        asking.program,
        trainset=asking.train,
        valset=asking.validation,
        num_trials=min(MAX_TRIALS, max(1, asking.num_metric_calls // len(asking.validation))),
        minibatch=False,
        program_aware_proposer=False,
    )
    return asking.learnt(found)


DSPY_ARMS: Mapping[str, Arm] = {"B gepa": gepa, "B mipro": mipro}


class _Asking:
    """What both optimisers share: a program of one instruction, behind the bench's door.

    Raises:
        BudgetError: the budget does not buy one answer.
    """

    def __init__(self, dspy: ModuleType, bench: Bench) -> None:
        self.bench, task = bench, bench.task
        self.gate = bench.gate(bench.budget)
        self._pipeline: Pipeline = bench.pipeline(self.gate)
        self.answering = _gate_lm(dspy, self, max_tokens=task.max_tokens, is_restored=True)
        # What it writes becomes a prompt: with placeholders, not with what they stand for.
        self.reflecting = _gate_lm(dspy, self, max_tokens=REFLECTION_TOKENS, is_restored=False)
        self.gate_is_spent = False
        self.train, self.validation = (
            [dspy.Example(request=each.request, answer=each.target).with_inputs("request") for each in part]
            for part in (task.train, task.validation)
        )
        dspy.configure(lm=self.answering, adapter=_plain_adapter(dspy))
        signature = dspy.Signature("request -> answer", task.prompts[0])
        self.program = dspy.Predict(signature)
        self.program(request=task.train[0].request)
        if self.gate_is_spent:
            raise BudgetError("the budget buys no answer to learn from; raise --budget-tokens")
        self.num_metric_calls = max(1, (bench.budget.tokens or 0) // max(1, self.gate.purse.spent.tokens))

    def ask(self, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, temperature: float, restored: bool) -> str:
        """Redacted, through the door, and back; nothing once the budget is over."""
        if self.gate_is_spent:
            return NO_ANSWER
        request = self._pipeline.redactor.request()
        sent = request.redact_messages([{"role": each["role"], "content": str(each["content"])} for each in messages])
        chat = ChatRequest(model=self.bench.model, messages=sent, max_tokens=max_tokens, temperature=temperature)
        try:
            text = self.gate.ask(chat).answer.text
        except BudgetError:
            self.gate_is_spent = True
            return NO_ANSWER
        return request.restore(text) if restored else text

    def learnt(self, program: Any) -> Learnt:
        """The arm's result; the plain prompt where something private got into the instruction."""
        prompt, is_kept = str(program.signature.instructions), True
        try:
            self._pipeline.check_prompt(prompt)
        except RedactionError:
            prompt, is_kept = self.bench.task.prompts[0], False
        return Learnt(
            server=CloudAlone(prompt=prompt),
            taken=self.gate.account.taken(),
            sent=self.gate.sent.payloads,
            notes={"prompt": prompt, "is_kept": is_kept, "metric_calls": self.num_metric_calls},
        )


def _dspy(bench: Bench) -> ModuleType:
    """The package, told to keep nothing on the disk but in the arm's own folder."""
    if not has_dspy():
        raise InputError("GEPA and MIPROv2 need the package dspy; install it with: pip install 'cotune[dspy]'")
    os.environ.setdefault("DSPY_CACHEDIR", str(bench.folder / "dspy"))  # read once, when it is imported
    import dspy

    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)
    module: ModuleType = dspy
    return module


def _gate_lm(dspy: Any, asking: _Asking, *, max_tokens: int, is_restored: bool) -> Any:
    """A language model for DSPy that asks through the door."""
    from openai.types.chat import ChatCompletion

    class GateLM(dspy.BaseLM):  # type: ignore[misc]
        def forward(self, prompt: Any = None, messages: Any = None, **settings: Any) -> ChatCompletion:
            turns = messages or [{"role": "user", "content": prompt}]
            # DSPy draws several answers by a temperature; at 0 they would be one.
            warmth = float(settings.get("temperature") or 0.0)
            text = asking.ask(turns, max_tokens=max_tokens, temperature=min(warmth, 2.0), restored=is_restored)
            return ChatCompletion.model_validate(
                {
                    "id": "gate",
                    "object": "chat.completion",
                    "created": 0,
                    "model": self.model,
                    "choices": [
                        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                    ],
                    "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
                }
            )

    return GateLM(model=asking.bench.model, cache=False, num_retries=0)


def _plain_adapter(dspy: Any) -> Any:
    """The instruction as system message and the request as it is, as all arms ask; the whole text is the answer."""

    class PlainAdapter(dspy.ChatAdapter):  # type: ignore[misc]
        def format(self, signature: Any, demos: Any, inputs: Any) -> list[dict[str, str]]:
            if set(signature.output_fields) != {"answer"}:
                return list(super().format(signature, demos, inputs))
            return [
                {"role": "system", "content": signature.instructions},
                {"role": "user", "content": str(inputs["request"])},
            ]

        def parse(self, signature: Any, completion: str) -> dict[str, Any]:
            if set(signature.output_fields) != {"answer"}:
                return dict(super().parse(signature, completion))
            return {"answer": completion.strip()}

    return PlainAdapter(use_json_adapter_fallback=False)
