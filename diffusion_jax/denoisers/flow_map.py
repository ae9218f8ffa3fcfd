"""The flow map of a denoiser: what a perfect few-step student of it would predict."""

import jax
import jax.numpy as jnp

from diffusion_jax.clock import clock
from diffusion_jax.denoisers.base import cost_like
from diffusion_jax.errors import invalid
from diffusion_jax.processes import need_gaussian
from diffusion_jax.typing import NO_COST, Denoiser


def flow_map(inner: Denoiser, steps: int = 32) -> Denoiser:
    """Answers at (x, t) with the x0 to which the probability flow of `inner` takes x, in `steps` equal steps of DDIM:

        x <- alpha(t') x0(x, t) + sigma(t') eps(x, t),        t' from t down to 0                               (1)

    the map that consistency models learn (Song et al. 2023), here computed by evaluating `inner` in every step. Use it
    as a student without an error of its own, as a reference, or as a teacher for `objectives.imitation`. The cost is
    that of all steps.
    Raises InvalidInput for fewer than one step, and for a process that is not Gaussian.
    """
    if steps < 1:
        raise invalid("steps", steps, "at least one step was expected")
    need_gaussian("flow_map", inner.process)

    def apply(params, carry, x, step, cond):
        def grid(t):
            t = jnp.asarray(t)
            return jnp.linspace(1.0, 0.0, steps + 1).reshape(-1, *(1,) * t.ndim) * t

        ticks = clock(jax.tree.map(grid, step.t))

        def one(run, index):
            at, own, cost = run
            now = ticks.step(index)._replace(key=step.key)
            said, own = inner.apply(params, own, at, now, cond)
            at = inner.process.marginal(said.x0, said.eps, now.t_next)
            return (at, own, cost_like(cost + said.cost)), None

        start = x, inner.init(params, x, cond), cost_like(NO_COST)
        (x0, _, cost), _ = jax.lax.scan(one, start, jnp.arange(steps))
        return inner.process.from_x0(x0, x, step.t)._replace(cost=cost), carry

    return Denoiser(lambda params, x, cond: (), apply, inner.process)
