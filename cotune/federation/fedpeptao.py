"""FedPepTAO (Che et al., EMNLP 2023, arXiv 2310.15080): prompts in every layer, the layers that matter exchanged.

    first round:  devices score each layer, and the server chooses layers by the scores and a budget in bytes
    then          device:  trains all its prompts, and sends how far those of the chosen layers moved
                  server:  a step with momentum, corrected for the devices' drift

`cotune.federation.prompt_choice` has the formulas of scores, choice and step, and says what is not the paper's. A
layer's prompt is its keys and values of prefix tuning: a part of the columns of peft's one array. Prompts of layers
that were not chosen stay on their device and are its own: the server's adapter, which is judged and saved, has them as
they were at the start. Adam's moments start at zero in every round on the device, so it keeps no more than its own
prompts.

The rule of the federation combines scores, corrected moves and drifts, so that a liar reaches none of them.

Wire: 4 L bytes up in the round of scores, L layers; then the numbers of the chosen layers' prompts up and down. All
prompts go down once. Memory on the device: the prompts, their gradient and moments, and activations as in all
back-propagation. The prefix takes as many positions of the context as it has tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.algorithm import Combine, Done, Job, Plan, Update, mean_of
from cotune.federation.arrays import Arrays, add, difference, shapes_of
from cotune.federation.descend import steps_as_settings, steps_of
from cotune.federation.local_model import LocalSteps
from cotune.federation.number_ranges import check_positive
from cotune.federation.prompt_choice import (
    DeviceDrift,
    PromptReply,
    ServerState,
    choose_prompts,
    exchanged,
    fresh_server,
    score_layer,
    server_step,
    taken_in,
)

PREFIX = "prompt_encoder.default.embedding.weight"
"""peft's name of a prefix: (tokens, layers x 2 x kv_heads x head_dim)."""
# In the state: prompts by layer, their momentum, each device's drift and its weight, and the chosen layers (L,).
PROMPT, MOMENTUM, DRIFT, DRIFT_WEIGHT = "prompt/", "momentum/", "drift/", "drift_weight/"
CHOSEN, SCORES = "chosen", "scores"


