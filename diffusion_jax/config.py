"""Configs: ml_collections trees whose entries are constructor calls.

`call("models.DiT", width=384)` is the call `diffusion_jax.models.DiT(width=384)` written down as data: a `ConfigDict`
with the name under `call` and every argument under its own name, defaults included, so that each can be overridden
on the command line (calls within a tuple by their number, `model.conditions.0.num_classes=10`). `build` makes it. There
is no second set of option names anywhere, and a wrong name or type is told before anything is compiled.
"""

import ast
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from beartype.door import is_bearable

from diffusion_jax.errors import InvalidInput, invalid, unknown

ConfigDict = ml_collections.ConfigDict

PLAIN = (bool, int, float, str, tuple, list, dict, type(None))


def constructor(name: str) -> Callable[..., Any]:
    """The public object `diffusion_jax.<name>`: `"solvers.ddim"`, or one file deeper, `"training.ema.power"`."""
    path, _, attribute = str(name).rpartition(".")
    root = Path(__file__).parent
    packages = sorted(p.parent.name for p in root.glob("*/__init__.py"))
    package, _, file = path.partition(".")
    if package not in packages:
        raise unknown(f"the package of call {name!r}", package, packages)
    module = importlib.import_module(f"diffusion_jax.{package}")
    if file:
        files = sorted(p.stem for p in (root / package).glob("*.py") if p.stem != "__init__")
        if file not in files:
            raise unknown(f"the file of call {name!r}", file, files)
        module = importlib.import_module(f"diffusion_jax.{path}")
    public = getattr(module, "__all__", None) or _own_functions(module)
    if attribute not in public:
        raise unknown(f"call {name!r}", attribute, public)
    return getattr(module, attribute)


def _own_functions(module: Any) -> list[str]:
    """The public functions and classes that a file defines itself."""
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def call(name: str, /, **arguments: Any) -> ConfigDict:
    """A constructor call as data; arguments left out appear with the constructor's own defaults.

    Raises InvalidInput for a name that is not public, or an argument that the constructor does not take.
    """
    entry = ConfigDict({"call": name}, convert_dict=True)
    parameters = inspect.signature(constructor(name)).parameters
    _check_names(name, arguments, parameters)
    for key, parameter in parameters.items():
        default = parameter.default
        if key in arguments:
            entry[key] = arguments[key]
        elif default is not inspect.Parameter.empty and isinstance(default, PLAIN) and key not in ("parent", "name"):
            entry[key] = default
    for key, value in arguments.items():
        if key not in parameters:
            entry[key] = value
        if isinstance(value, list | tuple):
            # Plain data, so that `to_dict` is plain all the way down.
            entry[key] = type(value)(each.to_dict() if isinstance(each, ConfigDict) else each for each in value)
    return entry


def build(entry: Any, **context: Any) -> Any:
    """Makes what `entry` describes; entries inside its arguments are made first.

    context: objects that a config cannot hold (the network, the process, the mesh). Each is handed to the
    constructor when it takes an argument of that name which the entry does not give.
    Values that are not entries are returned as they are (ConfigDicts as dicts).
    """
    if isinstance(entry, (list, tuple)):
        return type(entry)(build(value, **context) for value in entry)
    if not isinstance(entry, (ConfigDict, Mapping)):
        return entry
    if "call" not in entry:
        return {key: build(value, **context) for key, value in entry.items()}
    name = entry["call"]
    function = constructor(name)
    parameters = inspect.signature(function).parameters
    arguments = {key: build(value, **context) for key, value in entry.items() if key != "call"}
    _check_names(name, arguments, parameters)
    for key, value in context.items():
        if key in parameters and arguments.get(key) is None:
            arguments[key] = value
    for key, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if key not in arguments and not optional:
            raise InvalidInput(f"{name} needs the argument {key!r}, which the config does not give.")
    for key, value in arguments.items():
        arguments[key] = _of_type(f"{name}.{key}", value, parameters.get(key))
    return function(**arguments)


