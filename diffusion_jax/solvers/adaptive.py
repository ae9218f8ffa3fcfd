"""The probability-flow ODE by a Runge-Kutta method that chooses its own steps (diffrax)."""

import jax
import jax.numpy as jnp

from diffusion_jax.errors import invalid
from diffusion_jax.solvers.base import per_modality, stateless
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Cost, Counted, Solver

# One evaluation starts the method (and serves the choice of the first step); each tried step takes six more,
# for the last stage of one step is the first of the next.
_STARTING, _EACH_STEP = 1, 6


def adaptive(rtol: float = 1e-4, atol: float = 1e-4, max_steps: int = 1000) -> Solver:
    """`dx/dt = alpha' x0 + sigma' eps` from t to t_next by Tsit5 (order 5) to a tolerance, in each step of the grid.

    With the grid `[1, 0]` the whole run is one integration. A vector of times moves together: `t + u (t' - t)`, u from
    0 to 1. rtol, atol: the error allowed per internal step, relative and absolute. The internal steps are chosen for
    the batch as a whole, so samples of different batches agree to the tolerance, not bit for bit. Network evaluations
    are counted from the steps that were tried. The denoiser's carry stays as it is: use it without caches.
    Where `max_steps` internal steps are not enough the result is NaN. Raises InvalidInput for values not positive.
    """
    for field, value in (("rtol", rtol), ("atol", atol), ("max_steps", max_steps)):
        if value <= 0:
            raise invalid(field, value, "it must be positive")
    # It and its own packages take a third of a second to import: they are paid for by those who use it.
    import diffrax

    def step(process, denoise, carry, state, x, step, key):
        def at(u):
            return jax.tree.map(lambda a, b: a + u * (b - a), step.t, step.t_next)

        def field(u, x, args):
            t = at(u)
            answer, _ = denoise(carry, x, step._replace(t=t))
            return per_modality(_velocity, process, x, answer.x0, answer.eps, t, step.t, step.t_next)

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            t0=0.0,
            t1=1.0,
            dt0=None,
            y0=x,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            max_steps=max_steps,
            throw=False,
        )
        done = solution.result == diffrax.RESULTS.successful
        x = jax.tree.map(lambda ys: jnp.where(done, ys[-1], jnp.nan), solution.ys)
        # What one evaluation costs; its prediction is not used, so the compiled program does not make it.
        _, probe = denoise(carry, x, step)
        evaluations = (_STARTING + _EACH_STEP * solution.stats["num_steps"]).astype(jnp.float32)
        spent = jax.tree.map(lambda new, old: evaluations * (new - old), probe.cost, carry.cost)
        return x, state, Counted(carry.carry, carry.cost + Cost(*spent))

    return Solver(stateless("adaptive"), step, order=5)


def _velocity(process, x, x0, eps, t, start, end):
    """The velocity along u; a rate that is infinite (at t = 0 for some schedules) is left out."""
    finite = [jnp.where(jnp.isfinite(rate), rate, 0.0) for rate in process.rates(t)]
    alpha_rate, sigma_rate = (expand(rate * (end - start), x) for rate in finite)
    return alpha_rate * x0 + sigma_rate * eps
