"""Exits behind every block of a network: a prediction from the features there, and an estimate of its error.

The exit behind block i is the network's own tail (or a copy of it, trained for these features), and beside it a linear
layer estimates the error of that prediction, in the entries of the data (Tang et al. 2023, DeeDiff; later AdaDiff):

    u_i = sigmoid(W_i h_i + V_i c + b_i),        leave at the first i with  mean(u_i) <= threshold             (1)

h_i are the tokens behind block i and c is what conditions the block: the embedding of t, to which labels are added. The
network is unchanged, and what exits need is a tree beside its parameters. It has to be one stack of blocks: no tail of
a U-Net reads the features of its other levels, and its skip connections lead to those that would be left out.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.models.anatomy import anatomy_of, module_params, required, with_module_params
from diffusion_jax.models.edits import exits, taps
from diffusion_jax.models.interception import Edit, intercepted, located
from diffusion_jax.models.layers.branches import CARRIED
from diffusion_jax.models.layers.modulation import expand_vector
from diffusion_jax.models.paths import at_path, replaced_at
from diffusion_jax.models.stages import checked, for_blocks, main_block, main_stack, of_blocks, staged
from diffusion_jax.typing import Network

HEADS = ("shared", "own")
"""The tail of an exit: the network's, or for each block a copy of the layers that follow the stack."""

_UNCERTAINTY, _STOP, _REPORT = "uncertainty", "exit", "behind"


class Layers(NamedTuple):
    """The predictions of all exits, `[L, B, ...]`: an output, and the uncertainty of each of its entries."""

    output: Float[Array, "L B *data"]
    uncertainty: Float[Array, "L B *data"]


class EarlyExit(NamedTuple):
    """A network that may be left behind each of its blocks; parameters are `{"params": params, "exits": exits}`.

    init: (key, params, x, t, cond) -> exits     estimators (and heads), stacked over depth, beside the network
    network: a `Network` that runs all blocks and returns `Layers`: for training and calibration
    leave: (params, x, t, cond, threshold) -> (output, extras)    rule (1), each sample by itself
    stop: (params, x, t, cond, blocks) -> (output, extras)        behind so many blocks, one int or `[B]`, no estimates
    gather: as `leave`, by running everything: what `leave` must equal
    depth: L

    extras: `exit_depth [B]`, the blocks a sample ran, and `blocks`, how many were computed: those of the deepest.
    """

    init: Callable[..., Any]
    network: Network
    leave: Callable[..., tuple[Any, dict]]
    stop: Callable[..., tuple[Any, dict]]
    gather: Callable[..., tuple[Any, dict]]
    depth: int


