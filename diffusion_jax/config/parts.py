"""Which constructors a config may call, what each makes, and whether that is what a place takes.

What a constructor makes is its annotated return type (a class makes itself); what a place takes is the annotation of
the argument that it is, or what `experiment` says of an entry of its own. So a part needs no registration: it is
compared before anything is built. Constructors that write files or act in another way are not configurable: they are
in packages that hold no parts (`training.logging`, `interop`, ...) or return nothing that a config could hold.
Constructors outside of this library are compared in the same way; which of them may be imported is said by `trust`.
"""

import collections
import collections.abc
import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Union

import jax
import numpy as np
from jaxtyping import AbstractArray
from typing_extensions import get_protocol_members, is_protocol

from diffusion_jax.config.trust import is_outside, outside_constructor
from diffusion_jax.errors import InvalidInput, invalid, listed, nearest, shortened, unknown

CONFIGURABLE = (
    "acceleration",
    "adapters",
    "data",
    "denoisers",
    "distributed",
    "metrics",
    "models",
    "objectives",
    "processes",
    "quantization",
    "solvers",
    "streaming",
    "timesteps",
    "training.ema",
    "training.optimizers",
)
"""Where the parts of a config come from: their constructors are functions of their arguments that write nothing."""

NO_PARTS = (type(None), str, bytes, Path, bool, int, float)
"""What constructors of parts do not return: a function of which this is the result was written to do something."""


def constructor(name: Any) -> Callable[..., Any]:
    """The public object `diffusion_jax.<name>`: `"solvers.ddim"`, or one file deeper, `"training.ema.power"`; or one
    outside of this library, `"my_package.parts:my_solver"`, where `trust` lets it be imported.

    Raises InvalidInput for what does not exist, may not be imported, or makes no part.
    """
    if not isinstance(name, str):
        raise invalid("call", name, "the name of a constructor is needed, such as 'solvers.ddim'")
    found = outside_constructor(name) if is_outside(name) else _public(name)
    try:
        inspect.signature(found)
        part = typing.get_origin(found) is None and made_by(found) not in NO_PARTS
    except (TypeError, ValueError):  # no callable, or written in C and silent about its arguments
        part = False
    if not part:
        raise InvalidInput(f"call {name!r} makes no part of a config, and a config may call nothing else.")
    return found


def _public(name: str) -> Any:
    path, _, attribute = name.rpartition(".")
    root = Path(__file__).parent.parent
    package, dot, file = path.partition(".")
    packages = sorted({known.partition(".")[0] for known in CONFIGURABLE})
    if package not in packages:
        told = unknown(f"the package of call {name!r}", package, packages)
        raise InvalidInput(f"{told} A part of your own is named 'package.module:name'.")
    module = importlib.import_module(f"diffusion_jax.{package}")
    if dot:
        files = sorted(p.stem for p in (root / package).glob("*.py") if p.stem != "__init__")
        if file not in files:
            raise unknown(f"the file of call {name!r}", file, files)
        module = importlib.import_module(f"diffusion_jax.{path}")
    if package not in CONFIGURABLE and path not in CONFIGURABLE:
        places = [known for known in CONFIGURABLE if known.startswith(f"{package}.")]
        raise InvalidInput(f"call {name!r} is no part of a config: those of {package} are in {' and '.join(places)}.")
    public = public_names(module)
    if attribute not in public:
        raise unknown(f"call {name!r}", attribute, public)
    return getattr(module, attribute)


def public_names(module: Any) -> list[str]:
    """What `module` gives away: `__all__`, or the functions and classes that it defines itself."""
    return getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def made_by(function: Callable[..., Any]) -> Any:
    """What calling `function` makes: the class itself, or the return annotation; Any where there is none."""
    if isinstance(function, type):
        return function
    hint = _annotation(function, "return", inspect.signature(function).return_annotation)
    return type(None) if hint is None else hint


def taken_by(function: Callable[..., Any], parameter: inspect.Parameter | None) -> Any:
    """What an argument of `function` takes: its annotation; Any where there is none."""
    return Any if parameter is None else _annotation(function, parameter.name, parameter.annotation)


def _annotation(function: Callable[..., Any], name: str, hint: Any) -> Any:
    if isinstance(hint, str):
        try:
            hint = typing.get_type_hints(function).get(name, Any)
        except (NameError, TypeError, AttributeError):
            return Any
    return Any if hint is inspect.Parameter.empty else hint


