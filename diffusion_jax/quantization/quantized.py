"""Networks with quantised weights, and quantised inputs of their layers, by interception: any network of the library.

    y = Q_x(x) Q_w(W) + b        in each dense layer and convolution that is selected                             (1)

Integers and scales are data in the parameters, `{"params": what stays as it is, "quantized": ...}`, at the paths of the
layers and stacked over depth like them. So they are saved, sharded, scanned and passed to compiled programs like any
parameters; LoRA, caches, gates, early exit and guidance work around them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.adapters.routed import at_time
from diffusion_jax.errors import InvalidInput, invalid, need, unknown
from diffusion_jax.models.anatomy import collects, module_params, with_module_params
from diffusion_jax.models.edits import of_condition
from diffusion_jax.models.interception import ByAnatomy, Edit, Select, Site, intercepted
from diffusion_jax.quantization.arithmetic import integer_product
from diffusion_jax.quantization.quantizers import (
    Quantizer,
    Scales,
    dequantize,
    fake_quantize,
    quantize,
    scales_of,
    scales_of_range,
)
from diffusion_jax.quantization.statistics import time_edges
from diffusion_jax.time_axes import expand
from diffusion_jax.timesteps import bucket_of
from diffusion_jax.typing import Anatomy, Network

COLLECTION, RANGES = "quantized", "ranges"
ARITHMETIC = ("simulated", "integer")


@ByAnatomy
def quantizable(module: nn.Module, anatomy: Anatomy | None) -> bool:
    """Selects dense layers and convolutions, but for those that read x or t first, those behind the blocks, and those
    of the condition: they are few, and what goes wrong there goes wrong everywhere."""
    if not isinstance(module, nn.Dense | nn.Conv):
        return False
    known = anatomy or Anatomy()
    path = "/".join(module.path)
    apart = (known.entrance, known.time, *known.last)
    return not of_condition(module, anatomy) and not any(
        path == one or path.startswith(f"{one}/") for one in apart if one
    )


class Quantized(NamedTuple):
    """A network with quantised layers.

    network: its parameters are `{"params": those of the network without the quantised kernels, "quantized": ...}`, and
        `"ranges"` where those of the inputs depend on the time.
    quantize: (params, x, t, cond=None, ranges=None) -> parameters of `network`. x, t, cond: an example, of which shapes
        alone count. ranges: of the inputs of layers, from `input_ranges`, where they are static.
    dequantize: (parameters) -> parameters of the plain network, whose kernels are `Q_w(W)`.
    """

    network: Network
    quantize: Callable[..., dict[str, Any]]
    dequantize: Callable[[Any], Any]


def quantized(
    network: Network,
    weights: Quantizer,
    activations: Quantizer | None = None,
    *,
    dynamic: bool = True,
    edges: Sequence[float] = (),
    select: Select = quantizable,
    finder: str = "max",
    arithmetic: str = "simulated",
) -> Quantized:
    """`network` with equation (1) in the selected layers.

    weights, activations: of kernels and of what the layers read, which stays as it is when None.
    dynamic: whether the range of an input is found at run time, from itself: of each token, or with per="tensor" of
        each sample, since an answer may not depend on what else is in the batch. Otherwise it is one number a layer, of
        `input_ranges`, and with `edges [K - 1]`, rising, in the network's own times, one for each of K intervals.
    finder: of the ranges of weights, see `scales_of`.
    arithmetic: "simulated", floats of the rounded values; or "integer", products of int8, which needs both quantised,
        weights that are symmetric and in no groups of inputs, and inputs by token or tensor.
    Raises InvalidInput for settings that do not go together.
    """
    need("weights", weights, Quantizer, "a quantiser is needed, such as symmetric(8)")
    if arithmetic not in ARITHMETIC:
        raise unknown("arithmetic", arithmetic, ARITHMETIC)
    if weights.per == "token":
        raise invalid("weights.per", weights.per, "'channel', 'tensor' or a number of inputs was expected")
    if activations is not None:
        need("activations", activations, Quantizer, "a quantiser is needed, such as affine(8, per='token'), or None")
        if activations.per not in ("token", "tensor"):
            raise invalid("activations.per", activations.per, "'token' or 'tensor' was expected: see Quantizer")
        if not dynamic and activations.per != "tensor":
            raise invalid("activations.per", activations.per, "static ranges are those of 'tensor'")
    if arithmetic == "integer" and (activations is None or not weights.symmetric or isinstance(weights.per, int)):
        told = "products of integers need activations, and weights that are symmetric and in no groups of inputs"
        raise invalid("weights, activations", (weights, activations), told)
    inner, static = time_edges(edges), activations is not None and not dynamic
    if len(inner) and not static:
        raise invalid("edges", list(edges), "ranges by time are static: activations and dynamic=False are needed")

    def apply(site: Site, *inputs):
        module = site.module
        if not isinstance(module, nn.Dense | nn.Conv):
            told = f"{'/'.join(module.path)} is {type(module).__name__}"
            raise InvalidInput(f"quantized is for Dense and Conv, but {told}: narrow select.")
        (x,) = inputs
        found = partial(scales_of, quantizer=weights, finder=finder)
        kernel = site.params.get("kernel")
        step = site.get(COLLECTION, "step", lambda: found(kernel).step)
        zero = site.get(COLLECTION, "zero", lambda: found(kernel).zero)
        integers = site.get(COLLECTION, "kernel", lambda: quantize(kernel, found(kernel), weights))
        given = None
        if static:
            given = [site.get(COLLECTION, name, lambda: jnp.float32(1.0)) for name in ("low", "high")]
        if site.initialising:
            return site.run(x)
        scales = partial(_scales, activations, given, isinstance(module, nn.Conv))
        rest = {name: leaf for name, leaf in site.params.items() if name != "kernel"}
        if arithmetic == "integer" and activations is not None:
            multiply = "conv_general_dilated" if isinstance(module, nn.Conv) else "dot_general"
            product = integer_product(multiply, (integers, Scales(step, zero)), scales, activations)
            rest["kernel"] = jnp.zeros(integers.shape, x.dtype)
            return site.run_with(rest, x, **{multiply: product})
        if activations is not None:
            x = fake_quantize(x, scales(x), activations).astype(x.dtype)
        return site.run_with({**rest, "kernel": dequantize(integers, Scales(step, zero))}, x)

    opened = intercepted(network, Edit(select, apply, (COLLECTION,)))
    timed = at_time(opened.network, partial(_at_bucket, inner)) if len(inner) else opened.network

    def make(params, x, t, cond=None, ranges=None):
        made = opened.init(jax.random.key(0), params, x, t, cond)[COLLECTION]
        rest = with_module_params(network, params, _without(module_params(network, params), made))
        parameters = {**(rest if collects(network) else {"params": rest}), COLLECTION: made}
        if not static:
            return parameters
        if ranges is None:
            raise InvalidInput("static ranges of inputs are missing: give ranges=input_ranges(...), or dynamic=True.")
        intervals = len(inner) + 1
        counts = {leaf.shape[0] for leaf in jax.tree.leaves(ranges)}
        if counts != {intervals}:
            raise invalid("ranges", sorted(counts), f"those of {intervals} intervals of times are needed")
        if intervals > 1:
            return {**parameters, RANGES: ranges}
        return _ranged(parameters, ranges, lambda leaf: leaf[0])

    def unmake(parameters):
        own = {name: parameters[name] for name in parameters if name not in (COLLECTION, RANGES)}
        own = own if collects(network) else own["params"]
        return with_module_params(network, own, _restored(module_params(network, own), parameters[COLLECTION]))

    return Quantized(timed, make, unmake)


def _scales(activations, given, windowed, x):
    if given is None:
        # Of "tensor" the sample is the whole.
        whole = activations.per == "tensor"
        return scales_of(x, replace(activations, per="token"), windowed=windowed or whole)
    # One number for all, or one a sample.
    low, high = (expand(jnp.asarray(end), x) for end in given)
    return scales_of_range(low, high, activations)


def _at_bucket(edges, parameters, t, train=False, key=None):
    """The parameters with the ranges at the network's times `t []` or `[B]`."""
    if isinstance(t, Mapping) or jnp.ndim(t) > 1:
        raise InvalidInput("Ranges by time are found at one time a sample, [B], or one for all.")
    bucket = bucket_of(t, edges)
    rest = {name: entry for name, entry in parameters.items() if name != RANGES}
    ranges = parameters[RANGES]
    # [K, L] or [K], at [B]: the samples behind the depth.
    return _ranged(rest, ranges, lambda leaf: jnp.moveaxis(leaf[bucket], 0, -1) if jnp.ndim(bucket) else leaf[bucket])


