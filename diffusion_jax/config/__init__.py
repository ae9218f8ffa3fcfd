"""Configs: constructor calls written as data, what they may call, and how they are read, changed and found.

`call` writes a constructor call down, `build` makes it, `load` reads a config (`calls`). Which constructors a config
may call is in `parts`, which code of your own in `trust`; changes of a config from a command line in `overrides`, whose
values are read by `literals`; the configs that come with the library are found by `shipped`.
"""

from diffusion_jax.config.calls import (
    ConfigDict,
    as_plain,
    build,
    call,
    check_entry,
    differences,
    load,
    of_type,
    takes_any_name,
    to_json,
)

__all__ = [
    "ConfigDict",
    "as_plain",
    "build",
    "call",
    "check_entry",
    "differences",
    "load",
    "of_type",
    "takes_any_name",
    "to_json",
]
