"""What is known of a network's module (`typing.Anatomy`), and where its parameters lie in those of the network."""

from typing import Any

import flax.linen as nn

from diffusion_jax.errors import InvalidInput
from diffusion_jax.models.conditions import Concat
from diffusion_jax.models.layers.conditioning import find_stream
from diffusion_jax.models.paths import at_path, replaced_at
from diffusion_jax.typing import Anatomy, Network


def transformer_anatomy(module: nn.Module, **fields: Any) -> Anatomy:
    """What networks with a `condition` encoder and a stack of `blocks` behind it have in common, and other fields."""
    stack = {"stack": "blocks", "depth": module.depth, "last": ("final_modulation", "final")}
    told = condition_fields(module, fields.get("entrance", ""))
    return Anatomy(**{"width": module.width, **told, **stack, **fields})


def condition_fields(module: nn.Module, entrance: str) -> dict[str, Any]:
    """What networks with a `condition` encoder have in common. entrance: where the channels of conditions enter."""
    joined = find_stream(module.conditions, Concat)
    enters = {
        key.name: entrance if "channels" in stream.enters else "condition"
        for stream in module.conditions
        for key in stream.keys
    }
    concat = joined.channels if joined else 0
    return {"condition": ("condition",), "time": "condition/time", "concat": concat, "enters": enters}


def prefixed(anatomy: Anatomy, prefix: str) -> Anatomy:
    """The anatomy of a module that has the described one as its submodule `prefix`."""

    def moved(path):
        return f"{prefix}/{path}" if path else path

    causal = anatomy.causal and anatomy.causal._replace(attend=moved(anatomy.causal.attend))
    return anatomy._replace(
        **{name: moved(getattr(anatomy, name)) for name in ("entrance", "stack", "tail", "time")},
        **{name: tuple(map(moved, getattr(anatomy, name))) for name in ("cuts", "last", "condition")},
        enters={key: moved(path) for key, path in anatomy.enters.items()},
        causal=causal,
    )


def required(network: Network, field: str, caller: str) -> Any:
    """A field of the network's anatomy; raises InvalidInput where it is not known."""
    if network.module is None:
        raise InvalidInput(f"{caller} needs a network made from a module: network.module is missing.")
    value = getattr(network.anatomy, field, None)
    if not value:
        raise InvalidInput(
            f"{caller} needs anatomy.{field}, which this network lacks: where there is one, it is given by "
            f"models.network(module, anatomy=Anatomy({field}=...))."
        )
    return value


def collects(network: Network) -> bool:
    """Whether the parameters are `{"params": ..., **collections}`, so that further collections may join them."""
    return network.inside.weights[:1] == ("params",)


def module_params(network: Network, params: Any) -> Any:
    """The parameters of the module within the network."""
    return at_path(params, network.inside.weights)


def with_module_params(network: Network, params: Any, inner: Any) -> Any:
    """The network's parameters with `inner` in the place of those of its module."""
    return replaced_at(params, network.inside.weights, inner)
