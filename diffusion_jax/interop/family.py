"""What makes an architecture loadable: a `Family` of functions between their config.json and names, and ours."""

from collections.abc import Callable
from typing import Any, NamedTuple

from diffusion_jax.errors import InvalidInput
from diffusion_jax.interop.tables import TensorTable


class Family(NamedTuple):
    """One architecture in somebody else's files.

    library: "diffusers" or "transformers", which decides the names of files.
    make: (**fields) -> the network, autoencoder or encoder; our public constructor.
    fields: (config, files) -> our fields, from their config.json and, where that does not tell all, their tensors;
        `files` is None where there are none. Raises InvalidInput for an option that we do not have.
    table: (module) -> Table. config: (module) -> their config.json.
    shapes: (network) -> the parameters as a tree of ShapeDtypeStruct; nothing is allocated.
    ignored: regular expressions of the names of tensors that carry no weights.
    aliases: `(regex, replacement)` pairs from names of older files to those of the table.
    buffers: (module) -> tensors by name that are computed here and stored there: fixed position tables. They are
        written, and where they are read, `ignored` names them.
    """

    library: str
    make: Callable[..., Any]
    fields: Callable[[dict, Any], dict[str, Any]]
    table: Callable[[Any], TensorTable]
    config: Callable[[Any], dict[str, Any]]
    shapes: Callable[[Any], Any]
    ignored: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    buffers: Callable[[Any], dict[str, Any]] = lambda module: {}


def take(config: dict[str, Any], name: str, default: Any, allowed: tuple = ()) -> Any:
    """`config[name]`, or the peer's `default`; InvalidInput unless it is among `allowed`, if that is given."""
    value = config.get(name, default)
    if allowed and value not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise InvalidInput(f"config.json says {name}={value!r}, but only {choices} can be loaded.")
    return value
