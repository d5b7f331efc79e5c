"""The rules by name: a new one is a file, a test file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields

from cotune.errors import InputError
from cotune.federation.robust.bulyan import Bulyan
from cotune.federation.robust.clip_to_median_norm import ClipToMedianNorm
from cotune.federation.robust.leave_out_long import LeaveOutLong
from cotune.federation.robust.mean import Mean
from cotune.federation.robust.median import Median
from cotune.federation.robust.multi_krum import MultiKrum
from cotune.federation.robust.rule import RobustRule
from cotune.federation.robust.trimmed_mean import TrimmedMean

RULES: dict[
    str,
    type[Mean]
    | type[Median]
    | type[TrimmedMean]
    | type[MultiKrum]
    | type[Bulyan]
    | type[ClipToMedianNorm]
    | type[LeaveOutLong],
] = {
    "mean": Mean,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "multi_krum": MultiKrum,
    "bulyan": Bulyan,
    "clip_to_median_norm": ClipToMedianNorm,
    "leave_out_long": LeaveOutLong,
}
"""Name to class. Options are the class's fields."""


def rule_named(name: str, options: Mapping[str, object] | None = None) -> RobustRule:
    """Make a rule, as a configuration names it.

    Args:
        name: a key of `RULES`.
        options: its settings. The option `rule`, of a rule that wraps another, is a name, or a table with `name` and
            the options of that one.

    Raises:
        InputError: an unknown name or option, a missing option, or a bad value.

    Example:
        >>> rule_named("clip_to_median_norm", {"rule": {"name": "trimmed_mean", "share": 0.25}})
        ClipToMedianNorm(rule=TrimmedMean(share=0.25))
        >>> rule_named("krum")
        Traceback (most recent call last):
        ...
        cotune.errors.InputError: name is 'krum', expected one of mean, median, trimmed_mean, multi_krum, bulyan, \
clip_to_median_norm, leave_out_long
    """
    if name not in RULES:
        raise InputError(f"name is {name!r}, expected one of {', '.join(RULES)}")
    known = {field.name: field for field in fields(RULES[name])}
    given = dict(options or {})
    for option in given:
        if option not in known:
            expected = f"expected only {', '.join(known)}" if known else "it takes none"
            raise InputError(f"the rule {name} has no option {option!r}, {expected}; remove it or choose another rule")
    for option, field in known.items():
        if option not in given and field.default is MISSING:
            raise InputError(f"the rule {name} needs the option {option!r}, and it is missing; add it")
    if "rule" in given:
        given["rule"] = _inner_rule(name, given["rule"])
    made: RobustRule = RULES[name](**given)  # type: ignore[arg-type]
    return made


def _inner_rule(name: str, described: object) -> RobustRule:
    if isinstance(described, str):
        return rule_named(described)
    if isinstance(described, Mapping) and isinstance(described.get("name"), str):
        return rule_named(described["name"], {key: value for key, value in described.items() if key != "name"})
    raise InputError(
        f"rule of {name} is {described!r}, expected a name or a table with a name, such as "
        "{name = 'trimmed_mean', share = 0.2}"
    )
