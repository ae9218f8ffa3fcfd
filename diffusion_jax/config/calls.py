"""Configs: ml_collections trees whose entries are constructor calls.

`call("models.dit", width=384)` is the call `diffusion_jax.models.dit(width=384)` written down as data: a `ConfigDict`
with the name under `call` and every argument under its own name, defaults included, so that each can be overridden
on the command line (calls within a tuple by their number, `model.conditions.0.num_classes=10`). `build` makes it. There
is no second set of option names anywhere, and a wrong name or type is told before anything is compiled. A part of the
user's own is named with its module: `call("my_package.parts:my_solver")` (`trust`).
"""

import importlib.util
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from beartype.door import is_bearable
from beartype.roar import BeartypeException

from diffusion_jax import reading
from diffusion_jax.config import parts
from diffusion_jax.config.parts import constructor
from diffusion_jax.config.shipped import config_file
from diffusion_jax.config.trust import trusting, written_by_user
from diffusion_jax.errors import InvalidInput, invalid, unknown

ConfigDict = ml_collections.ConfigDict

PLAIN = (bool, int, float, str, tuple, list, dict, type(None))
OF_FLAX = ("parent", "name")
MISSING = object()


def call(name: str, /, **arguments: Any) -> ConfigDict:
    """A constructor call as data; arguments left out appear with the constructor's own defaults.

    Raises InvalidInput for a name that is not public, or an argument that the constructor does not take.
    """
    name = written_by_user(name)
    entry = ConfigDict({"call": name}, convert_dict=True)
    parameters = inspect.signature(constructor(name)).parameters
    _check_names(name, arguments, parameters)
    for key, parameter in parameters.items():
        default = parameter.default
        if key in arguments:
            entry[key] = arguments[key]
        elif key in settable(parameters) and default is not parameter.empty and isinstance(default, PLAIN):
            entry[key] = default
    for key, value in arguments.items():
        if key not in parameters:
            entry[key] = value
        if isinstance(value, list | tuple):
            # Plain data, so that `to_dict` is plain all the way down.
            entry[key] = type(value)(each.to_dict() if isinstance(each, ConfigDict) else each for each in value)
    return entry


def build(entry: Any, takes: Any = Any, field: str = "", /, **context: Any) -> Any:
    """Makes what `entry` describes; entries inside its arguments are made first.

    takes: the type that is needed here, as an annotation; arguments take what their constructors' annotations say, and
        all of it is checked before anything is made (`check_entry`). field: what messages call the entry.
    context: objects that a config cannot hold (the network, the process, the mesh). Each is handed to the
    constructor when it takes an argument of that name which the entry does not give.
    Values that are not entries are returned as they are (ConfigDicts as dicts).
    """
    check_entry(entry, takes, field)
    return _built(entry, takes, field, context)


def check_entry(entry: Any, takes: Any, field: str) -> None:
    """Raises InvalidInput, naming `field` or what lies within, where calls do not exist or make something else than
    their places take, and where plain values are of a wrong type. Nothing is built.
    """
    if not is_call(entry):
        inside = _taken_inside(entry, takes)
        if inside is None:
            parts.check_value(field, as_plain(entry), takes)
        for key, value in _items(entry):
            check_entry(value, Any if inside is None else inside[key], f"{field}.{key}")
        return
    name = entry["call"]
    function = constructor(name)
    parts.check_made(field or "the entry", name, function, takes)
    parameters = inspect.signature(function).parameters
    given = {key: value for key, value in entry.items() if key != "call"}
    _check_names(name, given, parameters)
    for key, value in given.items():
        where, wanted = f"{field or name}.{key}", parts.taken_by(function, parameters.get(key))
        if has_calls(value):
            check_entry(value, wanted, where)
        else:
            of_type(where, as_plain(value), wanted)


def is_call(entry: Any) -> bool:
    """Whether an entry of a config is a call: what it holds under `call` is the name."""
    return isinstance(entry, ConfigDict | Mapping) and "call" in entry


def _items(entry: Any) -> list[tuple[Any, Any]]:
    """The entries of a group or of a list, by name or by number."""
    if isinstance(entry, ConfigDict | Mapping):
        return list(entry.items())
    return list(enumerate(entry)) if isinstance(entry, list | tuple) else []


def has_calls(entry: Any) -> bool:
    """Whether an entry is a call, or holds one."""
    return is_call(entry) or any(has_calls(value) for _, value in _items(entry))


def _taken_inside(entry: Any, takes: Any) -> dict[Any, Any] | None:
    """What each entry of a group or a list takes; None where the place takes no group, or no list."""
    named = isinstance(entry, ConfigDict | Mapping)
    if takes is not Any and not parts.holds(takes, Mapping if named else Sequence):
        return None
    return {key: parts.within(takes, key if named else None) for key, _ in _items(entry)}


def as_plain(entry: Any) -> Any:
    """A ConfigDict as a dict; any other value as it is."""
    return entry.to_dict() if isinstance(entry, ConfigDict) else entry


