"""Constructors outside of this library, named "package.module:name", and which names may be imported.

A name that the user has written, in a Python config or on a command line, is imported as an `import` statement would
be. A name that was read from a file is data: it may be imported only where the user trusts its package. The difference
travels with the name: what may be imported is an `ImportableName`, and a plain `str` never is. JSON knows no such type,
so whatever has been stored is plain again when it is read.

To trust "my_package" is to trust the public functions and classes of `my_package` and of its modules that are defined
in them: what they have imported from elsewhere is not theirs. The standard library makes no parts, and is never called.
"""

import hashlib
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from diffusion_jax.errors import InvalidInput, invalid, shortened

MODULE = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)*", re.ASCII)
IMPORTABLE = re.compile(rf"({MODULE.pattern}):([A-Za-z]\w*)", re.ASCII)


class ImportableName(str):
    """A name "package.module:name" that may be imported.

    within: the packages in which the constructor must be defined; None where the user has written the name.
    """

    within: tuple[str, ...] | None = None


# Configs print themselves as YAML.
yaml.add_representer(ImportableName, lambda dumper, name: dumper.represent_str(str(name)))


def is_outside(name: Any) -> bool:
    """Whether the name of a call is that of a constructor outside of this library."""
    return isinstance(name, str) and ":" in name


def written_by_user(name: str) -> str:
    """The name of a call as the user has written it in code or in a command: it may be imported."""
    return ImportableName(name) if is_outside(name) and not isinstance(name, ImportableName) else name


def outside_constructor(name: str) -> Callable[..., Any]:
    """The function or class that "package.module:name" names.

    Raises InvalidInput where the name may not be imported or has no such form, and where nothing is found.
    """
    module_name, attribute = _split(name)
    if not isinstance(name, ImportableName):
        raise _untrusted(f"call {name!r}", module_name)
    try:
        module = _imported(module_name)
        found = getattr(module, attribute, None)
    except (Exception, SystemExit) as error:
        raise InvalidInput(
            f"call {name!r}: the module {module_name!r} cannot be imported ({_told(error)}); it is looked for among "
            "the installed packages, and then in the current directory."
        ) from error
    if found is None:
        public = ", ".join(sorted(each for each, value in vars(module).items() if _defined_in(value, module_name)))
        raise InvalidInput(f"call {name!r}: {module_name} has no {attribute!r}; it defines {public or 'nothing'}.")
    if not _function_or_class(found):
        raise InvalidInput(
            f"call {name!r}: {attribute} is a {type(found).__name__}, but a function or a class is needed."
        )
    if name.within is not None and not any(_defined_in(found, package) for package in name.within):
        raise _untrusted(f"call {name!r}, which is defined in {found.__module__},", str(found.__module__))
    return found


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # `python -m` searches the current directory, a console script does not.
        if error.name != module.partition(".")[0] or {"", os.getcwd()} & {*sys.path}:
            raise
    sys.path.append(os.getcwd())
    return importlib.import_module(module)


def check_packages(packages: Iterable[str]) -> tuple[str, ...]:
    """Names of packages to trust. Raises InvalidInput for what is no name, and for those that nobody needs to trust."""
    packages = tuple(packages)
    for package in packages:
        if not MODULE.fullmatch(package):
            raise invalid("--trust", package, "the name of a package is needed, such as my_package")
        _refuse_library(f"--trust={package}", package)
    return packages


def trusting(tree: Any, packages: Iterable[str], where: str) -> Any:
    """A tree that was read from a file `where`, with the names that `packages` make importable.

    Raises InvalidInput for the call of anything outside of this library that is not in one of them. Nothing is
    imported.
    """
    packages = check_packages(packages)

    def trusted(name: str) -> str:
        module, _ = _split(name)
        if not any(_within(module, package) for package in packages):
            raise _untrusted(f"{where} calls {shortened(name)}, which", module)
        importable = ImportableName(name)
        importable.within = packages
        return importable

    return _with_names(tree, trusted)


def outside_packages(tree: Any) -> list[str]:
    """The top packages of the constructors outside of this library that a config calls: what its copy needs
    `--trust=` for."""
    return sorted({name.partition(":")[0].partition(".")[0] for name in _outside_names(tree)})


def source_digests(tree: Any) -> dict[str, str]:
    """A digest of the source of each module outside of this library whose constructors a config calls: what was drawn
    by a part is no longer what the part would draw once its code has changed."""
    modules = sorted({name.partition(":")[0] for name in _outside_names(tree)})
    paths = {module: getattr(_imported(module), "__file__", None) for module in modules}
    return {module: hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] for module, path in paths.items() if path}


def _outside_names(tree: Any) -> Iterator[str]:
    tree = tree.to_dict() if isinstance(tree, ConfigDict) else tree
    if isinstance(tree, Mapping):
        if is_outside(tree.get("call")):
            yield tree["call"]
        tree = list(tree.values())
    for value in tree if isinstance(tree, list | tuple) else ():
        yield from _outside_names(value)


def _with_names(tree: Any, change: Callable[[str], str]) -> Any:
    if isinstance(tree, Mapping):
        return {
            key: change(value) if key == "call" and is_outside(value) else _with_names(value, change)
            for key, value in tree.items()
        }
    return [_with_names(value, change) for value in tree] if isinstance(tree, list) else tree


def _split(name: str) -> tuple[str, str]:
    match = IMPORTABLE.fullmatch(name)
    if match is None:
        raise invalid(
            "call",
            name,
            "'package.module:name' is needed, each of letters, digits and underscores after a first letter",
        )
    module, _, attribute = name.partition(":")
    _refuse_library(f"call {name!r}", module)
    return module, attribute


def _refuse_library(what: str, module: str) -> None:
    package = module.partition(".")[0]
    if package in sys.stdlib_module_names:
        raise InvalidInput(f"{what}: {package!r} is a module of Python, which makes no part of a config.")
    if package == "diffusion_jax":
        raise InvalidInput(f"{what}: parts of this library are called by their short names, such as 'solvers.ddim'.")


def _untrusted(what: str, module: str) -> InvalidInput:
    package = module.partition(".")[0]
    return InvalidInput(
        f"{what} is code outside of diffusion_jax: if you trust {package!r}, say so (--trust={package}, or "
        f"load(..., trust=[{package!r}]) in Python)."
    )


def _function_or_class(value: Any) -> bool:
    # What is cached or jitted stands around a function.
    inner = inspect.unwrap(value) if callable(value) else value
    return inspect.isfunction(inner) or inspect.isclass(inner) or inspect.isbuiltin(inner)


def _defined_in(value: Any, package: str) -> bool:
    return _function_or_class(value) and _within(str(getattr(value, "__module__", "")), package)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    # Where in the user's files it was, rather than in the machinery of imports.
    own = [frame for frame in frames if not frame.filename.startswith("<") and frame.filename not in _MACHINERY]
    place = f" in {own[-1].filename}, line {own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{place}: {shortened(str(error), 160)}"


_MACHINERY = (__file__, importlib.__file__)
