"""FedPepTAO: prompts in every layer, of which only the layers that matter are exchanged.

FedPepTAO (Che et al., EMNLP 2023, arXiv 2310.15080). Of the paper we read the abstract, and of its released code what
it computes. From these:

  * **Score.** A layer's hidden states of a batch of b examples, flattened to rows h_1 ... h_b, give the matrix of
    cosines C_ij = <h_i, h_j> / (|h_i| |h_j|). With its eigenvalues e_1 ... e_b and epsilon = 1e-5,
        score = sum_k log(e_k + epsilon) + 1 / (e_k + epsilon)
    Devices' scores are averaged by their numbers of examples, and layers are taken from the highest score down.
  * **Exchange.** Prompts of the chosen layers are averaged; those of the others stay on their device and are its own.
  * **Device.** Adam, whose moments start at zero in every round, so that they need not be sent: `LocalModel.descend`.
  * **Server.** Momentum, with a state for each device that the server keeps and that never travels: how far the
    device drifts from the others, as in SCAFFOLD (Karimireddy et al., arXiv 1910.06378).

Ours:

  * How many layers are exchanged follows from a budget in bytes. The paper takes it from the eigenvalues of the loss's
    Hessian on each device, which needs second derivatives there; we could not read by which rule.
  * The last layer has a score like the others; the released code leaves it out.
  * The server's step. With w what it sent, w_c what device c sends back after tau_c steps of size eta, p_c the shares
    of the weights and lr the server's learning rate:
        v' = beta v + (1 - beta) sum_c p_c (w - w_c + tau_c eta (c - d_c)),    w' = w - lr v'
        d_c' = (w - w_c) / (tau_c eta)
    d_c is the mean step of the device when it last took part, c the weighted mean of all d_c, both from before the
    round; a device that is new has no correction. So a round moves as all known devices would, and not only as those
    that happen to take part; where all do with the same weights, the correction vanishes. The released code adds
    c - c_c to a momentum of the differences between two rounds' updates, and c_c' = c_c - c + (w - w_c) / (tau_c eta),
    which is right where devices step with c - c_c themselves. They do not, so that it would grow without end.

Bytes in float32: 4 L up for the scores, once; then 4 num_tokens hidden for each exchanged layer, both ways. Memory of
the device: its prompts, their gradients and two moments. Memory of the server: N + 2 times the exchanged prompts in
float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.algorithm import Combine
from cotune.federation.lora_factors import Arrays, as_float32, normalised_weights
from cotune.federation.number_ranges import check_at_least, check_positive

EPSILON = 1e-5
"""Added to eigenvalues in the score."""


def score_layer(hidden_states: NDArray[np.floating]) -> float:
    """What a device says of one layer, from one batch. High where the layer's states of different texts are alike.

    Args:
        hidden_states: (batch, ...), at least two examples, padded alike.

    Raises:
        InputError: there are fewer than two examples, a number is not finite, or the states of one are all zero.

    Example:
        >>> round(score_layer(np.eye(2)), 3)  # two eigenvalues of 1
        2.0
    """
    if hidden_states.ndim < 2 or hidden_states.shape[0] < 2 or 0 in hidden_states.shape:
        raise InputError(
            f"hidden_states have shape {hidden_states.shape}, expected (batch, ...) with at least two examples"
        )
    rows = hidden_states.reshape(hidden_states.shape[0], -1).astype(np.float64)
    if not np.isfinite(rows).all():
        raise InputError("hidden_states hold nan or inf, expected finite numbers")
    # Divided by the largest number first, so that no square overflows.
    largest = np.abs(rows).max(axis=1, keepdims=True)
    if not largest.all():
        raise InputError("the hidden states of an example are all zero, expected some direction; leave it out")
    rows = rows / largest
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    # A matrix of cosines has no negative eigenvalues; rounding makes some.
    eigenvalues = np.maximum(np.linalg.eigvalsh(rows @ rows.T), 0.0) + EPSILON
    return float(np.sum(np.log(eigenvalues) + 1.0 / eigenvalues))


def choose_prompts(
    scores: NDArray[np.floating],
    weights: NDArray[np.float64] | Sequence[float],
    layer_bytes: Sequence[int],
    budget_bytes: int,
) -> tuple[int, ...]:
    """The layers whose prompts are exchanged: by mean score, from the highest down, as long as they fit.

    Args:
        scores: of `score_layer`, (num_devices, num_layers).
        weights: one for each device, at least 0; their numbers of examples.
        layer_bytes: of each layer's prompt, at least 1.
        budget_bytes: what a device may send in a round.

    Returns:
        Layers, rising. The first one that does not fit ends the choice, so that a small layer of low score never takes
        the place of a large one.

    Raises:
        InputError: shapes do not meet, a score is not finite, or not even the first layer fits.

    Example:
        >>> choose_prompts(np.array([[5.0, 1.0, 9.0], [7.0, 1.0, 9.0]]), [1, 1], [8, 8, 8], 20)
        (0, 2)
    """
    wide = np.asarray(scores, np.float64)
    if wide.ndim != 2 or wide.shape[1] != len(layer_bytes) or 0 in wide.shape:
        raise InputError(
            f"scores have shape {wide.shape}, expected (num_devices, {len(layer_bytes)}), one column for each layer"
        )
    if not np.isfinite(wide).all():
        raise InputError("scores hold nan or inf, expected finite numbers; leave this device out")
    if min(layer_bytes) < 1:
        raise InputError(f"layer_bytes are {list(layer_bytes)}, expected at least 1 each")
    mean = normalised_weights(weights, len(wide)) @ wide
    chosen: list[int] = []
    left = budget_bytes
    for layer in np.argsort(-mean, kind="stable").tolist():
        if layer_bytes[layer] > left:
            break
        chosen.append(layer)
        left -= layer_bytes[layer]
    if not chosen:
        first = int(np.argmax(mean))
        raise InputError(
            f"budget_bytes is {budget_bytes:,}, expected at least {layer_bytes[first]:,} for the prompt of layer "
            f"{first}; raise it or take fewer virtual tokens"
        )
    return tuple(sorted(chosen))


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceDrift:
    """The mean step of a device when it last took part.

    Attributes:
        steps: d_c, named as the exchanged prompts.
        weight: of the device in that round.
    """

    steps: dict[str, NDArray[np.float64]]
    weight: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ServerState:
    """What the server remembers; none of it is sent.

    Attributes:
        momentum: v, named as the exchanged prompts.
        drifts: by device, of those that ever took part.
    """

    momentum: dict[str, NDArray[np.float64]]
    drifts: dict[str, DeviceDrift] = field(default_factory=dict)


def fresh_server(prompts: Arrays) -> ServerState:
    """The state before the first round.

    Args:
        prompts: the exchanged ones, such as `exchanged` gives them.
    """
    return ServerState(momentum={name: np.zeros(prompt.shape) for name, prompt in prompts.items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptReply:
    """What comes back from one device.

    Attributes:
        prompts: the exchanged ones after its steps.
        num_steps: tau, its steps of Adam.
        learning_rate: eta, their size.
    """

    prompts: Arrays
    num_steps: int
    learning_rate: float


def server_step(
    prompts: Arrays,
    replies: Mapping[str, PromptReply],
    weights: NDArray[np.float64] | Sequence[float],
    state: ServerState,
    *,
    beta: float = 0.9,
    learning_rate: float = 1.0,
    combine: Combine | None = None,
) -> tuple[dict[str, NDArray[np.float32]], ServerState]:
    """One round of the server.

    Args:
        prompts: w, the exchanged ones as they were sent.
        replies: by device.
        weights: one for each reply, in their order, at least 0.
        state: of `fresh_server` or of the round before.
        beta: how much momentum is kept; 0 with a learning rate of 1 and all devices is the plain average.
        learning_rate: lr.
        combine: the rule in the place of both weighted means: of the corrected moves, and of the drifts that they are
            corrected by, so that a liar's drift does not reach the others through c.

    Raises:
        InputError: names or shapes differ, a number is not finite, an argument is out of range, or the rule refuses.

    Example:
        >>> w = {"p": np.zeros((1, 1), np.float32)}
        >>> reply = PromptReply(prompts={"p": np.ones((1, 1), np.float32)}, num_steps=2, learning_rate=0.5)
        >>> moved, state = server_step(w, {"a": reply}, [1], fresh_server(w), beta=0.75)
        >>> moved["p"].tolist(), state.momentum["p"].tolist()
        ([[0.25]], [[-0.25]])
    """
    shares = normalised_weights(weights, len(replies))
    _check_same(state.momentum, prompts, "the momentum", "prompts")
    for device, reply in replies.items():
        _check_same(reply.prompts, prompts, f"the reply of device '{device}'", "prompts")
        check_positive(**{f"learning_rate of device '{device}'": reply.learning_rate})
        check_at_least(1, **{f"num_steps of device '{device}'": reply.num_steps})
    check_positive(learning_rate=learning_rate)
    if not 0 <= beta < 1:
        raise InputError(f"beta is {beta}, expected a number from 0 to below 1")
    moves = {
        device: {name: prompts[name].astype(np.float64) - reply.prompts[name] for name in prompts}
        for device, reply in replies.items()
    }
    corrected = {device: dict(own) for device, own in moves.items()}
    mean_drift = _mean_drift(state, combine)
    for device, reply in replies.items():
        if device in state.drifts:
            length = reply.num_steps * reply.learning_rate
            for name in prompts:
                step = mean_drift[name] - state.drifts[device].steps[name]
                corrected[device][name] = moves[device][name] + length * step
    mean = _combined(list(corrected.values()), np.asarray(shares, np.float64), combine)
    moved, momentum = {}, {}
    for name, prompt in prompts.items():
        momentum[name] = beta * state.momentum[name] + (1 - beta) * mean[name]
        moved[name] = as_float32(prompt - learning_rate * momentum[name])
    drifts = dict(state.drifts)
    for weight, (device, reply) in zip(weights, replies.items(), strict=True):
        length = reply.num_steps * reply.learning_rate
        steps = {name: move / length for name, move in moves[device].items()}
        drifts[device] = DeviceDrift(steps=steps, weight=float(weight))
    return moved, ServerState(momentum=momentum, drifts=drifts)


def exchanged(prompts: Arrays, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """The prompts that are sent, of all that a device has.

    Raises:
        InputError: there is no such prompt.

    Example:
        >>> list(exchanged({"0": np.zeros(1, np.float32), "1": np.zeros(1, np.float32)}, ["1"]))
        ['1']
    """
    for name in names:
        if name not in prompts:
            raise InputError(f"names has '{name}', expected some of {', '.join(sorted(prompts))}")
    return {name: prompts[name] for name in names}


def taken_in(prompts: Arrays, received: Arrays) -> dict[str, NDArray[np.float32]]:
    """A device's prompts with those from the server in their place; its own stay.

    Raises:
        InputError: the server sent one that the device lacks, or of another shape.
    """
    own = {name: prompts[name] for name in received if name in prompts}
    _check_same(received, own, "what the server sent", "the device's prompts")
    return {**prompts, **received}


def _mean_drift(state: ServerState, combine: Combine | None) -> dict[str, NDArray[np.float64]]:
    """c; devices whose weight was 0 have no say."""
    known = [drift for drift in state.drifts.values() if drift.weight > 0]
    if not known:
        return {name: np.zeros(value.shape) for name, value in state.momentum.items()}
    weights = np.array([drift.weight for drift in known], np.float64)
    return _combined([drift.steps for drift in known], weights / weights.sum(), combine)


def _combined(
    each: Sequence[Mapping[str, NDArray[np.float64]]], shares: NDArray[np.float64], combine: Combine | None
) -> dict[str, NDArray[np.float64]]:
    """One of many: the weighted mean, or what the rule makes of them, taken as one vector of all prompts."""
    names = list(each[0])
    if combine is None:
        return {name: np.tensordot(shares, np.stack([one[name] for one in each]), 1) for name in names}
    rows = np.stack([np.concatenate([one[name].reshape(-1) for name in names]) for one in each])
    vector = combine(as_float32(rows), shares).astype(np.float64)
    ends = np.cumsum([each[0][name].size for name in names])[:-1]
    parts = np.split(vector, ends)
    return {name: part.reshape(each[0][name].shape) for name, part in zip(names, parts, strict=True)}


def _check_same(
    arrays: Mapping[str, NDArray[np.floating]], like: Mapping[str, NDArray[np.floating]], name: str, like_name: str
) -> None:
    if arrays.keys() != like.keys():
        odd = sorted(arrays.keys() ^ like.keys())
        raise InputError(f"{name} and {like_name} differ in '{odd[0]}', expected the same names")
    for key, array in arrays.items():
        if array.shape != like[key].shape:
            raise InputError(
                f"{name} has shape {array.shape} for '{key}', expected {like[key].shape} as in {like_name}"
            )
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds nan or inf for '{key}', expected finite numbers; leave this device out")
