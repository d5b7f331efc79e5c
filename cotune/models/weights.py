"""From a name to a frozen model in memory: folders and hub names, safetensors only, with plain errors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cotune.errors import InputError
from cotune.models.packed_folder import PACKED_FILE, is_packed, read_contents, read_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STARTER = "starter"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_INDEX_FILE = "model.safetensors.index.json"
_WEIGHT_FILE = "model.safetensors"
_TOKENIZER_FILE = "tokenizer.json"
_GENERATION_FILE = "generation_config.json"
_CHUNK_BYTES = 2**24
_ALIGNMENT_BYTES = 64


def find_model_folder(model: str) -> Path:
    """The local folder of a model: `starter`, a folder, or a name on the Hugging Face hub (downloaded if needed).

    Raises:
        InputError: there is no such model, or its folder lacks a file.
    """
    if model == STARTER:
        folder = Path(__file__).parent / STARTER
    elif model and Path(model).is_dir():
        folder = Path(model)
    else:
        folder = _download(model)
    _check_folder(folder, model)
    return folder


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model or not model
    if looks_like_path:
        raise InputError(f"{model!r} is no folder; give a Hugging Face model folder, a hub name or {STARTER}")
    patterns = ["*.json", "model*.safetensors", PACKED_FILE]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"the model {model} is neither a folder nor can it be had from the Hugging Face hub ({reason}); "
            "check the name and the network"
        ) from error


def _check_folder(folder: Path, model: str) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"{model} has no config.json, expected a Hugging Face causal-LM folder")
    if not (folder / _WEIGHT_FILE).is_file() and not (folder / _INDEX_FILE).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise InputError(
            f"{model} has {found}, expected {_WEIGHT_FILE}; cotune never loads pickles: "
            "convert with transformers' save_pretrained, which writes safetensors"
        )
    if not (folder / _TOKENIZER_FILE).is_file():
        raise InputError(
            f"{model} has no {_TOKENIZER_FILE}; write it with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


def read_tokenizer(folder: Path) -> bytes:
    """The bytes of `tokenizer.json`."""
    return (folder / _TOKENIZER_FILE).read_bytes()


def load_model(folder: Path, *, dtype: str, device: str, placement: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Load a causal LM from safetensors, without remote code and without chatter.

    Of a folder with quantised weights, see `packed_folder`, these are in memory as `dtype` too.

    Args:
        folder: of the model.
        dtype: of the weights in memory.
        device: where to; unused if `placement` says where.
        placement: options of transformers' `from_pretrained` that place it on several devices.

    Raises:
        InputError: an unknown dtype, an unsupported architecture, weights that do not fit the config, or damaged
            quantised ones.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    options = {
        "dtype": DTYPES[dtype],
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
        "output_loading_info": True,
        **(placement or {}),
    }
    try:
        with quiet():
            if is_packed(folder):
                model, report = _load_packed(folder, DTYPES[dtype], options)
            else:
                model, report = AutoModelForCausalLM.from_pretrained(folder, **options)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder} cannot be loaded as a causal language model: {reason}") from error
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise InputError(
            f"the weights in {folder} do not fit its config.json: {len(missing)} tensors are missing or of another "
            f"shape, such as {missing[0]}; copy the model again"
        )
    if placement is not None:
        _check_placed(model)
        return model
    _align(model)
    return _to_device(model, device)


def _load_packed(folder: Path, dtype: torch.dtype, options: Mapping[str, Any]) -> tuple[PreTrainedModel, Any]:
    """As `AutoModelForCausalLM.from_pretrained`, with the quantised weights worked out."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{type(config).__name__} is the config of no causal language model")
    packed = {name: torch.from_numpy(weight.dequantised()).to(dtype) for name, weight in read_packed(folder)}
    whole = load_file(folder / _WEIGHT_FILE)
    if both := sorted(packed.keys() & whole.keys()):
        raise InputError(f"{folder} holds {both[0]} quantised and whole, expected one of them; copy the model again")
    model, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=whole | packed, **options
    )
    if foreign := sorted(packed.keys() & set(report["unexpected_keys"])):
        raise InputError(
            f"{folder} holds the quantised weight {foreign[0]}, which a {type(model).__name__} of its config.json does "
            "not have; copy the model again"
        )
    if (folder / _GENERATION_FILE).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, report


