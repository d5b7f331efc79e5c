"""The offline model folder: a small language model that a device runs by itself, without PyTorch.

    offline.json                        what it is, and the SHA-256 of every other file
    tokenizer.json                      how it reads text
    model.onnx, model.onnx.data         runtime `onnx`: graph and weights, which are mapped into memory
    model.gguf                          runtime `gguf`
    chat_template.jinja, tokenizer_config.json, genai_config.json, ...   where the source has them

`cotune compress --export` writes its description with `write_description`, devices read it with `OfflineFolder.open`.
Nothing in it is code. Sizes are checked before anything is read, and every file against its digest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cotune.errors import InputError

FORMAT = 1
DESCRIPTION_FILE = "offline.json"
TOKENIZER_FILE = "tokenizer.json"
MODEL_FILES = {"onnx": "model.onnx", "gguf": "model.gguf"}
"""The file of each runtime that must be there."""

MAX_DESCRIPTION_BYTES = 8 * 2**20
MAX_TOKENIZER_BYTES = 512 * 2**20
MAX_TEMPLATE_BYTES = 2**20
MAX_FILES = 64
MAX_MODULES = 16_384

_TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_PARTS = ("bos_token", "eos_token", "unk_token", "pad_token")
_MAX_TOKENIZER_CONFIG_BYTES = 16 * 2**20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
# The largest value of each count. Beyond them stands no model, but a file that was made to hurt.
_MOST = {
    "vocab_size": 2**24,
    "context": 2**24,
    "num_layers": 4096,
    "num_kv_heads": 4096,
    "head_dim": 2**16,
    "bits": 32,
}
_MAX_WIDTH = 2**24


@dataclass(frozen=True, kw_only=True)
class ModuleShape:
    """A linear module that takes an adapter: numbers in and out."""

    in_dim: int
    out_dim: int

    def __post_init__(self) -> None:
        for name in ("in_dim", "out_dim"):
            if not 1 <= getattr(self, name) <= _MAX_WIDTH:
                raise InputError(f"{name} of a module is {getattr(self, name)}, expected 1 to {_MAX_WIDTH}")


@dataclass(frozen=True, kw_only=True)
class OfflineDescription:
    """What `offline.json` says.

    Attributes:
        runtime: `onnx` or `gguf`.
        files: SHA-256, hex, of each file by its name.
        vocab_size: how many logits a position has.
        context: tokens that fit, prompt and answer together.
        num_layers, num_kv_heads, head_dim: shape of the cache of keys and values.
        bits: of a weight of its linear layers, 32 for float32.
        end_ids: tokens that end a text.
        bos_id: the token that begins one; None without.
        adapter_modules: by dotted name, which modules take a LoRA adapter at run time.
        source_digest: SHA-256, hex, of the model that it was made of.
        tokenizer_digest: SHA-256, hex, of `tokenizer.json`; a cloud with the same one reads the same tokens.

    Example:
        >>> description = OfflineDescription(
        ...     runtime="gguf", files={"model.gguf": "0" * 64, "tokenizer.json": "1" * 64}, vocab_size=258, context=128,
        ...     num_layers=2, num_kv_heads=2, head_dim=16, bits=8, end_ids=(257,), bos_id=256,
        ...     source_digest="2" * 64, tokenizer_digest="1" * 64)
        >>> OfflineDescription.from_json(description.to_json()) == description
        True
    """

    runtime: str
    files: Mapping[str, str]
    vocab_size: int
    context: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    bits: int
    end_ids: tuple[int, ...]
    bos_id: int | None
    adapter_modules: Mapping[str, ModuleShape] = field(default_factory=dict)
    source_digest: str
    tokenizer_digest: str

    def __post_init__(self) -> None:
        if self.runtime not in MODEL_FILES:
            raise InputError(f"runtime is {self.runtime!r:.80}, expected one of {', '.join(MODEL_FILES)}")
        for name, most in _MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 to {most}")
        self._check_files()
        tokens = (*self.end_ids, *(() if self.bos_id is None else (self.bos_id,)))
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise InputError(f"end_ids or bos_id name the token {token}, expected 0 to {self.vocab_size - 1}")
        if len(self.adapter_modules) > MAX_MODULES:
            raise InputError(f"adapter_modules has {len(self.adapter_modules)} entries, expected at most {MAX_MODULES}")
        for name in ("source_digest", "tokenizer_digest"):
            if not _DIGEST.fullmatch(getattr(self, name)):
                raise InputError(f"{name} is {getattr(self, name)!r:.80}, expected a SHA-256 in hex")
        if self.files[TOKENIZER_FILE] != self.tokenizer_digest:
            raise InputError(f"tokenizer_digest is not that of {TOKENIZER_FILE} in files; export the model again")

    def _check_files(self) -> None:
        if len(self.files) > MAX_FILES:
            raise InputError(f"files has {len(self.files)} entries, expected at most {MAX_FILES}")
        for name, digest in self.files.items():
            if not _NAME.fullmatch(name) or name == DESCRIPTION_FILE:
                raise InputError(f"files names {name!r:.80}, expected plain names of other files in the folder")
            if not _DIGEST.fullmatch(digest):
                raise InputError(f"files has {digest!r:.80} for {name}, expected a SHA-256 in hex")
        for name in (MODEL_FILES[self.runtime], TOKENIZER_FILE):
            if name not in self.files:
                raise InputError(f"files does not name {name}, which a {self.runtime} model needs; export it again")

    def reads_with(self, tokenizer_json: bytes) -> bool:
        """Whether these are the bytes of its tokenizer, so that its tokens are those of whoever else has them."""
        return hashlib.sha256(tokenizer_json).hexdigest() == self.tokenizer_digest

    def to_json(self) -> bytes:
        """The bytes of `offline.json`."""
        modules = {name: {"in": shape.in_dim, "out": shape.out_dim} for name, shape in self.adapter_modules.items()}
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        data = {"format": FORMAT, **plain, "files": dict(self.files), "end_ids": list(self.end_ids)}
        return (json.dumps({**data, "adapter_modules": modules}, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> OfflineDescription:
        """What `to_json` wrote.

        Raises:
            InputError: it is no such description; names the field.
        """
        try:
            parsed = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(f"it is no JSON ({error})") from error
        if not isinstance(parsed, dict):
            raise InputError(f"it holds a {type(parsed).__name__}, expected an object")
        if parsed.pop("format", None) != FORMAT:
            raise InputError(f"it is not of format {FORMAT}; use the cotune that wrote it, or export the model again")
        unknown = sorted(set(parsed) - {one.name for one in fields(cls)})
        if unknown:
            raise InputError(f"it has the field {unknown[0]!r:.80}, which format {FORMAT} does not know")
        end_ids = _entry(parsed, "end_ids", list)
        modules = _entry(parsed, "adapter_modules", dict)
        return cls(
            runtime=_entry(parsed, "runtime", str),
            files={name: _entry(parsed["files"], name, str) for name in _entry(parsed, "files", dict)},
            **{name: _entry(parsed, name, int) for name in _MOST},
            end_ids=tuple(_entry({"end_ids": token}, "end_ids", int) for token in end_ids),
            bos_id=_entry(parsed, "bos_id", int, type(None)),
            adapter_modules={
                name: ModuleShape(in_dim=_entry(shape, "in", int), out_dim=_entry(shape, "out", int))
                for name in modules
                for shape in (_entry(modules, name, dict),)
            },
            source_digest=_entry(parsed, "source_digest", str),
            tokenizer_digest=_entry(parsed, "tokenizer_digest", str),
        )


def _entry(data: Mapping[str, Any], name: str, *types: type) -> Any:
    value = data.get(name)
    if not isinstance(value, types) or isinstance(value, bool):
        expected = " or ".join("null" if one is type(None) else one.__name__ for one in types)
        raise InputError(f"it has {name[:80]} = {value!r:.80}, expected {expected}")
    return value


def digest_file(path: Path) -> str:
    """SHA-256, hex, of a file, which is read piece by piece.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_description(folder: Path, **about: Any) -> OfflineDescription:
    """Put `offline.json` to a model that is otherwise complete.

    Args:
        folder: with all other files, the tokenizer among them.
        **about: the fields of `OfflineDescription` but for `files` and `tokenizer_digest`, which the files give.

    Raises:
        InputError: a field is not what it should be, or a file that must be there is missing.
        OSError: the disk refuses.
    """
    files = {path.name: digest_file(path) for path in sorted(folder.iterdir())}
    description = OfflineDescription(files=files, tokenizer_digest=files.get(TOKENIZER_FILE, ""), **about)
    (folder / DESCRIPTION_FILE).write_bytes(description.to_json())
    return description


