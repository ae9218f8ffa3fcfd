"""What every command line shares: how it ends, where compiled programs are kept, how a config is named."""

import _thread
import argparse
import contextlib
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import absl.logging
import jax
from ml_collections import ConfigDict

from diffusion_jax.cache import cache_folder
from diffusion_jax.command_parser import CommandParser
from diffusion_jax.config import load
from diffusion_jax.config.overrides import apply_overrides
from diffusion_jax.errors import Halted, InvalidInput, invalid


def run_command(main: Callable[..., None], argv: Sequence[str] | None = None) -> int:
    """Runs `main(argv)`; what stops it is told in one sentence, without a traceback. Returns the exit code.

    0: done. 2: a user's mistake. 3: the system refused something (a full disk), or a process of several was lost.
    130: interrupted.
    """
    # Orbax warns of every option that it derives from another one, and logs what it then raises, with its traceback;
    # so do the loops in which it reads, and objects that cannot raise.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    unraisable, sys.unraisablehook = sys.unraisablehook, _unraised
    told, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
    try:
        main(argv)
    except InvalidInput as error:
        _tell(f"error: {error}")
        return 2
    except Halted as error:
        _tell(f"error: {error}")
        return 3
    except BrokenPipeError:
        # Whoever read the output has left, as `head` does: what Python still holds has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        _tell(f"error: {error if error.filename is None else f'{error.filename}: {error.strerror}.'}")
        return 3
    except KeyboardInterrupt:
        _tell("Interrupted.")
        return 130
    finally:
        sys.unraisablehook = unraisable
        warnings.formatwarning = told
    return 0


def _unraised(problem: Any) -> None:
    # Ctrl-C while a callback or a finaliser runs, which imports do often, would be lost.
    if issubclass(problem.exc_type, KeyboardInterrupt):
        # Once this hook has returned: what is raised in it is lost, too.
        threading.Timer(0.01, _thread.interrupt_main).start()


def _tell(sentence: str) -> None:
    # A full disk may be where errors are written, too.
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """Ends this process. With an error it does so at once: what still runs in threads is not waited for, nor are the
    other processes of the run, which would wait for this one."""
    if code == 0:
        sys.exit(0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def cache_compilations() -> None:
    """Keeps compiled programs in `cache_folder()`, so that the next run starts at once; `JAX_COMPILATION_CACHE_DIR`
    has the last word."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides in `argv`, as `apply_overrides` takes them, and the other arguments.

    `--config.field=value` and `--config.field value` are one. Raises InvalidInput where the value is missing.
    """
    overrides, rest, left = [], [], list(argv)
    while left:
        argument = left.pop(0)
        if not argument.startswith("--config.") or argument.startswith("--config.FIELD"):
            rest.append(argument)
        elif "=" in argument:
            overrides.append(argument.removeprefix("--config."))
        elif left and not left[0].startswith("--"):
            overrides.append(f"{argument.removeprefix('--config.')}={left.pop(0)}")
        else:
            raise invalid(argument, "", f"an override reads {argument}=VALUE")
    return overrides, rest


def size_in_pixels(text: str) -> tuple[int, int]:
    """What `--size` says, `"256"` or `"256x384"`, as height and width."""
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text)
    if not match:
        raise invalid("--size", text, "a side, or HEIGHTxWIDTH, is needed, such as 512 or 512x768")
    return int(match[1]), int(match[2] or match[1])


def _fields(config: Mapping[str, Any] | ConfigDict, above: str = "") -> Iterator[str]:
    for name, value in config.items():
        yield f"{above}{name}"
        if isinstance(value, Mapping | ConfigDict):
            yield from _fields(value, f"{above}{name}.")


def add_trust_argument(parser: Any) -> None:
    """Adds `--trust` to a parser, or to a group of one."""
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="a stored config may call the functions and classes of this package; repeatable, or with commas",
    )


def trusted_packages(arguments: argparse.Namespace) -> list[str]:
    """The packages that `--trust` names."""
    return [package.strip() for text in arguments.trust for package in text.split(",")]


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what every command that reads a config takes."""
    group = parser.add_argument_group("config")
    group.add_argument("--config", metavar="NAME[:VARIANT]", help="a shipped config or a Python file")
    group.add_argument(
        "--config.FIELD", metavar="VALUE", dest="_overrides_help", help="overrides a field, e.g. --config.model.depth=4"
    )
    add_trust_argument(group)
    group.add_argument(
        "--print-config",
        action="store_true",
        help="print all fields with their values, types and meaning, as overrides that can be copied, and leave",
    )


def parse_config(
    parser: CommandParser,
    argv: Sequence[str] | None,
    *,
    stored: str | None = None,
    base: ConfigDict | Callable[[argparse.Namespace], ConfigDict] | None = None,
    set_fields: Callable[[argparse.Namespace, ConfigDict], None] | None = None,
) -> tuple[argparse.Namespace, ConfigDict]:
    """Parses the arguments of `parser` together with `--config=FILE[:variant]`, `--config.field=value`, `--trust` and
    `--print-config`.

    stored: a file name; when `--config` is absent the config stored under this name in `--workdir` is read.
    base: the config to start from, in place of a file; or a function that makes it of the arguments, where `--config`
        is absent.
    set_fields: writes arguments into the config, before fields of it are overridden.
    """
    add_config_arguments(parser)
    overrides, rest = split_overrides(sys.argv[1:] if argv is None else argv)
    if "--print-config" in rest and not {"-h", "--help"} & {*rest}:
        # It knows all parts, whose import --help does not wait for.
        from diffusion_jax.config_text import config_text

        # Nothing else is needed for it, also where the command needs it.
        only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        add_config_arguments(only)
        only.add_argument("--workdir", type=Path)
        # Arguments that stand for fields are.
        arguments = only.parse_known_args(rest)[0] if set_fields is None else parser.parse_args(rest)
        print(config_text(_read_config(arguments, overrides, stored, base, set_fields)))
        raise SystemExit(0)

    def fields() -> Iterable[str]:
        try:
            return [*_fields(_read_config(parser.parse_known_args(rest)[0], overrides, stored, base, set_fields))]
        except InvalidInput:
            return []

    arguments = parser.parse_args(rest, fields=fields)
    return arguments, _read_config(arguments, overrides, stored, base, set_fields)


def _read_config(
    arguments: argparse.Namespace,
    overrides: Sequence[str],
    stored: str | None,
    base: ConfigDict | Callable[[argparse.Namespace], ConfigDict] | None,
    set_fields: Callable[[argparse.Namespace, ConfigDict], None] | None,
) -> ConfigDict:
    if isinstance(base, ConfigDict):
        config = base
    elif base is not None and arguments.config is None:
        config = base(arguments)
    else:
        config = _loaded(arguments, stored)
    if set_fields is not None:
        set_fields(arguments, config)
    return apply_overrides(config, overrides)


def _loaded(arguments: argparse.Namespace, stored: str | None) -> ConfigDict:
    path = arguments.config
    if path is None and stored is not None and arguments.workdir is not None:
        file = Path(arguments.workdir) / stored
        if not file.is_file():
            raise InvalidInput(
                f"{file} does not exist: --workdir must be the folder of a training run, or give --config."
            )
        path = str(file)
    if path is None:
        raise InvalidInput("--config is missing; e.g. --config=digits_dit (list: diffusion-jax configs).")
    return load(path, trusted_packages(arguments))
