"""From a linen module to the pure functions that the library uses, and what can be known without running them.

Modules are called as `module(x, t, cond, train) -> (output, extras)`, positional arguments only.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.config import of_type
from diffusion_jax.errors import invalid, unknown
from diffusion_jax.models.layers.branches import REMAT
from diffusion_jax.models.layers.conditioning import check_streams
from diffusion_jax.typing import Anatomy, Inside, Network

DTYPES = ("float32", "bfloat16", "float16")
"""Compute dtypes; parameters are always float32."""


def network(module: nn.Module, anatomy: Anatomy | None = None) -> Network:
    """The pure functions of a linen module; see `typing.Network`.

    `init` compiles as one program. `key` of `apply` feeds dropout (one key; the first, where there is one per sample).
    anatomy: where things are in the module, for methods that look inside; other methods need none:

        network(Mine(width=64, depth=4), Anatomy(stack="blocks", depth=4, last=("norm", "out"), time="time"))
    """

    def init(key, x, t, cond=None):
        return jax.jit(lambda *inputs: module.init(*inputs, False)["params"])(key, x, t, cond)

    def apply(params, x, t, cond=None, train=False, key=None) -> Any:
        return module.apply({"params": params}, x, t, cond, train, rngs=dropout_rngs(key))

    def run(call, params, *inputs):
        return call({"params": params}, (), *inputs)

    return Network(init, apply, module, anatomy, Inside(run, bare=True))


LARGEST_SIZE, MOST_BLOCKS = 2**24, 2**12
"""Of any axis, and of what is traced one by one: far beyond what is trained."""


def make_module(kind: Any, what: str, preset: Mapping[str, Any], fields: Mapping[str, Any], *fixed: Any) -> Any:
    """`kind(*fixed, **{**preset, **fields})`; raises InvalidInput for a field that it does not have.

    what: the constructor that the fields were given to. fixed: the first fields, which it sets itself.
    `kind.takes` names where conditions can enter (`layers.conditioning`).
    """
    known = [name for name in kind.__dataclass_fields__ if name not in ("parent", "name")][len(fixed) :]
    for name in fields:
        if name not in known:
            raise unknown(f"field of {what}", name, known)
    made = {**preset, **fields}
    check_fields(what, kind, made)
    if "conditions" in made:
        made["conditions"] = check_streams(what, made["conditions"], kind.takes)
    return kind(*fixed, **made)


def check_fields(what: str, kind: Any, fields: Mapping[str, Any]) -> None:
    """Raises InvalidInput for a field that is not of the type that the module `kind` declares, or of a size that no
    network has: such a number would be traced or allocated before it is seen to be wrong."""
    for name, value in fields.items():
        if name != "conditions":
            of_type(f"{what}.{name}", value, kind.__dataclass_fields__[name].type)
        most = MOST_BLOCKS if re.search("depth|residual|layers", name) else LARGEST_SIZE
        for number in value if isinstance(value, tuple | list) else [value]:
            if isinstance(number, int) and number > most:
                raise invalid(f"{what}.{name}", value, f"at most {most} is taken")


def chosen(preset: str, presets: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The fields of a preset; raises InvalidInput where there is none of this name."""
    if preset not in presets:
        raise unknown("preset", preset, presets)
    return presets[preset]


def dropout_rngs(key: Any) -> dict | None:
    """The random streams of a call of `module.apply`."""
    if key is None:
        return None
    return {"dropout": key if key.ndim == 0 else key[0]}


def param_shapes(
    network: Network, shape: tuple[int, ...] | Mapping[str, tuple[int, ...]], cond: Any = None, dtype: Any = jnp.float32
) -> Any:
    """The parameters as a tree of `ShapeDtypeStruct`, for data of `shape` (batch included; a dict of shapes for joint
    data); nothing is computed."""
    shapes = shape if isinstance(shape, Mapping) else {"": shape}
    data = {name: jax.ShapeDtypeStruct(tuple(one), dtype) for name, one in shapes.items()}
    x = data if isinstance(shape, Mapping) else data[""]
    t = jax.ShapeDtypeStruct((jax.tree.leaves(data)[0].shape[0],), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), x, t, cond)


def count_params(params: Any) -> int:
    """The number of parameters in a tree of arrays or of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def check_dtype(dtype: str) -> None:
    """Raises InvalidInput unless `dtype` names a compute dtype."""
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)


def check_transformer(module) -> None:
    """Raises InvalidInput unless the sizes fit together and remat and dtype exist."""
    for name in ("width", "depth", "heads"):
        value = getattr(module, name)
        if not isinstance(value, int) or value < 1:
            raise invalid(name, value, "it must be a positive integer")
    if module.width % (2 * module.heads):
        raise invalid("width", module.width, f"it must divide by twice the number of heads, {module.heads}")
    if module.remat not in REMAT:
        raise unknown("remat", module.remat, REMAT)
    check_dtype(module.dtype)