def _check_placed(model: PreTrainedModel) -> None:
    """Refuse a model that did not fit: transformers would fetch the rest anew for each token."""
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if away or (len(places) > 1 and places & {"cpu", "disk"}):
        raise InputError(
            "the model does not fit the GPUs of this machine, expected room for all its layers; take a smaller dtype, "
            "more GPUs, or --tensor-parallel over several machines"
        )


def _align(model: PreTrainedModel) -> None:
    """Move weights that were mapped from the file at odd addresses to where PyTorch itself would put them.

    Matrix products take another path on unaligned memory and differ in the last bit. Aligned, a model computes the
    same whether it was loaded from this file, from another cut of it, or built in memory.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT_BYTES:
            parameter.data = parameter.data.clone()


def _to_device(model: PreTrainedModel, device: str) -> PreTrainedModel:
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {device!r}, which cannot be used here: {error}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, keep transformers' progress bars and advice off the screen, then give back the user's settings."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def digest_folder(folder: Path) -> str:
    """SHA-256, hex, over name, dtype, shape and bytes of every stored tensor, by name.

    Over the tensors as they are stored, so that neither the dtype at load time nor the cut into files matters. Of
    quantised weights, over their bits and groups first and then over codes, scales and zero points.

    Raises:
        InputError: a weight file is missing or is no safetensors file.
    """
    state = hashlib.sha256()
    index = folder / _INDEX_FILE
    names = [_WEIGHT_FILE]
    if is_packed(folder):
        names.append(PACKED_FILE)
        for name, shape in sorted(read_contents(folder).weights.items()):
            state.update(json.dumps([name, shape.bits, shape.group_size, shape.shape, shape.is_symmetric]).encode())
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is no index of weight files ({error}); copy the model again") from error
    places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for name in names:
        path = folder / name
        try:
            start, header = _read_header(path)
        except (OSError, ValueError, struct.error) as error:
            raise InputError(f"{path} is no safetensors file ({error}); copy the model again") from error
        places |= {tensor: (path, start, entry) for tensor, entry in header.items() if tensor != "__metadata__"}
    for tensor in sorted(places):
        path, start, entry = places[tensor]
        try:
            first, last = entry["data_offsets"]
            _begin_tensor(state, tensor, entry["dtype"], entry["shape"])
            with path.open("rb") as file:
                file.seek(start + first)
                for i in range(first, last, _CHUNK_BYTES):
                    chunk = file.read(min(last - i, _CHUNK_BYTES))
                    if not chunk:
                        raise ValueError("it is shorter than its header says")
                    state.update(chunk)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is no safetensors file ({error}); copy the model again") from error
    return state.hexdigest()


def digest_model(model: PreTrainedModel) -> str:
    """As `digest_folder`, for a model in memory: what it would be after `save_pretrained`, where that keeps names."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tensors: Mapping[str, Tensor] = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    state = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        _begin_tensor(state, name, _SAFETENSORS_DTYPES[tensor.dtype], list(tensor.shape))
        state.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


_SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes start, and the header."""
    with path.open("rb") as file:
        (num_bytes,) = struct.unpack("<Q", file.read(8))
        if num_bytes > 100_000_000:
            raise ValueError(f"its header claims {num_bytes} bytes")
        header = json.loads(file.read(num_bytes))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return 8 + num_bytes, header


def _begin_tensor(state: Any, name: str, dtype: str, shape: list[int]) -> None:
    state.update(json.dumps([name, dtype, shape]).encode())
