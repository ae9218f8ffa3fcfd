"""Multi-step methods that extrapolate eps: LMS, DEIS, PLMS and PNDM.

All of them integrate `d(x / alpha) = eps d(sigma / alpha)` with a polynomial for eps through past steps, and differ in
the coordinate of the polynomial. Those in log(alpha / sigma) are in `dpm_solver`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import unknown
from diffusion_jax.solvers.base import difference, evaluate_if, hub_step, per_modality, sigma_hat
from diffusion_jax.solvers.history import empty_histories, push
from diffusion_jax.solvers.multistep import (
    Ending,
    Frame,
    check_order,
    exponential_frame,
    linear_multistep,
    power_moments,
)
from diffusion_jax.time_axes import batch_axes, batch_first, expand, where
from diffusion_jax.typing import Prediction, Solver

DEIS_VARIABLES = ("log_rho", "t")

ADAMS_BASHFORTH = np.array(
    [[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
)
"""Weights of eps now and at the three steps before, for equal steps; row k - 1 has order k."""


LMS_STARTS = ("lower_order", "zeros")


def lms(order: int = 4, lower_order_final: bool | int = False, start: str = "lower_order") -> Solver:
    """Linear multistep: the polynomial for eps is in sigma / alpha (k-diffusion `sample_lms`; rho-AB-DEIS).

        x' = alpha' (x / alpha + integral of P(s) ds over sigma / alpha)

    order: 1 (Euler) to 4. One evaluation a step. Finite at sigma' = 0; a step from alpha = 0 is of first order.
    lower_order_final: lowers the order over the last steps; an integer: in runs of fewer steps than that.
    start: of a run that begins in the middle of its grid. 'lower_order' takes as many terms as there are outputs;
        'zeros' takes those of the whole grid, where the outputs of steps that were not made are 0, as diffusers does.
    Raises InvalidInput for another order or start.
    """
    check_order(order, (1, 2, 3, 4))
    if start not in LMS_STARTS:
        raise unknown("start", start, LMS_STARTS)

    def frame(process, t, t_next, count):
        h, usable = difference(sigma_hat(process, t_next), sigma_hat(process, t))
        return Frame(lambda t: sigma_hat(process, t), process.alpha(t_next), power_moments(h, count), None, usable)

    solver = linear_multistep("lms", order, frame, "eps", Ending(lower_order_final))
    return _zeros_before(solver, order - 1) if start == "zeros" else solver


def _zeros_before(solver, length):
    """`solver`, whose history of `length` has outputs of 0 at the times of the grid before the run began."""

    def init(process, x, grid):
        return solver.init(process, x, grid), grid

    def step(process, denoise, carry, state, x, step, key):
        history, grid = state

        def filled(process, x, history, grid):
            times = [grid[jnp.maximum(step.index - 1 - j, 0)] for j in range(length)]
            times = [jnp.where(history.count > j, old, t) for j, (old, t) in enumerate(zip(history.times, times))]
            count = jnp.maximum(history.count, jnp.minimum(step.index, length).astype(jnp.int32))
            return history._replace(times=tuple(times), count=count)

        history = per_modality(filled, process, x, history, grid)
        x, history, carry = solver.step(process, denoise, carry, history, x, step, key)
        return x, (history, grid), carry

    return Solver(init, step, solver.order, lambda state: (batch_axes(solver, state[0]), 1))


def deis(
    order: int = 3, variable: str = "log_rho", lower_order_final: bool | int = True, idle_steps: int = 0
) -> Solver:
    """DEIS (Zhang & Chen 2023): exact integration of the polynomial for eps against d(sigma / alpha).

    variable: 'log_rho' (polynomial in log(sigma / alpha), as in diffusers) or 't' (tAB-DEIS, the paper's; weights by
        Gauss-Legendre quadrature, and usable from alpha = 0 and up to sigma' = 0 on). rho-AB-DEIS is `lms`.
    order: 1 (DDIM) to 4. One evaluation a step. lower_order_final: as for `lms`.
    idle_steps: how many steps at the end of the grid do not move, but count as steps that are left (diffusers).
    Raises InvalidInput for another order or variable.
    """
    check_order(order, (1, 2, 3, 4))
    if variable not in DEIS_VARIABLES:
        raise unknown("variable", variable, DEIS_VARIABLES)

    def log_rho(process, t, t_next, count):
        return exponential_frame(process, t, t_next, count, "eps", bh=None)

    frame = log_rho if variable == "log_rho" else _time_frame
    return linear_multistep("deis", order, frame, "eps", Ending(lower_order_final, False, idle_steps))


_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(12)


def _time_frame(process, t, t_next, count):
    """Moments `integral s^k d(sigma / alpha)(t + s)`, by parts so that only sigma / alpha itself is evaluated."""
    h = t_next - t
    start, end = sigma_hat(process, t), sigma_hat(process, t_next)
    usable = jnp.isfinite(start) & jnp.isfinite(end)
    start = jnp.where(usable, start, 0.0)
    rise = jnp.where(usable, end, 0.0) - start
    offsets = [point * h for point in 0.5 * (_POINTS + 1.0)]
    heights = [jnp.where(usable, sigma_hat(process, t + offset) - start, 0.0) for offset in offsets]
    moments = [rise]
    for k in range(1, count + 1):
        terms = zip(0.5 * _WEIGHTS, offsets, heights)
        area = sum(weight * offset ** (k - 1) * height for weight, offset, height in terms)
        moments.append(h**k * rise - k * h * area)
    return Frame(lambda t: t, process.alpha(t_next), moments, None, usable)


COMBINED = ("eps", "output")
STARTS = ("euler", "heun", "diffusers")


def _transfer(process, x, answer, estimate, step, combined):
    """PNDM's equation 11: the DDIM step with `estimate` for eps, written as a change of the step with the pair itself.

    At alpha = 0 the noise is all that is known of x0, and the pair is taken as it is. An estimate of the network's
    output makes a pair with x instead.
    """
    x0, eps, t, t_next = answer.x0, answer.eps, step.t, step.t_next
    if combined == "output":
        pair = process.predict(estimate, x, t)
        return hub_step(process, pair.x0, pair.eps, t_next)
    unknown_x0 = process.alpha(t) == 0
    slope = jnp.where(unknown_x0, 0.0, sigma_hat(process, t))
    lever = jnp.where(unknown_x0, 0.0, process.sigma(t_next) - process.alpha(t_next) * slope)
    return hub_step(process, x0, eps, t_next) + expand(lever, x0) * (estimate - eps)


def _adams_bashforth(eps, history, order):
    """The weighted eps of the order that each entry has the history for."""
    if isinstance(eps, dict):
        return {name: _adams_bashforth(eps[name], history[name], order) for name in eps}
    rows = jnp.asarray(ADAMS_BASHFORTH, eps.dtype)[jnp.minimum(order - 1, history.count)]
    values = (eps, *history.values)
    return sum(expand(rows[..., j], eps) * value for j, value in enumerate(values))


def _advance(process, x, state, answer, value, estimate, step, *, combined):
    """The step with `estimate`, and the history with `value` in front."""

    def update(process, x, history, answer, value, estimate, step):
        moved = _transfer(process, x, answer, estimate, step, combined)
        return moved, push(history, value, step.t, step.t != step.t_next)

    return per_modality(update, process, x, state, answer, value, estimate, step)


def _combined_value(process, x, pair, t, combined):
    """What the weights of PLMS and PNDM are applied to, entry by entry."""

    def value(process, x, x0, eps, t):
        return eps if combined == "eps" else process.output(Prediction(x0, eps), t)

    return per_modality(value, process, x, pair.x0, pair.eps, t)


def _check_combined(combined):
    if combined not in COMBINED:
        raise unknown("combined", combined, COMBINED)


def plms(order: int = 4, start: str = "euler", combined: str = "eps") -> Solver:
    """Pseudo linear multistep (Liu et al. 2022, PNDM; latent diffusion's PLMS): Adams-Bashforth eps, DDIM's transfer.

    The weights are those of equal steps in t. The first steps have as many terms as there is history; one evaluation
    a step. Converges at second order in the step, with small constants. order: number of terms, 1 (DDIM) to 4.
    start: 'heun' averages eps at both ends of the first step, one evaluation more, as latent diffusion does (but not
        in a run of one step); 'diffusers' as 'heun', but in a run that begins at the second step of its grid the other
        end is evaluated at the same time again, and the step is made as if from one step earlier to here.
    combined: what the weights are applied to, 'eps' or the network's own 'output'; these differ where the network
        predicts something else than eps, and diffusers takes the output (of first order then: an average of outputs
        makes no pair with x).
    Raises InvalidInput for values outside of these.
    """
    check_order(order, (1, 2, 3, 4))
    if start not in STARTS:
        raise unknown("start", start, STARTS)
    _check_combined(combined)

    def step(process, denoise, carry, state, x, step, key):
        answer, carry = denoise(carry, x, step)
        value = _combined_value(process, x, answer, step.t, combined)
        estimate = _adams_bashforth(value, state, order)
        pair, moved = answer, step
        if start != "euler":

            def starting(process, x, history, t, t_next):
                return (history.count == 0) & (t != t_next) & (process.sigma(t_next) != 0) & (step.num_steps > 1)

            needed = per_modality(starting, process, x, state, step.t, step.t_next)
            guess = per_modality(hub_step, process, answer.x0, answer.eps, step.t_next)
            other = step.t_next
            if start == "diffusers":
                pair, other, moved = _one_step_late(process, x, answer, step, needed)
            end, carry = evaluate_if(needed, denoise, carry, guess, step._replace(t=other), answer)
            second = _combined_value(process, x, end, other, combined)
            estimate = where(needed, jax.tree.map(lambda a, b: 0.5 * (a + b), value, second), estimate)

        x, state = _advance(process, x, state, pair, value, estimate, moved, combined=combined)
        return x, state, carry

    # One value of history tells the first step from the others, whatever the order.
    reached = min(order, 2) if combined == "eps" else 1
    return Solver(empty_histories("plms", max(order - 1, 1)), step, reached, batch_first)


def _one_step_late(process, x, answer, step, needed):
    """Of a first step that is the second of the grid: the pair and the ends of the transfer, one step earlier, and the
    time of the second evaluation; of others what they are."""

    def shifted(process, x, eps, x0, needed, t, t_next):
        late = needed & (step.index == 1)
        earlier = jnp.where(late, 2.0 * t - t_next, t).astype(jnp.result_type(t))
        x0 = where(late, process.from_eps(eps, x, earlier).x0, x0)
        end = jnp.where(late, t, t_next)
        return x0, earlier, end, end

    x0, t, t_next, other = per_modality(shifted, process, x, answer.eps, answer.x0, needed, step.t, step.t_next)
    return answer._replace(x0=x0), other, step._replace(t=t, t_next=t_next)


def pndm(combined: str = "eps") -> Solver:
    """PNDM (Liu et al. 2022, algorithm 2): three pseudo Runge-Kutta steps of four evaluations, then `plms`.

    With a vector of times the extra evaluations are made as long as any entry is in its first three steps.
    combined: as for `plms`. Raises InvalidInput for another value.
    """
    _check_combined(combined)

    def step(process, denoise, carry, state, x, step, key):
        answer, carry = denoise(carry, x, step)
        value = _combined_value(process, x, answer, step.t, combined)
        middle = jax.tree.map(lambda a, b: 0.5 * (a + b), step.t, step.t_next)

        def starting(process, x, history, t, t_next):
            return (history.count < 3) & (t != t_next)

        needed = per_modality(starting, process, x, state, step.t, step.t_next)

        def advance(estimate, t_next):
            transfer = partial(_transfer, combined=combined)
            return per_modality(transfer, process, x, answer, estimate, step._replace(t_next=t_next))

        def stage(carry, x, t):
            pair, carry = evaluate_if(needed, denoise, carry, x, step._replace(t=t), answer)
            return _combined_value(process, x, pair, t, combined), carry

        second, carry = stage(carry, advance(value, middle), middle)
        third, carry = stage(carry, advance(second, middle), middle)
        # At sigma' = 0 some networks have no meaning: the fourth evaluation stays at the middle there.
        end = per_modality(lambda p, x, m, t: jnp.where(p.sigma(t) == 0, m, t), process, x, middle, step.t_next)
        fourth, carry = stage(carry, advance(third, end), end)

        runge_kutta = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, value, second, third, fourth)
        estimate = where(needed, runge_kutta, _adams_bashforth(value, state, 4))
        x, state = _advance(process, x, state, answer, value, estimate, step, combined=combined)
        return x, state, carry

    return Solver(empty_histories("pndm", 3), step, 2 if combined == "eps" else 1, batch_first)