@dataclass(frozen=True, kw_only=True)
class OfflineFolder:
    """A folder whose files are all there and as they were written.

    Attributes:
        path: where it is.
        description: what `offline.json` says.
        tokenizer_json: the bytes of `tokenizer.json`.
        chat_template: the Jinja template that makes a prompt of a conversation; None where the model has none.
        special_tokens: by their part (`bos_token`, `eos_token`, ...), as templates name them.
    """

    path: Path
    description: OfflineDescription
    tokenizer_json: bytes
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def model_file(self) -> Path:
        """The file that the runtime opens."""
        return self.path / MODEL_FILES[self.description.runtime]

    @property
    def num_model_bytes(self) -> int:
        """Bytes of graph and weights on disk."""
        start = MODEL_FILES[self.description.runtime]
        return sum((self.path / name).stat().st_size for name in self.description.files if name.startswith(start))

    @classmethod
    def open(cls, path: Path | str) -> OfflineFolder:
        """Read an offline model folder; the weights are only looked through.

        Raises:
            InputError: the folder or a file is missing, too large, damaged, or not what it should be.

        Example:
            >>> OfflineFolder.open("my-model").description.context   # doctest: +SKIP
            2048
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(
                f"{path} is no folder, expected an offline model; make one with "
                f"`cotune compress MODEL --out {path} --export onnx`"
            )
        described = path / DESCRIPTION_FILE
        if not described.is_file():
            raise InputError(
                f"{path} has no {DESCRIPTION_FILE}, so it is no offline model{_guess(path)}; make one with "
                "`cotune compress MODEL --out DIR --export onnx`"
            )
        try:
            description = OfflineDescription.from_json(read_bounded(described, MAX_DESCRIPTION_BYTES))
        except InputError as error:
            raise InputError(f"{described} cannot be used: {error}") from error
        for name, digest in description.files.items():
            _check_digest(path / name, digest)
        settings = _tokenizer_settings(path, description.files)
        return cls(
            path=path,
            description=description,
            tokenizer_json=read_bounded(path / TOKENIZER_FILE, MAX_TOKENIZER_BYTES),
            chat_template=_chat_template(path, description.files, settings),
            special_tokens=_special_tokens(settings),
        )


def _guess(path: Path) -> str:
    if (path / "plugin.json").is_file():
        return " but a plugin"
    return " but a Hugging Face model" if (path / "config.json").is_file() else ""


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a file, whose size is looked at first.

    Raises:
        InputError: it is larger than `most` bytes, or cannot be read.
    """
    try:
        size = path.stat().st_size
        if size <= most:
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    raise InputError(f"{path} has {size} bytes, expected at most {most}; copy the folder again")


