"""Edits of networks, from which methods are built: taps, overrides, gates, caches, early exits, other weights.

Each returns an `interception.Edit` for `interception.intercepted`. The decisions of a method (which layers, which
values) are data in the edit's collections; denoisers make them.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.models.interception import ByAnatomy, Edit, Select
from diffusion_jax.models.layers.attention import Attention
from diffusion_jax.models.layers.branches import CARRIED, Block, Branch
from diffusion_jax.models.layers.convolution import ResidualBranch
from diffusion_jax.models.layers.mlp import FeedForward
from diffusion_jax.models.layers.spatial import SpatialMlp
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Anatomy


@ByAnatomy
def inner_modules(module: nn.Module, anatomy: Anatomy | None) -> bool:
    """Selects what residual branches compute before their gates: attention and feed-forward modules, and branches that
    have neither (convolutions). Those of a text encoder within the network are left alone: they do not see t."""
    if of_condition(module, anatomy):
        return False
    if isinstance(module, Attention | FeedForward):
        return isinstance(module.parent, Branch)
    return isinstance(module, ResidualBranch | SpatialMlp)


def of_condition(module: nn.Module, anatomy: Anatomy | None) -> bool:
    """Whether a module belongs to what reads the condition and no x."""
    path = "/".join(module.path)
    return anatomy is not None and any(path.startswith(f"{one}/") for one in anatomy.condition)


def edit(
    select: Select,
    function: Callable[..., Any],
    data: Mapping[str, Any] | None = None,
    collection: str = "data",
) -> Edit:
    """Replaces the output of the selected modules by `function(run, data, *args)`.

    run(*args) computes the module's own output (only if it is called). data: names and start values of what the
    function is told, in `collection`, stacked over depth; a start value may be a function of the module's output.
    """
    data = {} if data is None else dict(data)

    def apply(site, *args):
        told = {}
        for name, start in data.items():
            told[name] = site.get(collection, name, lambda s=start: s(site.run(*args)) if callable(s) else s)
        return function(site.run, told, *args)

    return Edit(select, apply, (collection,) if data else ())


def taps(
    select: Select,
    read: Callable[..., Any] = lambda output, *args: output,
    name: str = "output",
    collection: str = "taps",
) -> Edit:
    """Reports `read(output, *args)` of the selected modules in `extras["taps"]`, stacked over depth.

    The output is untouched. Queries and keys: `taps("attend", lambda out, q, k, v, mask: (q, k))`; attention maps:
    the same with `layers.attention_probabilities(q, k, mask)`.
    """

    def apply(site, *args):
        output = site.run(*args)
        site.put(collection, name, read(output, *args))
        return output

    return Edit(select, apply, (), (collection,))


def replaced(select: Select, value: Callable[[Any], Any], collection: str, name: str = "output") -> Edit:
    """Puts `value(entry)` in place of modules, which are not run; `collection` has an entry for each, and is only read.

    Its structure is that which `taps` reports; in stacks, entries have the depth first.
    """
    return Edit(select, lambda site, *args: value(site.get(collection, name, dict)))


def override(select: Select, collection: str = "overrides") -> Edit:
    """Replaces outputs by `collection/.../value` in the layers where `.../use` is True (nowhere, to begin with)."""

    def function(run, data, *args):
        return jnp.where(data["use"], data["value"], run(*args))

    return edit(select, function, {"use": False, "value": jnp.zeros_like}, collection)


def gates(select: Select, collection: str = "gates", skip: bool = False) -> Edit:
    """Multiplies outputs by `collection/.../gate`, 1 to begin with.

    skip: where a layer's gate is 0 the module is not computed at all; for residual branches, whose output has the
        shape of their first argument.
    """

    def apply(site, *args):
        gate = site.get(collection, "gate", lambda: 1.0)
        if not skip or site.initialising:
            output = site.run(*args)
        else:
            output = site.run_if(gate != 0, lambda h, *rest: jnp.zeros_like(h), *args)
        return (gate * output).astype(output.dtype)

    return Edit(select, apply, (collection,), skips=skip)


def cached(
    select: Select,
    start: Callable[[Any], Any] = jnp.zeros_like,
    update: Callable[..., Any] = lambda state, output, data: output,
    predict: Callable[..., Any] = lambda state, data: state,
    data: Mapping[str, Any] | None = None,
    collection: str = "cache",
    policy: str = "policy",
) -> Edit:
    """Computes the selected modules in the layers where `policy/.../refresh` is True, and predicts them elsewhere.

    start(output) -> state; update(state, output, data) -> state, after computing; predict(state, data) -> output,
    instead of computing. The default keeps the last output. `data` holds more entries of the policy, with their start
    values (a step's distance, coefficients).
    """
    data = {} if data is None else dict(data)

    def apply(site, *args):
        refresh = site.get(policy, "refresh", lambda: True)
        told = {name: site.get(policy, name, lambda s=value: s) for name, value in data.items()}
        state = site.get(collection, "state", lambda: start(site.run(*args)))
        if site.initialising:
            return site.run(*args)
        output = site.run_if(refresh, lambda *inputs: predict(state, told), *args)
        state = jax.lax.cond(refresh, lambda: update(state, output, told), lambda: state)
        site.put(collection, "state", state)
        return output

    return Edit(select, apply, (collection, policy), skips=True)


def exits(
    decide: Callable[..., Any] = lambda data, output, *args: data["stop"],
    data: Mapping[str, Any] | None = None,
    select: Select = lambda module: isinstance(module, Block),
    policy: str = "exit",
) -> Edit:
    """Lets each sample leave a stack of blocks early: behind the first block for which `decide` is True.

    decide(data, output, h, c, side) -> bool, `[B]` or one for all; `output` is what the block made of h. A sample that
    has left stays as it is, whatever the others do; once all have left, no block is computed any more.
    data: names and start values of what it is told, in the collection `policy`, stacked over depth; a start value may
        be a function of `(output, h, c, side)`. By default `{"stop": False}`, and `stop [L]` or `[L, B]` decides.

    `extras["flow"]` tells whether a sample has left (`left [B]`), how many blocks it ran (`executed [B]`) and how many
    were computed (`computed`, the deepest sample's). Within scanned stacks only: elsewhere there is no next block to
    pass anything to.
    """
    data = {"stop": False} if data is None else dict(data)

    def apply(site, h, *args):
        batch = h.shape[0]
        left = site.get(CARRIED, "left", lambda: jnp.zeros(batch, bool))
        executed = site.get(CARRIED, "executed", lambda: jnp.zeros(batch, jnp.int32))
        computed = site.get(CARRIED, "computed", lambda: jnp.int32(0))
        going = ~left.all()
        output = site.run_if(going, lambda h, *inputs: h, h, *args)
        output = jnp.where(expand(left, h), h, output)
        told = {
            name: site.get(policy, name, lambda s=start: s(output, h, *args) if callable(s) else s)
            for name, start in data.items()
        }
        site.put(CARRIED, "computed", computed + going)
        site.put(CARRIED, "executed", executed + ~left)
        site.put(CARRIED, "left", left | decide(told, output, h, *args))
        return output

    return Edit(select, apply, (policy, CARRIED), skips=True)


def reweighted(
    select: Select,
    function: Callable[..., Any],
    data: Mapping[str, Any] | None = None,
    collection: str = "weights",
) -> Edit:
    """Runs the selected leaf modules (Dense, Conv) with `function(params, data) -> params`: rounding, masks, mixtures.

    data: names and start values in `collection`, stacked over depth; a start value may be a function of the params.
    """
    data = {} if data is None else dict(data)

    def apply(site, *args):
        told = {
            name: site.get(collection, name, lambda s=start: s(site.params) if callable(s) else s)
            for name, start in data.items()
        }
        if site.initialising:
            return site.run(*args)
        return site.run_with(function(site.params, told), *args)

    return Edit(select, apply, (collection,) if data else ())