def within(wanted: Any, key: Any = None) -> Any:
    """What a place of type `wanted` takes as an entry of a list or a tuple, or under `key` of a dict."""
    found = [_entry(option, key) for option in _options(wanted)]
    found = [option for option in found if option is not None]
    return Union[tuple(found)] if found else Any  # noqa: UP007


def _entry(wanted: Any, key: Any) -> Any:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if not isinstance(origin, type) or not arguments:
        return None
    if issubclass(origin, collections.abc.Mapping):
        return arguments[1] if key is not None else None
    if issubclass(origin, collections.abc.Sequence) and key is None:
        return Union[tuple(each for each in arguments if each is not Ellipsis)]  # noqa: UP007
    return None


def _options(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (Union, types.UnionType)
    return tuple(option for each in typing.get_args(hint) for option in _options(each)) if union else (hint,)


def interfaces_only(hint: Any) -> bool:
    """Whether a place takes nothing but interfaces (protocols), and None perhaps: no plain value is one of those."""
    found = [option for option in _options(hint) if option is not type(None)]
    return bool(found) and all(isinstance(option, type) and is_protocol(option) for option in found)


def fits(made: Any, wanted: Any) -> bool | None:
    """Whether what is `made` is what is `wanted`, both annotations; None where that cannot be told from them."""
    if wanted in (Any, object):
        return True
    answers = [_fits(one, other) for one in _options(made) for other in _options(wanted)]
    return True if True in answers else None if None in answers else False


def _fits(made: Any, wanted: Any) -> bool | None:
    if made is Any or isinstance(made, typing.TypeVar):
        return None
    if wanted in (Any, object):
        return True
    if _is_array(made) or _is_array(wanted):
        return _is_array(made) and _is_array(wanted) and _same_numbers(made, wanted)
    made_class, wanted_class = typing.get_origin(made) or made, typing.get_origin(wanted) or wanted
    if wanted_class is collections.abc.Callable:
        return _same_function(made, wanted) if made_class is collections.abc.Callable else callable_class(made_class)
    if made_class is collections.abc.Callable:
        return False
    if not isinstance(made_class, type) or not isinstance(wanted_class, type):
        return None
    if is_protocol(wanted_class):
        # Every tuple has a length and entries: a solver is no source of examples for that.
        named = {*dir(made_class), *getattr(made_class, "__annotations__", {})}
        return not issubclass(made_class, tuple | dict | list | str) and get_protocol_members(wanted_class) <= named
    return issubclass(made_class, wanted_class)


def callable_class(kind: Any) -> bool:
    """Whether objects of a class can be called."""
    return isinstance(kind, type) and any("__call__" in vars(base) for base in kind.__mro__)


def _same_function(made: Any, wanted: Any) -> bool:
    """Whether two `Callable[[A, B], C]` can be the same: as many arguments, and equal ones where both say which."""
    one, other = typing.get_args(made), typing.get_args(wanted)
    if not one or not other or Ellipsis in (one[0], other[0]):
        return True
    if len(one[0]) != len(other[0]):
        return False
    return all(Any in (a, b) or a == b for a, b in zip([*one[0], one[1]], [*other[0], other[1]]))


def _same_numbers(made: Any, wanted: Any) -> bool:
    """Whether two arrays can hold the same kind of numbers, where both say which: floats are no booleans."""
    one, other = getattr(made, "dtypes", None), getattr(wanted, "dtypes", None)
    return not isinstance(one, list | tuple) or not isinstance(other, list | tuple) or bool({*one} & {*other})


def _is_array(hint: Any) -> bool:
    kind = typing.get_origin(hint) or hint
    return isinstance(kind, type) and issubclass(kind, AbstractArray | jax.Array | np.ndarray)


def described_as(hint: Any) -> str:
    """A type as a message calls it: "a Solver", "a function (Step) -> Any", "an array", joined by "or"."""
    if _is_array(hint):
        return "an array"
    options = _options(hint)
    if len(options) > 1:
        names = dict.fromkeys(described_as(option) for option in options if option is not type(None))
        return " or ".join(names)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is collections.abc.Callable:
        taken = ", ".join(map(_short, arguments[0])) if arguments and arguments[0] is not Ellipsis else "..."
        return f"a function ({taken}) -> {_short(arguments[1]) if arguments else 'Any'}"
    name = _short(hint)
    return f"{'an' if name[:1] in 'AEIOUaeio' else 'a'} {name}"


def _short(hint: Any) -> str:
    plain = isinstance(hint, type) and not typing.get_args(hint)
    return re.sub(r"(\w+\.)+(?=\w)", "", hint.__name__ if plain else str(hint))


def takes_bool(hint: Any) -> bool:
    """Whether an argument takes True and False: not where they would pass for 1 and 0."""
    return any(option not in (int, float, str, complex, type(None)) for option in _options(hint))


def takes_none(hint: Any) -> bool:
    """Whether a place takes None."""
    return type(None) in _options(hint)


def parts_of(wanted: Any) -> list[str]:
    """The names of the constructors that make what is wanted, those of the package that has most of them first."""
    places = [option for option in _options(wanted) if option not in NO_PARTS]
    made = {}
    for path in CONFIGURABLE:
        module = importlib.import_module(f"diffusion_jax.{path}")
        for name in public_names(module):
            if _makes(getattr(module, name)):
                made[f"{path}.{name}"] = made_by(getattr(module, name))
    functions = [option for option in places if typing.get_origin(option) is collections.abc.Callable]
    arrays = [_shape_and_numbers(option) for option in places if _is_array(option)]
    exact = [
        name for name, one in made.items() if one in functions or (_is_array(one) and _shape_and_numbers(one) in arrays)
    ]
    found = exact or [name for name, one in made.items() if any(fits(one, each) for each in places)]
    counts = collections.Counter(name.rpartition(".")[0] for name in found)
    return sorted(found, key=lambda name: (-counts[name.rpartition(".")[0]], name))


def _shape_and_numbers(hint: Any) -> tuple[Any, ...]:
    """What an annotation says of arrays, whichever library makes them."""
    return getattr(hint, "dim_str", None), *(getattr(hint, "dtypes", None) or ())


def _makes(function: Any) -> bool:
    """Whether a public name is a constructor that a config can call: interfaces are made from Python."""
    if isinstance(function, type):
        # Flax modules are within what `models` makes.
        return dataclasses.is_dataclass(function) and "parent" not in function.__dataclass_fields__
    return isinstance(function, types.FunctionType) and made_by(function) not in (*NO_PARTS, Any)


def check_made(field: str, name: str, function: Callable[..., Any], wanted: Any) -> None:
    """Raises InvalidInput where the constructor `name` is known to make something else than its place takes."""
    made = made_by(function)
    if fits(made, wanted) is False:
        raise InvalidInput(
            f"{field} is the call {name!r}, which makes {described_as(made)}, but {described_as(wanted)} is needed; "
            f"{_choices(name, wanted)}"
        )


def _choices(name: str, wanted: Any) -> str:
    valid = parts_of(wanted)
    if not valid:
        return "no constructor makes one: give it from Python."
    near = [choice for choice in valid if choice.rpartition(".")[0] == valid[0].rpartition(".")[0]]
    match = nearest(name, near) or nearest(name.rpartition(".")[2], near)
    hint = f"did you mean {match!r}? " if match else ""
    return f"{hint}Valid: {listed(name, valid)}."


def holds(wanted: Any, kind: type) -> bool:
    """Whether a place of type `wanted` takes a group (kind Mapping) or a list (Sequence) of entries."""
    for option in _options(wanted):
        origin = typing.get_origin(option) or (option if option in (dict, list, tuple) else None)
        if isinstance(origin, type) and issubclass(origin, kind):
            return True
    return kind is collections.abc.Sequence and any(map(_is_array, _options(wanted)))


def check_value(field: str, value: Any, wanted: Any) -> None:
    """Raises InvalidInput for a plain value where the call of a constructor is needed, and for None where it is not
    among what is wanted."""
    if wanted is Any or any(option in NO_PARTS and isinstance(value, option) for option in _options(wanted)):
        return
    if value is None or isinstance(value, bool | int | float | str | list | tuple | Mapping):
        raise InvalidInput(
            f"{field} is {shortened(value)}, but the call of a constructor is needed that makes "
            f"{described_as(wanted)}; {_choices(str(value)[:40], wanted)}"
        )
