"""What the published setting of a system would cost, counted from shapes: nothing is made.

The variant `paper` of a study's config has `model`, a call, or `models`, several by name, and `inputs`, one example:

    config.inputs = {"x0": (32, 32, 4), "cond": {"label": ("int",), "context": (77, 768)}}

with "int" or "bool" before the shape of what is no float, and `t` where the time has a shape of its own.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffusion_jax.config import build
from diffusion_jax.costs import count_bytes, count_flops
from diffusion_jax.errors import InvalidInput

KINDS = {"int": jnp.int32, "bool": jnp.bool_}


def published_inputs(config: ConfigDict) -> tuple[Any, Any, Any]:
    """Shapes of (x, t, cond) of one example, as `inputs` of the config says."""
    if "inputs" not in config:
        raise InvalidInput("The config has no entry 'inputs', the shapes of one example; see recipes/published.py.")
    inputs = config.inputs.to_dict()

    def shape(entry):
        dtype, entry = (KINDS[entry[0]], entry[1:]) if entry and entry[0] in KINDS else (jnp.float32, entry)
        return jax.ShapeDtypeStruct((1, *entry), dtype)

    x, cond = (
        jax.tree.map(shape, inputs.get(name), is_leaf=lambda leaf: isinstance(leaf, tuple)) for name in ("x0", "cond")
    )
    times = inputs.get("t", ())
    joint = isinstance(x, Mapping)
    t = {name: shape(times[name] if times else ()) for name in x} if joint else shape(times)
    return x, t, cond


def published_size(config: ConfigDict) -> str:
    """A line for each network: parameters, operations of one evaluation, bytes of parameters and of an Adam state."""
    if "model" not in config and "models" not in config:
        raise InvalidInput("The config has neither 'model' nor 'models'; there is nothing to count.")
    x, t, cond = published_inputs(config)
    models = config.models if "models" in config else {"network": config.model}
    lines = []
    for name, entry in models.items():
        network = build(entry)
        params = jax.eval_shape(network.init, jax.random.key(0), x, t, cond)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        flops = count_flops(lambda *inputs, network=network: network.apply(*inputs)[0], params, x, t, cond)
        stored = count_bytes(params)
        lines.append(
            f"{name}: {size / 1e6:,.1f} million parameters, {flops / 1e9:,.1f} GFLOP an evaluation of one example, "
            f"{stored / 2**30:.2f} GiB of parameters, {4 * stored / 2**30:.2f} GiB in training "
            "(gradients and two moments beside them, without activations)"
        )
    return "\n".join(lines)