def _check_names(name: str, arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key in arguments:
        if key not in parameters:
            raise unknown(f"an argument of {name}", key, (p for p in parameters if p not in ("parent", "name")))


def _takes(name: str, key: str) -> bool:
    """Whether the constructor takes an argument that its entry may have left out."""
    parameters = inspect.signature(constructor(name)).parameters
    return key in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _of_type(field: str, value: Any, parameter: inspect.Parameter | None) -> Any:
    """Plain values are checked against the constructor's annotation; an int will do for a float, a list (of a stored
    config) for a tuple, which it becomes."""
    if parameter is None or parameter.annotation is parameter.empty or not isinstance(value, PLAIN):
        return value
    hint = parameter.annotation
    as_float = float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if is_bearable(value, hint) or is_bearable(as_float, hint):
        return value
    if isinstance(value, list) and is_bearable(tuple(value), hint):
        return tuple(value)
    raise invalid(field, value, f"expected {getattr(hint, '__name__', None) or str(hint).replace('typing.', '')}")


def load(path: str) -> ConfigDict:
    """Reads a config: a Python file with `get_config(variant=None)` (`configs/imagenet_dit.py:B/4` passes a variant),
    or a `config.json` that a run has stored."""
    file, _, variant = str(path).partition(":")
    if not Path(file).is_file():
        near = sorted(str(p) for p in Path(file).parent.glob("*.py")) if Path(file).parent.is_dir() else []
        if near:
            raise unknown("config", file, near)
        raise invalid("config", file, "expected an existing Python file with get_config()")
    if file.endswith(".json"):
        try:
            return ConfigDict(json.loads(Path(file).read_text(encoding="utf-8")))
        except ValueError as error:
            raise InvalidInput(f"{file} is not JSON ({error}).") from None
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


def apply_overrides(config: ConfigDict, assignments: Sequence[str]) -> ConfigDict:
    """Applies `path.to.field=value` assignments; a field must exist and keep its type.

    Values are Python literals; what is not one is taken as a string. Raises InvalidInput naming the nearest field.
    """
    config = config.copy_and_resolve_references()
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise invalid("--config." + assignment, "", "an override reads --config.field=value")
        *parents, last = path.split(".")
        node: Any = config
        for depth, key in enumerate([*parents, last]):
            if not isinstance(node, ConfigDict):
                raise invalid("--config." + path, text, f"{'.'.join(parents[:depth])} has no fields of its own")
            if depth == len(parents) and "call" in node and _takes(node["call"], key):
                node[key] = node.get(key)
            if key not in node:
                where = ".".join(["config", *parents[:depth]])
                raise unknown(f"a field of {where}", key, node.keys())
            if depth < len(parents):
                node, before = node[key], node
                if isinstance(node, list | tuple) and parents[depth + 1 :]:
                    before[key] = _within(node, parents[depth + 1], parents[depth + 2 :], last, path, text)
                    break
        if isinstance(node, list | tuple):
            continue
        if last == "call":
            value = text
            for stale in [key for key in node if key != "call"]:
                del node[stale]
            for key, default in call(text).items():
                node[key] = default
            continue
        value = _literal(text)
        old = node[last]
        if isinstance(old, ConfigDict) and value is not None:
            raise invalid("--config." + path, text, f"it is a group; set one of its fields: {', '.join(old.keys())}")
        if isinstance(old, float) and type(value) is int:
            value = float(value)
        if isinstance(old, tuple) and isinstance(value, list):
            value = tuple(value)
        if isinstance(old, str) and not isinstance(value, str) and value is not None:
            value = text
        if old is not None and value is not None and type(old) is not type(value):
            raise invalid("--config." + path, text, f"expected {type(old).__name__}, as in {old!r}")
        with node.ignore_type():
            node[last] = value
    return config


def _within(entries: Any, number: str, parents: Sequence[str], last: str, path: str, text: str) -> Any:
    """`entries` of a tuple with a field of one of them changed, as `override` does it."""
    if not number.isdigit() or int(number) >= len(entries) or not isinstance(entries[int(number)], Mapping):
        raise invalid("--config." + path, text, f"{number} is not the number of one of the {len(entries)} entries")
    changed = apply_overrides(ConfigDict(entries[int(number)]), [".".join([*parents, last]) + "=" + text])
    return type(entries)([*entries[: int(number)], changed.to_dict(), *entries[int(number) + 1 :]])


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


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
