"""Overrides: `--config.path.to.field=value`, applied to a config.

A field must exist and keeps its type. A call, a group or None may stand in the place of a call or a group, and a group
that holds any number of parts takes new ones:

    --config.sampling.solver=solvers.ddim(eta=0.5)              # another call, with arguments
    --config.sampling.solver.call=solvers.ddim                  # the same with its defaults
    --config.train.transforms.flip=data.flip(probability=0.5)   # a new entry of a group
    --config.sampling.transformations={}                        # no entry
    --config.sampling.transformations.guidance=None             # one entry left out
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax import reading
from diffusion_jax.config import parts
from diffusion_jax.config.calls import (
    MISSING,
    PLAIN,
    as_plain,
    call,
    has_calls,
    is_call,
    is_of_type,
    of_type,
    settable,
    takes_any_name,
)
from diffusion_jax.config.literals import LARGEST_EXACT, WrittenCall, is_call_name, is_call_text, read_value
from diffusion_jax.config.parts import constructor
from diffusion_jax.config.trust import written_by_user
from diffusion_jax.errors import InvalidInput, invalid, unknown

GROUPS_OF_PARTS = ("train.transforms", "ema", "sampling.transformations", "metrics")
"""Groups of any number of entries, each a call: an override may add one, and None leaves one out."""

LATER = (*GROUPS_OF_PARTS, "sampling.solver", "sampling.grid")
"""Entries that a config may lack, and which an override may give it."""


def apply_overrides(config: ConfigDict, assignments: Sequence[str]) -> ConfigDict:
    """Applies `path.to.field=value` assignments; a field must exist and keep its type.

    Values are Python literals and calls (`literals.read_value`); what is neither is a string. A call, a group or None
    may stand in the place of a call or a group; groups of parts and mappings take new entries that are calls. Raises
    InvalidInput naming the nearest field.
    """
    config = config.copy_and_resolve_references()
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise invalid("--config." + assignment, "", "an override reads --config.field=value")
        _assigned(config, (), path.split("."), Any, path, text)
    return config


def _assigned(old: Any, at: tuple[str, ...], rest: Sequence[str], takes: Any, path: str, text: str) -> Any:
    """What comes in the place of `old`, which stands at the path `at` and `takes` a type, when what lies at `rest`
    within it becomes `text`. ConfigDicts are changed in place."""
    if not rest:
        return _replaced(old, takes, f"--config.{path}", text)
    key, deeper = rest[0], rest[1:]
    replaceable = old is None or is_call(old) or (takes is not Any and isinstance(old, PLAIN))
    if key == "call" and not deeper and replaceable:
        return _called(text)
    where = ".".join(("config", *at))
    if old is None and _is_group(at, takes):
        old = ConfigDict()
    if isinstance(old, list | tuple):
        if not key.isdecimal() or int(key) >= len(old):
            raise invalid(f"--config.{path}", text, f"{key} is not the number of one of the {len(old)} entries")
        entry = ConfigDict(old[int(key)]) if isinstance(old[int(key)], Mapping) else old[int(key)]
        changed = as_plain(_assigned(entry, (*at, key), deeper, parts.within(takes), path, text))
        return type(old)([*old[: int(key)], changed, *old[int(key) + 1 :]])
    if old is None:
        raise invalid(f"--config.{path}", text, f"{where} is None; say first what it is: --{where}.call=NAME")
    if not isinstance(old, ConfigDict):
        raise invalid(f"--config.{path}", text, f"{where} has no fields of its own")
    if is_call(old):
        function = constructor(old["call"])
        parameters = inspect.signature(function).parameters
        inside, known = parts.taken_by(function, parameters.get(key)), [*old.keys(), *settable(parameters)]
        exists = key in old or key in known or takes_any_name(parameters)
    else:
        inside, known = parts.within(takes, key), list(old.keys())
        exists = key in old or _may_be_added((*at, key), deeper, takes, text)
    if not exists and not known:
        raise invalid(
            f"--config.{path}", text, f"{where} is empty; what is added to it is a call, NAME(argument=value)"
        )
    if not exists:
        raise unknown(f"a field of {where}", key, dict.fromkeys(known))
    # A part that is added may be given by its name alone.
    added = MISSING if key not in old and not deeper and not is_call(old) else None
    changed = _assigned(old.get(key, added), (*at, key), deeper, inside, path, text)
    with old.ignore_type(), old.unlocked():
        # In the place of None nothing is cast to the type that was there.
        old[key] = None
        old[key] = changed
    return old


def _may_be_added(at: tuple[str, ...], deeper: Sequence[str], takes: Any, text: str) -> bool:
    """Whether a group that takes a type may get the entry at the path `at`: where it is a call, and new ones belong."""

    if _ends_with(at, LATER):
        return True
    return at[-1] != "call" and _is_group(at[:-1], takes) and (bool(deeper) or is_call_text(text))


def _is_group(at: tuple[str, ...], takes: Any) -> bool:
    return _ends_with(at, GROUPS_OF_PARTS) or (takes is not Any and parts.holds(takes, Mapping))


def _ends_with(at: tuple[str, ...], places: Sequence[str]) -> bool:
    """Whether a path is, or ends with, one of `places`: a config may hold others, as those of studies do."""
    return any(f".{'.'.join(at)}".endswith(f".{place}") for place in places)


def _called(text: str) -> ConfigDict:
    value = read_value(text)
    return _entries(value) if isinstance(value, WrittenCall) else call(written_by_user(text))


def _entries(value: Any) -> Any:
    """What was read of a command line, with its calls as entries of a config."""
    match value:
        case WrittenCall(name=name, positional=positional, named=named):
            parameters = inspect.signature(constructor(written_by_user(name))).parameters
            first = [
                key for key, one in parameters.items() if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
            ]
            if len(positional) > len(first) or {*first[: len(positional)]} & {*named}:
                raise InvalidInput(
                    f"{name}(...) is given an argument twice, or too many: it takes {', '.join(parameters)}."
                )
            arguments = {**dict(zip(first, positional)), **named}
            return call(written_by_user(name), **{key: _entries(each) for key, each in arguments.items()})
        case Mapping() if isinstance(value.get("call"), str):
            rest = {key: _entries(each) for key, each in value.items() if key != "call"}
            return call(written_by_user(value["call"]), **rest)
        case Mapping():
            return {key: _entries(each) for key, each in value.items()}
        case list() | tuple():
            return type(value)(as_plain(_entries(each)) for each in value)
    return value


def _replaced(old: Any, takes: Any, field: str, text: str) -> Any:
    """The value that `text` writes, in the place of `old`, of the type that is taken there or else has been there."""
    named = is_call_name(text) and (is_call(old) or old is MISSING)
    value = call(written_by_user(text)) if named else _entries(read_value(text))
    old = None if old is MISSING else old
    if isinstance(value, Mapping | ConfigDict):
        if old is None or isinstance(old, ConfigDict) or (takes is not Any and is_call(value)):
            try:
                return ConfigDict(value)
            except Exception as error:  # names that no field can have
                raise invalid(field, text, f"its names must be those of fields ({reading.first_line(error)})") from None
    elif takes is not Any and not has_calls(value):
        return _of_taken_type(field, value, text, takes)
    elif value is None or old is None:
        return value
    if isinstance(old, ConfigDict):
        fields = f"set one of its fields ({', '.join(old.keys())})" if old.keys() else "it is empty"
        raise invalid(
            field, text, f"it is a group; {fields}, or put a call in its place: {field}='NAME(argument=value)'"
        )
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(old, str) and not isinstance(value, str | Mapping | ConfigDict):
        value = text
    if old is not None and type(old) is not type(value):
        raise invalid(field, text, f"expected {type(old).__name__}, as in {old!r}")
    return value


def _of_taken_type(field: str, value: Any, text: str, takes: Any) -> Any:
    """A plain value of the type of an argument: a whole number as the float that is needed, a word as it is written."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if number and abs(value) < LARGEST_EXACT and not is_of_type(value, takes) and is_of_type(float(value), takes):
        return float(value)
    if isinstance(value, tuple) and not is_of_type(value, takes) and is_of_type(list(value), takes):
        return list(value)
    if value is not None and not isinstance(value, str) and not is_of_type(value, takes) and is_of_type(text, takes):
        return text
    return of_type(field, value, takes)
