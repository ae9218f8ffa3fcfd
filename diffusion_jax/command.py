"""What every command line shares: how it ends, where compiled programs are kept, how a config is named."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import absl.logging
import jax
from ml_collections import ConfigDict

from diffusion_jax.cache import cache_folder
from diffusion_jax.config import apply_overrides, load
from diffusion_jax.errors import Halted, InvalidInput


def run_command(main: Callable[..., None], argv: Sequence[str] | None = None) -> int:
    """Runs `main(argv)`; what stops it is told in one sentence, without a traceback. Returns the exit code.

    0: done. 2: a user's mistake. 3: the system refused something (a full disk), or a process of several was lost.
    130: interrupted.
    """
    # Orbax warns of every option that it derives from another one, and logs what it then raises, with its traceback;
    # so do the loops in which it reads, and objects that cannot raise.
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    unraisable, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        main(argv)
    except InvalidInput as error:
        _tell(f"error: {error}")
        return 2
    except (Halted, OSError) as error:
        _tell(f"error: {error}")
        return 3
    except KeyboardInterrupt:
        _tell("Interrupted.")
        return 130
    finally:
        sys.unraisablehook = unraisable
    return 0


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


def parse_config(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    *,
    stored: str | None = None,
    flags: Callable[[argparse.Namespace, ConfigDict | None], ConfigDict] | None = None,
) -> tuple[argparse.Namespace, ConfigDict]:
    """Parses the arguments of `parser` together with `--config=FILE[:variant]` and `--config.field=value`.

    stored: a file name; when `--config` is absent the config stored under this name in `--workdir` is read.
    flags: (arguments, the config of `--config` or None) -> the config that the command's own flags describe, to which
        overrides are applied.
    """
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="a file of configs/, optionally with its variant")
    parser.add_argument(
        "--config.FIELD", metavar="VALUE", dest="_overrides_help", help="overrides a field, e.g. --config.model.depth=4"
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    overrides, rest = [], []
    for argument in argv:
        is_override = argument.startswith("--config.") and not argument.startswith("--config.FIELD")
        (overrides if is_override else rest).append(argument)
    arguments = parser.parse_args(rest)
    path = arguments.config
    if path is None and stored is not None and arguments.workdir is not None:
        file = Path(arguments.workdir) / stored
        if not file.is_file():
            raise InvalidInput(
                f"{file} does not exist: --workdir must be the folder of a training run, or give --config."
            )
        path = str(file)
    config = None if path is None else load(path)
    config = config if flags is None else flags(arguments, config)
    if config is None:
        raise InvalidInput("--config is missing; e.g. --config=configs/digits_dit.py")
    return arguments, apply_overrides(config, [text.removeprefix("--config.") for text in overrides])