@dataclass(frozen=True, kw_only=True)
class FedPepTAO:
    """The server half; `send_scores` and `descend_prompts` are the device's."""

    steps: LocalSteps = field(default_factory=LocalSteps)
    """Of each device in each round."""
    num_layers: int = 0
    """L, of the model; `cotune federate` and `cotune federate prepare` look it up."""
    budget_bytes: int | None = None
    """What a device may send in a round; left out: half of all layers."""
    score_batch_size: int = 8
    """Texts that a device scores its layers on, at least 2."""
    beta: float = 0.9
    """How much of the server's momentum is kept."""
    server_learning_rate: float = 1.0
    """lr."""

    def __post_init__(self) -> None:
        if self.num_layers < 0:
            raise InputError(f"num_layers is {self.num_layers}, expected the number of layers of the model")
        if self.budget_bytes is not None and self.budget_bytes < 1:
            raise InputError(f"budget_bytes is {self.budget_bytes}, expected at least the bytes of one layer's prompt")
        if self.score_batch_size < 2:
            raise InputError(f"score_batch_size is {self.score_batch_size}, expected at least 2")
        if not 0 <= self.beta < 1:
            raise InputError(f"beta is {self.beta}, expected a number from 0 to below 1")
        check_positive(server_learning_rate=self.server_learning_rate)

    def start(self, adapter: Arrays) -> Arrays:
        if adapter.keys() != {PREFIX}:
            raise InputError(
                f"the adapter holds {min(adapter, default='nothing')}, expected the one array of a prefix, {PREFIX}; "
                "set kind = 'prefix' for the adapter"
            )
        width = adapter[PREFIX].shape[1]
        if self.num_layers < 1 or width % self.num_layers:
            raise InputError(
                f"num_layers is {self.num_layers} and the prefix has {width} columns, expected the model's number of "
                "layers, which divides them; give it, or prepare the run anew, which looks it up"
            )
        prompts = split_prompts(adapter[PREFIX], self.num_layers)
        one = prompts[layer_name(0)].nbytes
        if self.budget_bytes is not None and self.budget_bytes < one:
            raise InputError(
                f"budget_bytes is {self.budget_bytes:,}, expected at least {one:,} for the prompt of one layer; "
                "raise it or take fewer virtual tokens"
            )
        return prompts

    def plan(self, state: Arrays, round_number: int, device: str, since: int | None) -> Plan:
        prompts = prompts_in(state)
        if CHOSEN not in state:
            # Before the choice no prompt changes.
            return Plan(
                work="prompt_scores",
                arrays=prompts if since is None else {},
                settings={"batch_size": self.score_batch_size},
                reply={SCORES: (self.num_layers,)},
            )
        names = chosen_names(state)
        own = exchanged(prompts, names)
        return Plan(
            work="fedpeptao",
            arrays=prompts if since is None else own,
            settings=steps_as_settings(self.steps) | {"exchanged": ",".join(names)},
            reply=shapes_of(own),
        )

    def merge(self, state: Arrays, round_number: int, updates: Sequence[Update], combine: Combine) -> Arrays:
        if CHOSEN not in state:
            return dict(state) | self._choice(prompts_in(state), updates, combine)
        sent = exchanged(prompts_in(state), chosen_names(state))
        replies = {
            one.device: PromptReply(
                prompts=add(sent, one.arrays),
                num_steps=self.steps.num_steps,
                learning_rate=self.steps.learning_rate,
            )
            for one in updates
        }
        moved, after = server_step(
            sent,
            replies,
            [one.weight for one in updates],
            read_server(state),
            beta=self.beta,
            learning_rate=self.server_learning_rate,
            combine=combine,
        )
        return dict(state) | moved | written(after)

    def adapter(self, state: Arrays) -> dict[str, NDArray[np.float32]]:
        return {PREFIX: join_prompts(prompts_in(state))}

    def _choice(self, prompts: Arrays, updates: Sequence[Update], combine: Combine) -> dict[str, NDArray[np.float32]]:
        scores = mean_of(updates, combine, [SCORES])[SCORES]
        layer_bytes = [prompt.nbytes for prompt in prompts.values()]
        budget = self.budget_bytes
        if budget is None:
            budget = -(-self.num_layers // 2) * layer_bytes[0]
        chosen = choose_prompts(scores[None], [1.0], layer_bytes, budget)
        mask = np.isin(np.arange(self.num_layers), chosen).astype(np.float32)
        server = fresh_server({layer_name(layer): prompts[layer_name(layer)] for layer in chosen})
        return {CHOSEN: mask} | written(server)


def layer_name(layer: int) -> str:
    """Of a layer's prompt, so that their order is that of the layers."""
    return f"{PROMPT}{layer:05d}"


def split_prompts(prefix: NDArray[np.float32], num_layers: int) -> dict[str, NDArray[np.float32]]:
    """The prompt of each layer, (tokens, 2 x kv_heads x head_dim).

    Example:
        >>> {name: array.tolist() for name, array in split_prompts(np.float32([[1, 2, 3, 4]]), 2).items()}
        {'prompt/00000': [[1.0, 2.0]], 'prompt/00001': [[3.0, 4.0]]}
    """
    parts = np.split(prefix, num_layers, axis=1)
    return {layer_name(layer): part.copy() for layer, part in enumerate(parts)}


def join_prompts(prompts: Arrays) -> NDArray[np.float32]:
    """The way back."""
    return np.concatenate([prompts[name] for name in sorted(prompts)], axis=1)


def prompts_in(arrays: Arrays) -> dict[str, NDArray[np.float32]]:
    """The prompts among other arrays, in order of layers."""
    return {name: arrays[name] for name in sorted(arrays) if name.startswith(PROMPT)}


def chosen_names(state: Arrays) -> list[str]:
    """Of the prompts that are exchanged."""
    return [layer_name(int(layer)) for layer in np.flatnonzero(state[CHOSEN])]


def read_server(state: Arrays) -> ServerState:
    """What `written` wrote, in float64."""
    names = chosen_names(state)
    drifts = {}
    for key, weight in state.items():
        if key.startswith(DRIFT_WEIGHT):
            device = key.removeprefix(DRIFT_WEIGHT)
            parts = np.split(state[DRIFT + device].astype(np.float64), len(names), axis=1)
            drifts[device] = DeviceDrift(steps=dict(zip(names, parts, strict=True)), weight=float(weight[0]))
    momentum = {name: state[MOMENTUM + name].astype(np.float64) for name in names}
    return ServerState(momentum=momentum, drifts=drifts)


def written(server: ServerState) -> dict[str, NDArray[np.float32]]:
    """The server's memory as arrays of a state, rounded to float32."""
    found = {MOMENTUM + name: array.astype(np.float32) for name, array in server.momentum.items()}
    for device in sorted(server.drifts):
        drift: DeviceDrift = server.drifts[device]
        found[DRIFT_WEIGHT + device] = np.array([drift.weight], np.float32)
        # One array for each device, because a checkpoint holds some thousands of arrays.
        found[DRIFT + device] = np.hstack([drift.steps[name] for name in sorted(drift.steps)]).astype(np.float32)
    return found


def send_scores(job: Job) -> Done:
    """The device's half in the first round: `score_layer` of each layer's hidden states, (L,)."""
    params = {PREFIX: join_prompts(prompts_in(job.arrays))}
    states = job.model.hidden_states(params, batch_size=int(job.settings["batch_size"]), seed=job.batch_seed)
    total, num_tokens = job.model.evaluate(params)
    return Done(arrays={SCORES: np.array([score_layer(own) for own in states], np.float32)}, loss=total / num_tokens)


def descend_prompts(job: Job) -> Done:
    """The device's half afterwards: train all prompts, send the moves of those exchanged, and keep the others."""
    names = str(job.settings["exchanged"]).split(",")
    prompts = prompts_in(job.arrays)
    own: Mapping[str, NDArray[np.float32]] = {name: job.memory[name] for name in prompts if name in job.memory}
    before = taken_in(prompts | dict(own), exchanged(prompts, names))
    trained = job.model.descend({PREFIX: join_prompts(before)}, [PREFIX], steps_of(job.settings), seed=job.batch_seed)
    after = split_prompts(trained.arrays[PREFIX], len(prompts))
    job.memory.update({name: prompt for name, prompt in after.items() if name not in names})
    return Done(arrays=difference(exchanged(after, names), exchanged(before, names)), loss=trained.loss)