def _ranged(parameters, ranges, at):
    def entered(made, found):
        if "low" in found:
            return {**made, **{name: at(found[name]) for name in ("low", "high")}}
        return {name: entered(entry, found[name]) if name in found else entry for name, entry in made.items()}

    return {**parameters, COLLECTION: entered(parameters[COLLECTION], ranges)}


def _without(params, made):
    """Parameters without the kernels of the layers in `made`."""
    if "kernel" in made and not isinstance(made["kernel"], Mapping):
        return {name: leaf for name, leaf in params.items() if name != "kernel"}
    return {name: _without(entry, made[name]) if name in made else entry for name, entry in params.items()}


def _restored(params, made):
    if "kernel" in made and not isinstance(made["kernel"], Mapping):
        return {**params, "kernel": dequantize(made["kernel"], Scales(made["step"], made["zero"]))}
    return {**params, **{name: _restored(params.get(name, {}), entry) for name, entry in made.items()}}


def quantized_bytes(parameters: Mapping[str, Any], weights: Quantizer) -> float:
    """Bytes of a quantised network as they are stored: `bits / 8` an integer, and all else as the arrays are.

    In memory an integer is one byte.
    """
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        keys = [getattr(part, "key", None) for part in path]
        packed = keys[0] == COLLECTION and keys[-1] == "kernel"
        total += np.size(leaf) * (weights.bits / 8 if packed else np.dtype(leaf.dtype).itemsize)
    return total
