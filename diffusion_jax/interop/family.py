"""What makes an architecture loadable: a `Family` of functions between their config.json and names, and ours."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusion_jax.interop.fields import Fields
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
    irrelevant: fields of their config that change nothing of what is computed, and are not read for that.
    synonyms: other names of fields of their config, `{synonym: name}`.
    sample_size: the peer's default for the height and width of x that the network was trained on; None where x has
        none, or any.
    """

    library: str
    make: Callable[..., Any]
    fields: Callable[[Fields, Any], dict[str, Any]]
    table: Callable[[Any], TensorTable]
    config: Callable[[Any], dict[str, Any]]
    shapes: Callable[[Any], Any]
    ignored: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    buffers: Callable[[Any], dict[str, Any]] = lambda module: {}
    irrelevant: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = {}
    sample_size: int | None = None
