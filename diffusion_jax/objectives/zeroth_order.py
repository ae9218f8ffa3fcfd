"""Gradients from values of the loss alone (Nesterov & Spokoiny 2017), as in Seo et al. 2025, ZOODiP.

    g  =  1/n sum_i  (L(theta + mu e_i) - L(theta)) / mu  e_i,        e_i ~ N(0, I_d)                              (1)

has the mean grad L + O(mu), and E|g|^2 is about (d + n + 1) / n |grad L|^2. All n + 1 values are of the same examples,
times and noise, or the variance would grow as 1 / mu^2. Nothing is differentiated, so no activations are stored, and
the network may round.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from diffusion_jax.distributed import BATCH_AXES, automatic
from diffusion_jax.errors import invalid
from diffusion_jax.objectives.batches import refuse_gradient
from diffusion_jax.randomness import fold
from diffusion_jax.typing import Number, Objective, Params

DIRECTIONS_KEY = 11


def zeroth_order_gradient(
    loss: Callable[[Params], tuple[Float[Array, ""], Any]],
    params: Params,
    key: Any,
    directions: int = 2,
    radius: Number | Array = 1e-3,
    parallel: int = 1,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], Params, Any]:
    """Equation (1): (the loss of `params`, g, what else `loss` answered there).

    loss: params -> (value [], anything); it must use the same noise whenever it is called.
    directions, radius: n and mu. parallel: how many directions are evaluated at once; the memory is that of as many
    forward passes. mesh: its devices share the directions, all evaluated at once then. Directions are drawn from their
    keys again where they are summed, so none is kept.

    Raises InvalidInput for numbers below 1, a radius that is not positive, parameters that are not float32 (the
    difference of two losses would drown in rounding), and directions that do not divide among the devices.
    """
    _check(directions, radius, parallel, mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.asarray(leaf).dtype != jnp.float32:
            raise invalid(f"params{jax.tree_util.keystr(path)}", jnp.asarray(leaf).dtype, "float32 is needed")
    params = jax.tree.map(jnp.asarray, params)
    here, aux = loss(params)
    keys = jax.random.split(key, directions)

    def slope(key):
        moved = jax.tree.map(lambda leaf, e: leaf + radius * e, params, _direction(key, params))
        return (loss(moved)[0] - here) / radius

    if mesh is None:
        slopes = (
            jax.lax.map(slope, keys, batch_size=min(parallel, directions))
            if parallel > 1
            else (jax.lax.map(slope, keys))
        )
    else:
        layout = NamedSharding(automatic(mesh), PartitionSpec(BATCH_AXES))
        slopes = jax.vmap(slope)(jax.lax.with_sharding_constraint(keys, layout))

    def add(total, one):
        key, slope = one
        return jax.tree.map(lambda leaf, e: leaf + slope / directions * e, total, _direction(key, params)), None

    return here, jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (keys, slopes))[0], aux


def zeroth_order(
    objective: Objective,
    directions: int = 2,
    radius: Number | Array = 1e-3,
    parallel: int = 1,
    mesh: Mesh | None = None,
) -> Objective:
    """`objective`, whose gradient is that of `zeroth_order_gradient`; see there for the arguments and errors.

    The key of a step fixes times and noise of all n + 1 evaluations, and the directions. What is not to be learned
    must not be in the parameters: d is their number, and the variance grows with it (`objectives.trained_part`).
    """
    refuse_gradient(objective, "zeroth_order")
    _check(directions, radius, parallel, mesh)

    def gradient(params, state, batch, key):
        def mean(params):
            losses, aux = objective.loss(params, state, batch, key)
            return jnp.mean(losses.astype(jnp.float32)), aux

        return zeroth_order_gradient(mean, params, fold(key, DIRECTIONS_KEY), directions, radius, parallel, mesh)

    return objective._replace(gradient=gradient)


def _direction(key, params):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([jax.random.normal(k, jnp.shape(leaf)) for k, leaf in zip(keys, leaves, strict=True)])


def _check(directions, radius, parallel, mesh):
    for name, value in (("directions", directions), ("parallel", parallel)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise invalid(name, value, "it must be a whole number of at least 1")
    if isinstance(radius, int | float) and not radius > 0:
        raise invalid("radius", radius, "it must be positive")
    if mesh is not None:
        share = 1
        for axis in BATCH_AXES:
            share *= mesh.shape[axis]
        if directions % share:
            raise invalid("directions", directions, f"it must divide among the {share} devices of the mesh")
