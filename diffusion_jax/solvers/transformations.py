"""Wrappers of solvers, which act before and after each step: inpainting, constraints, optimisation of the latent.

All are made by `with_hooks` from small functions of x, and work with any solver.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.processes.schedules import safe_sqrt
from diffusion_jax.randomness import fold, normal_like
from diffusion_jax.solvers.base import per_modality
from diffusion_jax.time_axes import batch_axes, each, expand, where
from diffusion_jax.typing import Solver

_BEFORE, _AFTER, _WITHIN = 1_000_001, 1_000_002, 1_000_003


def with_hooks(
    solver: Solver, before: Callable | None = None, after: Callable | None = None, within: Callable | None = None
) -> Solver:
    """`solver` with `x = before(process, x, step, key)` before each step and `x = after(...)` after it.

    before sees x at `step.t`, after sees it at `step.t_next`. within: `x = within(...)` before each evaluation of a
    step but its first, whose time is the `t` of the step that it sees. Each gets keys of its own, one per sample. The
    loop still returns entries that do not move as they were. Wrappers nest: the outermost `before` runs first.
    """

    def step(process, denoise, carry, state, x, step, key):
        if before is not None:
            x = before(process, x, step, fold(key, _BEFORE))
        asked = denoise if within is None else _between_evaluations(process, denoise, within, key)
        x, state, carry = solver.step(process, asked, carry, state, x, step, key)
        if after is not None:
            x = after(process, x, step, fold(key, _AFTER))
        return x, state, carry

    return solver._replace(step=step)


def _between_evaluations(process, denoise, within, key):
    """`denoise` whose x goes through `within` first, from its second question on."""
    questions = itertools.count()

    def asked(carry, x, step):
        number = next(questions)
        return denoise(carry, within(process, x, step, fold(key, _WITHIN + number)) if number else x, step)

    return asked


def strided(solver: Solver, num_train_steps: int = 1000) -> Solver:
    """`solver` with every step going `T // S` indices down from where it starts, whatever the grid says.

    T is `num_train_steps`, S the steps of the run; no step goes below the last time of the grid. diffusers' DDIM and
    PNDM do this: where the grid has other gaps (S does not divide T, spacing 'linspace'), x is taken to a time other
    than that at which it is seen next. Where the gaps are `T // S` it is `solver`.
    """

    def init(process, x, grid):
        return solver.init(process, x, grid), jax.tree.map(lambda g: jnp.asarray(g)[-1], grid)

    def step(process, denoise, carry, state, x, step, key):
        inner, end = state
        stride = num_train_steps // step.num_steps / num_train_steps

        def target(t, t_next, end):
            # Whole indices, so that a node of a table is met exactly.
            index = jnp.round((t - stride) * num_train_steps) / num_train_steps
            return jnp.where(t == t_next, t, jnp.maximum(index, end)).astype(jnp.result_type(t))

        aimed = step._replace(t_next=jax.tree.map(target, step.t, step.t_next, end))
        x, inner, carry = solver.step(process, denoise, carry, inner, x, aimed, key)
        return x, (inner, end), carry

    return Solver(init, step, solver.order, lambda state: (batch_axes(solver, state[0]), 0))


def inpainted(
    solver: Solver, known: Any, mask: Any, *, noise: Any = None, before: bool = True, within: bool = False
) -> Solver:
    """Inpainting: replaces the known region, noised to the current time, before and after each step.

    known: clean data like x, used where `mask` is true. mask: boolean, a prefix of the data's shape (a dict of both for
        joint data).
    noise: the noise of the known region, kept for the whole run; fresh at each step when absent (discrete processes
        always draw afresh).
    before: whether also before each step; where False, what the run starts with stands for the known region in the
        first step, as in the Stable Diffusion pipelines.
    within: whether also between the evaluations of a step that asks several times, as in those pipelines.

    Works for every process that can `corrupt`. Lugmayr et al. 2022, equation 8.
    """
    release = jax.tree.map(lambda mask: jnp.where(jnp.asarray(mask), 0.0, 1.0), mask)
    return released(solver, known, release, noise=noise, before=before, within=within)


def released(
    solver: Solver, known: Any, release: Any, *, noise: Any = None, before: bool = True, within: bool = False
) -> Solver:
    """`inpainted` with a soft mask: each entry of the known region is held until the time has fallen to its `release`.

    release: times in [0, 1], a prefix of the data's shape: an entry is known while t is above, so 1 is never known, and
        0 is known to the end. The lower it is, the less is left for the entry to change in. Of images this is the
        soft mask of differential diffusion (Levin & Fried 2023, section 3.3, with the time in the place of the share
        of steps).
    The other arguments are those of `inpainted`.
    """

    def renoise(process, x, key, t):
        def region(process, x, known, release, noise, key, t):
            if noise is None:
                level, _ = process.corrupt(key, known, t)
            else:
                level = process.marginal(known, noise, t)
            release = expand(release, x)
            return jnp.where((expand(t, x) > release) | (release == 0), level.astype(x.dtype), x)

        keys = {name: fold(key, i) for i, name in enumerate(sorted(x))} if isinstance(x, dict) else key
        return per_modality(region, process, x, known, release, noise, keys, t)

    def at_its_time(process, x, step, key):
        return renoise(process, x, key, step.t)

    return with_hooks(
        solver,
        before=at_its_time if before else None,
        after=lambda process, x, step, key: renoise(process, x, key, step.t_next),
        within=at_its_time if within else None,
    )


def repainted(solver: Solver, known: Any, mask: Any, *, repeats: int = 5) -> Solver:
    """RePaint: each step is made `repeats` times, noised back to `step.t` in between (Lugmayr et al. 2022).

    The known region is replaced as in `inpainted`, so that the rest has time to agree with it. Costs `repeats` steps a
    step; meant for solvers without history, which would see the same step many times. A step that ends at sigma = 0
    also repeats. Gaussian processes only. Raises InvalidInput if repeats < 1.
    """
    if repeats < 1:
        raise invalid("repeats", repeats, "it must be at least 1")
    inner = inpainted(solver, known, mask)

    def step(process, denoise, carry, state, x, step, key):
        def back(process, x, noise, t, t_next):
            alpha = process.alpha(t_next)
            alpha = process.alpha(t) / jnp.where(alpha == 0, 1.0, alpha)
            added = safe_sqrt(jnp.clip(process.sigma(t) ** 2 - (alpha * process.sigma(t_next)) ** 2, 0.0))
            return expand(alpha, x) * x + expand(added, x) * noise

        def once(index, run):
            x, carry = run
            own = fold(key, index)
            returned = per_modality(back, process, x, normal_like(fold(own, _BEFORE), x), step.t, step.t_next)
            x = jax.tree.map(lambda a, b: jnp.where(index > 0, a, b), returned, x)
            x, _, carry = inner.step(process, denoise, carry, state, x, step, own)
            return x, carry

        x, carry = jax.lax.fori_loop(0, repeats, once, (x, carry))
        return x, state, carry

    def init(process, x, grid):
        state = solver.init(process, x, grid)
        if jax.tree.leaves(state):
            raise InvalidInput("repainted needs a solver without history, such as ddim or ddpm, but was given another.")
        return state

    return solver._replace(init=init, step=step)


def constrained(solver: Solver, projection: Callable[[Any], Any]) -> Solver:
    """`x = projection(x)` after each step: any function of x like x (onto a set, a norm, a symmetry, ...)."""
    return with_hooks(solver, after=lambda process, x, step, key: projection(x))


def optimised(
    solver: Solver,
    energy: Callable[[Any, Any], Any],
    *,
    learning_rate: float = 0.1,
    iterations: int = 1,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Solver:
    """Gradient descent of an energy on the latent before each step: `x <- x - learning_rate grad energy(x, step)`.

    energy: (x, step) -> `[B]` or a scalar; each sample follows the gradient of its own entry. It may call networks of
    its own; what it costs is not counted. iterations: descent steps a step. interval: times t (of an entry) in which
    it acts.
    Raises InvalidInput for a negative number of iterations or an interval outside [0, 1].
    """
    low, high = interval
    if iterations < 0:
        raise invalid("iterations", iterations, "it must not be negative")
    if not 0 <= low <= high <= 1:
        raise invalid("interval", interval, "it must be two times (low, high) in [0, 1]")

    def before(process, x, step, key):
        def descend(_, x):
            slope = jax.grad(lambda x: jnp.sum(energy(x, step)))(x)

            def move(x, slope, t):
                return where((t >= low) & (t <= high), x - learning_rate * slope, x)

            return each(move, x, slope, step.t)

        return jax.lax.fori_loop(0, iterations, descend, x)

    return with_hooks(solver, before=before)
