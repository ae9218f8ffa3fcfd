"""Blocks with smaller weights: heads and hidden units that gates leave out are cut out of the matrices.

What a gate multiplies by 0 need not be computed. Where gates are known beforehand, because they depend on the timestep
alone (`adapters.routed`), each block is run with the rows and columns that it uses at this step: equal to the gated
network to rounding, at the cost of its executed share. Shapes are static, so steps are put into a few buckets; within a
bucket a block keeps what any of its steps uses, and rows that the step at hand leaves out are multiplied by 0.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import InvalidInput
from diffusion_jax.models.anatomy import anatomy_of, collects, module_params, required
from diffusion_jax.models.interception import Edit, wrapped
from diffusion_jax.models.layers.attention import Attention
from diffusion_jax.models.layers.branches import CARRIED, Block, constrain_activations
from diffusion_jax.models.layers.mlp import FeedForward
from diffusion_jax.models.paths import at_path, by_path
from diffusion_jax.models.stages import for_blocks, main_stack, of_blocks
from diffusion_jax.typing import Network


class Sliced(NamedTuple):
    """A network with smaller blocks.

    cut: params -> slices, the weights of each bucket and block; done once.
    network: a `Network` whose parameters are those of the whole network in "params" (and its collections, if it has
        edits of its own), "slices", "bucket", an int32, and "gates", `[L, 1, K]` a leaf, of the step at hand.
    """

    cut: Callable[[Any], Any]
    network: Network


def sliced(network: Network, masks: Sequence[Any]) -> Sliced:
    """`network` with, in bucket b, the heads and hidden units where `masks[b]` is true; see `Sliced`.

    masks: concrete trees like the collection `gates` of `routing.width_gates`, `[L, K]` a leaf. A gate that is on where
    its mask is false has no weights to act on. Edits of what lies within the blocks stay in force, but report nothing,
    and factors beside the weights (`adapters.lora`) must have been merged into them.
    Raises InvalidInput unless the gates are those of one stack of blocks.
    """
    path = f"{required(network, 'stack', 'sliced')}/block"
    masks = [_of_blocks(path, jax.tree.map(lambda leaf: np.asarray(leaf, bool), mask)) for mask in masks]
    depth = jax.tree.leaves(masks[0])[0].shape[0]
    joined = collects(network)

    def kept(bucket, layer):
        return jax.tree.map(lambda leaf: np.flatnonzero(leaf[layer]), masks[bucket])

    @jax.jit
    def cut(params):
        blocks = of_blocks(network, module_params(network, params))

        def of(bucket, layer):
            return _cut(_at(blocks, layer), masks[bucket], kept(bucket, layer), layer)

        return tuple(tuple(of(bucket, layer) for layer in range(depth)) for bucket in range(len(masks)))

    def around(inner, params, x, t, cond, train, key):
        params = dict(params)
        slices, bucket = params.pop("slices"), params.pop("bucket")
        gates = _of_blocks(path, params.pop("gates"))

        def run(site, h, c, side):
            stack = site.module
            others = {n: tree["block"] for n, tree in stack.variables.items() if n not in ("params", CARRIED)}

            def through(number):
                def function(h):
                    for layer in range(depth):
                        on = jax.tree.map(lambda gate, own: gate[0, own], _at(gates, layer), kept(number, layer))
                        variables = {**_at(others, layer), "params": _gated(slices[number][layer], on)}
                        vector = c[layer] if stack.stacked else c
                        h = Block(stack.branches).apply(variables, h, vector, side.of_block(layer))
                    return h

                return function

            return jax.lax.switch(bucket, [through(number) for number in range(len(masks))], constrain_activations(h))

        edits = Edit(main_stack, run), Edit(lambda m: isinstance(m, Attention | FeedForward), _as_wide_as_weights)
        return inner(params if joined else params["params"], x, t, cond, train, key, edits=edits)

    def init(key, x, t, cond=None):
        params = network.init(key, x, t, cond)
        ones = for_blocks(network, jax.tree.map(lambda leaf: jnp.ones((depth, 1, leaf.shape[1])), masks[0]))
        whole = params if joined else {"params": params}
        return {**whole, "slices": cut(params), "bucket": jnp.int32(0), "gates": ones}

    # Slices run the blocks in their own way, so nothing else may run them one by one.
    anatomy = anatomy_of(network)._replace(stack="")
    return Sliced(cut, wrapped(network, around, init, () if joined else ("params",), anatomy))


def _at(tree, layer):
    return jax.tree.map(lambda leaf: leaf[layer], tree)


def _of_blocks(path, gates):
    if strange := sorted(other for other in by_path(gates) if not other.startswith(f"{path}/")):
        raise InvalidInput(f"sliced needs gates of one stack of blocks, {path}; there are {', '.join(strange)}.")
    return at_path(gates, path)


def _cut(params, mask, kept, layer):
    """The parameters of a block, or a module in it, with what is kept: where gates are, the module there is cut."""
    if "attend" in mask:
        return _cut_module(params, mask["attend"]["gate"][layer], kept["attend"]["gate"], ("q", "k", "v"), "out")
    if "up" in mask:
        return _cut_module(params, mask["up"]["gate"][layer], kept["up"]["gate"], ("up", "gate"), "down")
    return {
        name: _cut(entry, mask[name], kept[name], layer) if name in mask else entry for name, entry in params.items()
    }


def _cut_module(params, mask, kept, wide, narrow):
    """Columns of the `wide` matrices and rows of the `narrow` one, those of the kept parts."""
    share = params[narrow]["kernel"].shape[0] // len(mask)
    index = (kept[:, None] * share + np.arange(share)).reshape(-1)
    columns = {n: {k: leaf[..., index] for k, leaf in params[n].items()} for n in wide if n in params}
    return {**params, **columns, narrow: {**params[narrow], "kernel": params[narrow]["kernel"][index]}}


def _gated(params, on):
    """A block's parameters under the gates of a step: rows of parts that are off are 0."""
    for inner, narrow in (("attend", "out"), ("up", "down")):
        if inner in on:
            kernel = params[narrow]["kernel"]
            rows = jnp.repeat(on[inner]["gate"], kernel.shape[0] // len(on[inner]["gate"]))
            return {**params, narrow: {**params[narrow], "kernel": kernel * rows[:, None].astype(kernel.dtype)}}
    return {name: _gated(entry, on[name]) if name in on else entry for name, entry in params.items()}


def _as_wide_as_weights(site, x, *args):
    """Runs an attention or feed-forward layer in the size of the weights that it was given."""
    module, params = site.module, site.params
    if isinstance(module, Attention):
        size = module.head_dim or x.shape[-1] // module.heads
        fields = {"heads": params["q"]["kernel"].shape[-1] // size, "head_dim": size}
        whole = fields["heads"] == module.heads
    else:
        fields = {"hidden": params["up"]["kernel"].shape[-1]}
        whole = module.hidden == fields["hidden"]
    if whole or site.initialising:
        return site.run(x, *args)
    return module.clone(parent=None, name=None, **fields).apply(module.variables, x, *args)
