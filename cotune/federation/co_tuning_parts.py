"""What a co-tuned federation has besides its algorithm: the cloud's half, the judge, and results of either side.

The same parts stand behind a simulation and behind the server's folder of a deployment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cotune.data import read_examples, read_prompts
from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.federation.algorithm import Algorithm
from cotune.federation.arrays import Arrays
from cotune.federation.backbone_model import EVALUATION_BATCH
from cotune.federation.causal_model import CausalModel
from cotune.federation.cloud_saml import CloudSaml
from cotune.federation.co_tuning_device import term_of
from cotune.federation.coplms import CoPlms
from cotune.federation.settings import AdapterSettings, FederationSettings
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone
from cotune.models.low_rank_terms import low_rank_terms
from cotune.tuning.answer_loss import TokenBatches, answer_nats

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def proxy_of(settings: FederationSettings, backbone: Backbone) -> CausalModel:
    """The model of the settings, as devices load it: in the number type and the place of the backbone."""
    model = backbone.model
    return CausalModel(settings.model, str(model.dtype).removeprefix("torch."), str(model.device))


def with_cloud(algorithm: Algorithm, settings: FederationSettings, proxy: CausalModel) -> Algorithm:
    """The algorithm with the cloud's model at work, where it is `CoPlms` and its settings name one.

    Raises:
        InputError: the public texts or the model cannot be used.
        MismatchError: the cloud's model has another tokenizer than the proxy.
    """
    if not isinstance(algorithm, CoPlms) or not algorithm.cloud.model:
        return algorithm
    own, loss = algorithm.cloud, algorithm.device_steps.loss
    half = CloudSaml(
        own,
        cloud=CausalModel(own.model, proxy.dtype, proxy.torch_device),
        proxy=proxy,
        examples=read_examples(own.public, own.template, own.limit, settings.seed),
        proxy_scale=scale_of(settings.adapter),
        max_tokens=settings.data.max_length,
        loss_tau=loss.tau,
        gate=loss.gate,
        questions=read_prompts(own.questions, own.template, own.limit, settings.seed) if own.questions else (),
        answering=algorithm.answering,
        seed=settings.seed,
    )
    return replace(algorithm, cloud_half=half)


def inputs_of(algorithm: CoPlms, settings: FederationSettings) -> dict[str, str]:
    """SHA-256, hex, of what a run has beside its devices' texts; it goes on with the same alone.

    Returns:
        Of each simulated device's model by its pattern, and of the cloud's model, its public texts and its questions.

    Raises:
        InputError: a model or file cannot be read.
    """
    small = {f"model of devices.{name}": CausalModel(str(model)).digest for name, model in algorithm.devices.items()}
    return small | inputs_of_cloud(algorithm, settings)


def inputs_of_cloud(algorithm: CoPlms, settings: FederationSettings) -> dict[str, str]:
    """As `inputs_of`, of what the server has."""
    own = algorithm.cloud
    if not own.model:
        return {}
    rows = read_examples(own.public, own.template, own.limit, settings.seed)
    asked = read_prompts(own.questions, own.template, own.limit, settings.seed) if own.questions else []
    return {
        "model of the cloud": CausalModel(own.model).digest,
        "public texts": _digest_of([[one.prompt, one.target] for one in rows]),
        "open questions": _digest_of(asked),
    }


def _digest_of(told: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def scale_of(adapter: AdapterSettings) -> float:
    """s, what the shared adapter's B A is multiplied by."""
    return LoraShape(rank=adapter.rank, alpha=adapter.alpha, use_rslora=adapter.scale == "rslora").scale


def judge_of_terms(backbone: Backbone, encoded: Sequence[EncodedExample], *, scale: float) -> Callable[[Arrays], float]:
    """The loss of adapters of any rank, nats per token.

    Args:
        backbone: without any adapter.
        encoded: texts that no device has.
        scale: s.
    """
    model, pad = backbone.model, backbone.spec.pad_token_id
    batches = TokenBatches(encoded, min(EVALUATION_BATCH, len(encoded)), pad_token_id=pad, seed=0)

    @torch.no_grad()
    def judge(adapter: Arrays) -> float:
        term = term_of({name: torch.from_numpy(np.array(a)).to(model.device) for name, a in adapter.items()})
        total, num_tokens = 0.0, 0
        with low_rank_terms(model, [term], scale=scale):
            for batch in batches.epoch(0):
                nats = answer_nats(model, model.get_output_embeddings(), dict(model.named_parameters()), batch)
                total, num_tokens = total + float(nats.double().sum()), num_tokens + len(nats)
        return total / num_tokens

    return judge


def stacked_adapter(arrays: Arrays, own: AdapterSettings) -> LoraAdapter:
    """An adapter of `CoPlms.adapter`, whose rank grows with what was folded, as one that peft loads."""
    rank = next(array.shape[0] for name, array in sorted(arrays.items()) if "lora_A" in name)
    # The strength grows with the rank, so that s stays.
    shape = LoraShape(rank=rank, alpha=scale_of(own) * rank, targets=own.targets)
    return LoraAdapter(shape=shape, params={name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})


def save_cloud_adapter(algorithm: CoPlms, state: Arrays, folder: Path) -> None:
    """Write the cloud's adapter as a peft folder.

    Raises:
        InputError: there is no cloud's model, or the folder cannot be written.
    """
    params = algorithm.cloud_adapter(state)
    if not params:
        raise InputError("the run has no cloud's model, expected one; name it under options.coplms.cloud")
    own = algorithm.cloud
    adapter = LoraAdapter(
        shape=LoraShape(rank=own.rank, alpha=own.alpha),
        params={name: torch.from_numpy(np.array(array)) for name, array in params.items()},
    )
    model: PreTrainedModel
    with CausalModel(own.model).loaded() as model:
        adapter.save(folder, model)