def _built(entry: Any, takes: Any, field: str, context: Mapping[str, Any]) -> Any:
    if not is_call(entry):
        if isinstance(entry, list | tuple):
            inside = parts.within(takes)
            return type(entry)(_built(value, inside, f"{field}.{i}", context) for i, value in _items(entry))
        if isinstance(entry, ConfigDict | Mapping):
            return {
                key: _built(value, parts.within(takes, key), f"{field}.{key}", context) for key, value in _items(entry)
            }
        return entry
    name, function = entry["call"], constructor(entry["call"])
    parameters = inspect.signature(function).parameters
    arguments = {}
    for key, value in entry.items():
        if key != "call":
            where, wanted = f"{field or name}.{key}", parts.taken_by(function, parameters.get(key))
            arguments[key] = of_type(where, _built(value, wanted, where, context), wanted)
    for key, value in context.items():
        if key in parameters and arguments.get(key) is None:
            arguments[key] = value
    for key, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if key not in arguments and not optional:
            raise InvalidInput(f"{field or name}: {name} needs the argument {key!r}, which the config does not give.")
    try:
        made = function(**arguments)
    except InvalidInput:
        raise
    except Exception as error:
        told = f"{type(error).__name__}: {reading.first_line(error)}"
        raise InvalidInput(f"{field or name}: {name} cannot be made of these arguments ({told}).") from error
    if parts.fits(parts.made_by(function), takes) is None and not is_of_type(made, takes):
        raise invalid(field or "the entry", name, f"it makes a {type(made).__name__}, not {parts.described_as(takes)}")
    return made


def _check_names(name: str, arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    if takes_any_name(parameters):
        return
    for key in arguments:
        if key not in parameters:
            raise unknown(f"an argument of {name}", key, settable(parameters))


def takes_any_name(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a constructor of these parameters takes arguments of any name, `**fields`."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def settable(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """The names of the arguments that a config can give: not those by which flax modules find each other."""
    return [name for name in parameters if "parent" not in parameters or name not in OF_FLAX]


def of_type(field: str, value: Any, hint: Any) -> Any:
    """Plain values are checked against the constructor's annotation; an int will do for a float, a list (of a stored
    config) for a tuple, which it becomes."""
    if (isinstance(value, float) and value != value) or (isinstance(value, int) and abs(value) >= 2**63):
        raise invalid(field, value, "a number is needed that 64 bits can hold")
    if hint is Any or not isinstance(value, PLAIN):
        return value
    as_float = float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(value, bool) or parts.takes_bool(hint):
        if parts.interfaces_only(hint):
            # A dict has a length and entries, and is no source of examples for that.
            parts.check_value(field, value, hint)
        if is_of_type(value, hint) or is_of_type(as_float, hint):
            return value
        if isinstance(value, list) and is_of_type(tuple(value), hint):
            return tuple(value)
    raise invalid(field, value, f"expected {parts.described_as(hint)}")


def is_of_type(value: Any, hint: Any) -> bool:
    """Whether `value` is of a type; true of types that cannot be looked for in a value."""
    try:
        return is_bearable(value, hint)
    except BeartypeException:
        return True


def load(path: str, trust: Sequence[str] = ()) -> ConfigDict:
    """Reads a config: the name of a shipped one (`digits_dit`, `toy2d:two_moons`, `recipes/sdp`), a Python file with
    `get_config(variant=None)` (`my/config.py:B/4` passes a variant), or a `config.json` that a run has stored.

    trust: packages whose functions and classes a stored config may call (`trust`). A Python file is code, and needs no
        trust. Raises InvalidInput where there is no config, and for a stored one that calls other code.
    """
    file, _, variant = str(path).partition(":")
    file = str(config_file(file))
    if file.endswith(".json"):
        return _from_json(reading.read_json(file), file, trust)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise invalid("config", file, "expected a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise invalid("config", file, "the file must define get_config()")
    takes_variant = bool(inspect.signature(module.get_config).parameters)
    if variant and not takes_variant:
        raise invalid("config", path, "this config has no variants; leave out what follows the colon")
    return module.get_config(variant) if variant else module.get_config()


def _from_json(stored: Mapping[str, Any], where: str, trust: Sequence[str]) -> ConfigDict:
    """A stored config. It is data: it may call constructors of parts (`parts`), those of the packages that are trusted,
    and nothing else.

    Raises InvalidInput, naming `where`, for names that no config has.
    """
    stored = trusting(stored, trust, where)
    try:
        return ConfigDict(stored)
    except Exception as error:  # names with dots, mostly
        raise InvalidInput(f"{where} is no config: {reading.first_line(error)}.") from None


def to_json(config: ConfigDict) -> str:
    """The config as JSON, which `load` reads back."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The fields in which two configs, as dicts that JSON can hold, differ: "model.width (was 64, is 32)"."""
    was, now = (_fields(json.loads(json.dumps(tree))) for tree in (stored, given))
    return [
        f"{name} (was {was.get(name, 'absent')!r}, is {now.get(name, 'absent')!r})"
        for name in sorted(was.keys() | now.keys())
        if was.get(name, "absent") != now.get(name, "absent")
    ]


def _fields(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {
        name: value
        for key, entry in tree.items()
        for name, value in _fields(entry, f"{prefix}.{key}" if prefix else str(key)).items()
    }