def early_exit(network: Network, heads: str = "shared") -> EarlyExit:
    """Exits for `network`: a DiT, PixArt, video transformer, text-conditional or not, an MLP, or any network whose
    anatomy has a stack and the layers behind it.

    heads: "shared", one tail for all (train network and estimators together), or "own", a copy of the layers behind the
        stack for each block (a frozen network). Estimates see detached features, so they never train the network.

    Raises InvalidInput for networks that are not one stack of blocks of one array of data, and for unknown heads.
    """
    if heads not in HEADS:
        raise unknown("heads", heads, HEADS)
    if anatomy_of(network).cuts:
        raise InvalidInput("early_exit needs one stack of blocks: no tail of a U-Net reads the features of its levels.")
    stack, depth, last = (required(network, field, "early_exit") for field in ("stack", "depth", "last"))
    stages = staged(network)

    def with_head(params, head):
        inner = module_params(network, params)
        for path in last if head else ():
            inner = replaced_at(inner, path, at_path(head, path))
        return with_module_params(network, params, inner)

    def init(key, params, x, t, cond=None):
        made = intercepted(network, _reading(x)).init(key, params, x, t, cond)
        plain, behind = module_params(network, params), {}
        for path in last if heads == "own" else ():
            behind = replaced_at(behind, path, at_path(plain, path))
        copies = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], depth, axis=0), behind)
        # No empty entry: checkpoints do not keep those.
        return {_UNCERTAINTY: made[_UNCERTAINTY], **({"heads": copies} if copies else {})}

    def network_init(key, x, t, cond=None):
        first, second = jax.random.split(key)
        params = network.init(first, x, t, cond)
        return {"params": params, "exits": init(second, params, x, t, cond)}

    def every(params, x, t, cond, train, key):
        """`((output [L, ...], extras [L, ...]), uncertainty [L, ...])`."""
        base, own = params["params"], params["exits"]
        reading = intercepted(network, _reading(x))
        _, extras, _ = reading.apply(base, {_UNCERTAINTY: own[_UNCERTAINTY]}, x, t, cond, train, key)
        behind = of_blocks(network, extras[_REPORT])

        def tail(head, h):
            return stages.tail(with_head(base, head), h, x, t, cond)

        # One head is not copied for every block.
        each = jax.vmap(tail, in_axes=(0 if heads == "own" else None, 0))
        maps = jax.vmap(lambda values: _laid_out(network, base, values, x, t, cond))
        return each(own.get("heads", {}), behind["features"]), maps(behind["uncertainty"])

    def all_layers(params, x, t, cond=None, train=False, key=None):
        (outputs, _), uncertainty = every(params, x, t, cond, train, key)
        return Layers(outputs, uncertainty), {}

    def left(params, edit, collection, x, t, cond):
        base, own = params["params"], params["exits"]
        copies = jax.tree.leaves(own.get("heads", {}))
        whole = Edit(main_stack, lambda site, *args: checked(site, depth).run(*args))
        edits = (edit, whole, taps(main_stack, collection=_REPORT)) if copies else (edit, whole)
        output, extras, _ = intercepted(network, *edits).apply(base, collection, x, t, cond)
        flow = of_blocks(network, extras[CARRIED])
        if copies:
            h, which = at_path(extras[_REPORT], stack)["output"], flow["executed"] - 1

            def tail(which, h, x, t, cond):
                head = jax.tree.map(lambda leaf: leaf[which], own["heads"])
                one = jax.tree.map(lambda leaf: leaf[None], (h, x, t, cond))
                return jax.tree.map(lambda leaf: leaf[0], stages.tail(with_head(base, head), *one))

            output, extras = jax.vmap(tail)(which, h, x, t, cond)
        extras = {name: extras[name] for name in extras if name not in (CARRIED, _REPORT)}
        return output, {**extras, "exit_depth": flow["executed"], "blocks": flow["computed"]}

    def leave(params, x, t, cond, threshold):
        def decide(told, *args):
            return _mean(_estimate(told, *args)) <= threshold

        edit = exits(decide, _starts(x), main_block, _UNCERTAINTY)
        return left(params, edit, {_UNCERTAINTY: params["exits"][_UNCERTAINTY]}, x, t, cond)

    def stop(params, x, t, cond, blocks):
        blocks = jnp.asarray(blocks)
        behind = jnp.arange(1, depth + 1).reshape(-1, *(1,) * blocks.ndim) >= blocks
        collection = {_STOP: for_blocks(network, {"stop": behind})}
        return left(params, exits(select=main_block, policy=_STOP), collection, x, t, cond)

    def gather(params, x, t, cond, threshold):
        answers, uncertainty = every(params, x, t, cond, False, None)
        sure = jax.vmap(_mean)(uncertainty) <= threshold
        index = jnp.where(sure.any(axis=0), sure.argmax(axis=0), depth - 1)
        output, extras = jax.tree.map(lambda leaf: leaf[index, jnp.arange(index.size)], answers)
        return output, {**extras, "exit_depth": (index + 1).astype(jnp.int32), "blocks": jnp.int32(depth)}

    return EarlyExit(init, Network(network_init, all_layers), leave, stop, gather, depth)


def _reading(x):
    """Reports the tokens behind each block and what its estimator makes of them."""
    starts = _starts(x)

    def apply(site, *args):
        output = site.run(*args)
        told = {name: site.get(_UNCERTAINTY, name, lambda s=start: s(output, *args)) for name, start in starts.items()}
        site.put(_REPORT, "features", output)
        site.put(_REPORT, "uncertainty", _estimate(told, output, *args))
        return output

    return Edit(main_block, apply, (_UNCERTAINTY,), (_REPORT,))


def _starts(x):
    """The estimator of a block, which begins at u = 1/2 everywhere; one value for each entry of the data."""
    if isinstance(x, Mapping):
        raise InvalidInput(f"early exit is for data of one array; there are {', '.join(x)}.")

    def entries(h):
        return math.prod(x.shape[1:]) // math.prod(h.shape[1:-1])

    return {
        "tokens": lambda output, h, c, side: jnp.zeros((h.shape[-1], entries(h))),
        "condition": lambda output, h, c, side: jnp.zeros((c.shape[-1], entries(h))),
        "bias": lambda output, h, c, side: jnp.zeros(entries(h)),
    }


def _estimate(told, output, h, c, side):
    """u `[B, tokens, K]` of equation (1)."""
    output, c = jax.lax.stop_gradient((output.astype(jnp.float32), c.astype(jnp.float32)))
    return jax.nn.sigmoid(output @ told["tokens"] + expand_vector(c @ told["condition"] + told["bias"], output))


def _laid_out(network, params, values, x, t, cond):
    """Values `[B, tokens, K]` as data, in the way in which the module lays out those of its output layer; what stands
    around the network would change them."""

    def apply(site, h):
        shape = site.run(h).shape
        # A last layer that says more, variances for example, has that behind the channels.
        channels = values.reshape(*values.shape[:-1], -1, x.shape[-1])
        more = shape[-1] * x.shape[-1] // values.shape[-1] - x.shape[-1]
        return jnp.pad(channels, [(0, 0)] * (channels.ndim - 1) + [(0, more)]).reshape(shape)

    whole = taps(lambda module: not module.path, lambda output, *args: output[0], collection=_REPORT)
    edits = whole, Edit(main_stack, lambda site, h, *args: h), Edit(located(lambda anatomy: anatomy.last[-1]), apply)
    extras = intercepted(network, *edits).apply(params, {}, x, t, cond)[1]
    return extras[_REPORT]["output"][..., : x.shape[-1]]


def _mean(values):
    return values.reshape(values.shape[0], -1).mean(axis=1)
