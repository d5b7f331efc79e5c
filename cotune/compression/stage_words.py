"""Stages as words: `NAME:VALUE,KEY=VALUE,...`, as a command line or a config has them.

    prune       METHOD:AMOUNT         depth:2   channels:0.25   wanda:2:4   sparse_gpt:0.5,damping=0.1
    distil      DIVERGENCE[:LAYERS]   forward   js:4,beta=0.1,epochs=5,on_policy_share=0.5
    quantise    METHOD:BITS           gptq:4    awq:3,group_size=64,max_clip=0   rtn:8,embedding_bits=none
    export      onnx[:BITS]           onnx      onnx:8,embedding_bits=4
                gguf[:KIND]           gguf:Q8_0 gguf:Q4_K_M

Keys are the fields of the classes behind, with numbers, true and false, and none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from cotune.compression.distil import DistilSettings
from cotune.compression.gguf_export import GgufExportConfig
from cotune.compression.onnx_export import OnnxExportConfig
from cotune.compression.prune import PRUNERS, pruner_named
from cotune.compression.pruner import Pruner
from cotune.compression.quantise import QUANTISERS, Quantiser, quantiser_named
from cotune.compression.stages import Distil, Export, Prune, Quantise, Stage
from cotune.compression.written_weights import Rounding
from cotune.distillation.divergences import DIVERGENCES, divergence_named
from cotune.errors import InputError

Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Words:
    """What was written of one stage.

    Example:
        >>> Words.read("prune", "wanda:2:4,needs_gram=false")
        Words(kind='prune', name='wanda', value='2:4', settings={'needs_gram': False})
    """

    kind: str
    name: str
    value: str | None
    settings: dict[str, Any]

    @classmethod
    def read(cls, kind: str, text: str) -> Words:
        """Split a text.

        Raises:
            InputError: a setting is no KEY=VALUE, or is there twice.
        """
        first, *rest = (part.strip() for part in text.split(","))
        name, colon, value = first.partition(":")
        settings: dict[str, Any] = {}
        for part in rest:
            key, equals, setting = part.partition("=")
            if not equals or not key or key in settings:
                raise InputError(f"{kind} is {text!r} with {part!r}, expected settings as KEY=VALUE, each once")
            settings[key] = _value(setting)
        return cls(kind=kind, name=name, value=value if colon else None, settings=settings)

    def take(self, make: type[Made], *, named: Iterable[str] = ()) -> Made:
        """An object of a dataclass with those of the settings that are its fields, which are used up.

        Args:
            make: a dataclass.
            named: fields that are not for settings.

        Raises:
            InputError: a setting is of another type than its field, or out of range.
        """
        chosen: dict[str, Any] = {}
        for field in dataclasses.fields(make):  # type: ignore[arg-type]
            if field.name in self.settings and field.name not in named:
                chosen[field.name] = self.pop(field.name, str(field.type))
        return make(**chosen)

    def pop(self, key: str, types: str) -> Any:
        """The value of a setting that is there, which is used up.

        Args:
            key: its name.
            types: what it may be, such as `int | None`.

        Raises:
            InputError: it is something else.
        """
        value = self.settings.pop(key)
        allowed = [kind.strip() for kind in types.split("|")]
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        found = "None" if value is None else type(value).__name__
        if found not in allowed and not (is_whole and "float" in allowed):
            raise InputError(f"{self.kind} {self.name} has {key}={value!r}, expected {' or '.join(allowed)}")
        return value

    def finish(self, known: Mapping[str, Any] | Iterable[str]) -> None:
        """Raise `InputError` where a setting was not used."""
        if self.settings:
            raise InputError(
                f"{self.kind} {self.name} has the setting {next(iter(self.settings))!r}, expected "
                f"{' or '.join(known) or 'none'}"
            )


def parse_stage(kind: str, text: str) -> Stage:
    """The stage that a text names.

    Args:
        kind: prune, distil, quantise or export.
        text: see above.

    Raises:
        InputError: an unknown method, which names the known ones; a value out of range; an unknown setting.

    Example:
        >>> parse_stage("prune", "depth:2").label, parse_stage("quantise", "awq:3").label
        ('prune depth 2', 'quantise awq 3 bits')
    """
    if kind not in _PARSERS:
        raise InputError(f"the stage is {kind!r}, expected one of {', '.join(_PARSERS)}")
    return _PARSERS[kind](Words.read(kind, text))


def _prune(words: Words) -> Stage:
    pruner_named(words.name)
    if words.value is None:
        raise InputError(f"prune {words.name} has no amount, expected one behind a colon, such as {_AMOUNTS}")
    make = PRUNERS[words.name]
    # Those of width are pruners themselves.
    known = [field.name for field in dataclasses.fields(make) if field.name not in ("hidden_size", "channels")]  # type: ignore[arg-type]
    how: Pruner = words.take(make, named=("hidden_size", "channels"))
    words.finish(known)
    return Prune(how=how, amount=words.value)


def _distil(words: Words) -> Stage:
    if words.name not in DIVERGENCES:
        raise InputError(f"distil is {words.name!r}, expected one of {', '.join(DIVERGENCES)}")
    beta = words.pop("beta", "float") if "beta" in words.settings else 0.5
    types = {"epochs": "int", "learning_rate": "float"}
    course = {key: words.pop(key, kind) for key, kind in types.items() if key in words.settings}
    loop = dataclasses.replace(DistilSettings().loop, **course)
    named = ("what", "divergence", "loop", "seed")
    known = [field.name for field in dataclasses.fields(DistilSettings) if field.name not in named]
    settings = words.take(DistilSettings, named=named)
    words.finish(["beta", "epochs", "learning_rate", *known])
    settings = dataclasses.replace(settings, divergence=divergence_named(words.name, beta=beta), loop=loop)
    return Distil(settings=settings, num_layers=None if words.value is None else _whole(words))


def _quantise(words: Words) -> Stage:
    quantiser_named(words.name)
    make = QUANTISERS[words.name]
    known = [field.name for field in dataclasses.fields(make)]  # type: ignore[arg-type]
    how: Quantiser = words.take(make)
    bits = Quantise.bits if words.value is None else _whole(words)
    named = ("how", "bits")
    stage = words.take(Quantise, named=named)
    words.finish([*known, *(field.name for field in dataclasses.fields(Quantise) if field.name not in named)])
    return dataclasses.replace(stage, how=how, bits=bits)


def _export(words: Words) -> Stage:
    if words.name not in ("onnx", "gguf"):
        raise InputError(f"export is {words.name!r}, expected onnx or gguf")
    if words.name == "gguf":
        gguf = words.take(GgufExportConfig, named=("kind",))
        words.finish(("embedding_kind", "context"))
        return Export(config=gguf if words.value is None else dataclasses.replace(gguf, kind=words.value))
    bits = None if words.value is None else _whole(words)
    rounding = words.take(Rounding, named=("bits",))
    config = words.take(OnnxExportConfig, named=("rounding", "adapter_modules"))
    words.finish(("embedding_bits", "group_size", "is_symmetric", "activation_bits", "context"))
    return Export(config=dataclasses.replace(config, rounding=dataclasses.replace(rounding, bits=bits)))


_AMOUNTS = "depth:2, channels:0.25 or wanda:2:4"
_PARSERS: dict[str, Callable[[Words], Stage]] = {
    Prune.kind: _prune,
    Distil.kind: _distil,
    Quantise.kind: _quantise,
    Export.kind: _export,
}


def _whole(words: Words) -> int:
    value = words.value or ""
    if not value.isdecimal() or len(value) > 9:
        raise InputError(f"{words.kind} {words.name} has {value!r} behind the colon, expected a whole number")
    return int(value)


def _value(text: str) -> Any:
    """A setting as Python has it.

    Example:
        >>> [_value(text) for text in ("3", "0.1", "true", "none", "fast")]
        [3, 0.1, True, None, 'fast']
    """
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
