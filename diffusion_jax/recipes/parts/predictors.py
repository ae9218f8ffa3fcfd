"""Small predictors of which all seeds are trained in one program, and what they know at each step of a run."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import denoisers, solvers
from diffusion_jax.config import build
from diffusion_jax.sampling import sample


def trained_together(config: ConfigDict) -> dict[str, Any]:
    """Parameters `[n, ...]` of the predictor of `config.arm`, trained at each of `config.seeds` in one program."""
    arm = config.arm
    source, network, process, optimizer = (build(arm[name]) for name in ("data", "model", "process", "optimizer"))
    objective = build(arm.objective, network=network, process=process)
    whole = jax.tree.map(jnp.asarray, source.take(np.arange(len(source))))

    def trained(key):
        first = jax.tree.map(lambda leaf: leaf[:1], whole)
        params = network.init(key, first["x0"], jnp.zeros(1), first["cond"])

        def update(carry, i):
            params, state = carry
            here = jax.random.fold_in(key, i)
            rows = jax.random.randint(here, (arm.train.batch_size,), 0, len(source))
            batch = {**jax.tree.map(lambda leaf: leaf[rows], whole), "index": jnp.arange(arm.train.batch_size)}
            slopes = jax.grad(lambda params: objective.loss(params, (), batch, here)[0].mean())(params)
            change, state = optimizer.update(slopes, state, params)
            return (jax.tree.map(jnp.add, params, change), state), None

        return jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(arm.train.steps))[0][0]

    keys = jax.vmap(jax.random.key)(jnp.asarray(config.seeds))
    return {"params": jax.device_get(jax.jit(jax.vmap(trained))(keys))}


def error_program(arm: ConfigDict, steps: int) -> Callable[..., Any]:
    """`(params [n, ...], seeds [n], grid [steps + 1]) -> [n, steps]`, of deterministic DDIM on the held-out data."""
    kept = denoisers.recorded(denoisers.denoiser(build(arm.model), build(arm.process)), steps)
    held = build(arm.held_out).take(np.arange(arm.held_out.length))

    def errors(params, seed, grid):
        run = {"cond": held["cond"], "shape": held["x0"].shape}
        ran = sample(jax.random.key(seed), kept, params, solvers.ddim(), grid, **run)
        return jnp.sqrt(jnp.square(ran.run.carry.values - held["x0"]).mean(axis=(1, 2)))

    return jax.jit(jax.vmap(errors, in_axes=(0, 0, None)))