def _check_digest(path: Path, expected: str) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing, which {DESCRIPTION_FILE} names; copy the whole folder, or export again")
    try:
        found = digest_file(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if found != expected:
        raise InputError(
            f"{path} is damaged or another file: its SHA-256 is {found[:12]}, expected {expected[:12]}; "
            "copy the folder again, or export the model again"
        )


def _tokenizer_settings(path: Path, files: Mapping[str, str]) -> dict[str, Any]:
    """What transformers keeps beside a tokenizer; empty where it is not there."""
    if _TOKENIZER_CONFIG_FILE not in files:
        return {}
    config = path / _TOKENIZER_CONFIG_FILE
    data = read_bounded(config, _MAX_TOKENIZER_CONFIG_BYTES)
    try:
        settings = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{config} is no JSON ({error}); copy the folder again") from error
    if not isinstance(settings, dict):
        raise InputError(f"{config} holds a {type(settings).__name__}, expected an object; copy the folder again")
    return settings


def _chat_template(path: Path, files: Mapping[str, str], settings: Mapping[str, Any]) -> str | None:
    """From the file of its own, or from the tokenizer's settings, as transformers writes it."""
    if _TEMPLATE_FILE in files:
        data = read_bounded(path / _TEMPLATE_FILE, MAX_TEMPLATE_BYTES)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{path / _TEMPLATE_FILE} is no UTF-8 ({error}); copy the folder again") from error
    template = settings.get("chat_template")
    if template is not None and (not isinstance(template, str) or len(template) > MAX_TEMPLATE_BYTES):
        raise InputError(
            f"{path / _TOKENIZER_CONFIG_FILE} has a chat_template that is a {type(template).__name__}, expected one "
            f"string of at most {MAX_TEMPLATE_BYTES} characters; write it into {_TEMPLATE_FILE}"
        )
    return template


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in _SPECIAL_PARTS:
        value = settings.get(part)
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            found[part] = token
    return found
