"""DPM-Solver (interpolates eps) and DPM-Solver++ (interpolates x0): exponential integrators in log(alpha / sigma).

Multistep forms reuse past outputs, one evaluation a step; singlestep forms evaluate `order` times within a step.
Lu et al. 2022a (DPM-Solver) and 2022b (DPM-Solver++). A step that starts at alpha = 0 or ends at sigma = 0 has infinite
length in lam and is of first order (DDIM), where the singlestep forms evaluate once.
"""

from functools import partial

import jax
import jax.numpy as jnp

from diffusion_jax.errors import InvalidInput, unknown
from diffusion_jax.processes.schedules import safe_sqrt
from diffusion_jax.randomness import normal_like, split
from diffusion_jax.solvers.base import (
    difference,
    evaluate_if,
    half_log_snr,
    hub_step,
    per_modality,
    shrinkage,
    stateless,
)
from diffusion_jax.solvers.multistep import (
    THIRD_ORDERS,
    Ending,
    Node,
    check_order,
    correction,
    exponential_frame,
    linear_multistep,
    noisy_hub_step,
)
from diffusion_jax.solvers.restarts import restarting
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Solver

METHODS = ("multistep", "singlestep", "restarting")
EQUATIONS = ("ode", "sde")
SOLVER_TYPES = {"midpoint": "b2", "heun": None}
"""The published second-order coefficients: 'midpoint' puts `h (1 - exp(-h)) / 2` for the integral that 'heun' takes."""


def dpm_solver(
    order: int = 2,
    method: str = "multistep",
    *,
    lower_order_final: bool | int = True,
    euler_at_final: bool = False,
    solver_type: str = "midpoint",
    third_order: str = "exact",
    idle_steps: int = 0,
) -> Solver:
    """DPM-Solver-1/2/3 on eps: `x' = alpha' x0 + sigma' eps - sigma' integral of exp(h - s) (P(s) - eps) ds`.

    order: 1 (DDIM), 2 or 3. Order 2 uses the published coefficient `(exp(h) - 1) / 2`, order 3 the exact integral of
    the parabola.
    method: 'multistep'; 'singlestep' (evaluates `order` times within a step, at lam 1/2, or 1/3 and 2/3 of the way); or
        'restarting', which takes `order` steps of the grid for one step of 'singlestep' (`solvers.restarts`).
    lower_order_final: lowers the order over the last steps, which helps short runs; an integer: in runs of fewer steps
        than that. euler_at_final: the last step is of first order. Not for 'singlestep'.
    solver_type: 'midpoint' or 'heun', the exact integral at second order; with 'restarting' also at third, where
        'midpoint' leaves out the node in the middle. third_order: 'exact' or 'diffusers' (see `exponential_frame`).
    idle_steps: how many steps at the end of the grid do not move, but count as steps that are left (diffusers).
    Raises InvalidInput for another order, method, solver_type or third_order.
    """
    ending = Ending(lower_order_final, euler_at_final, idle_steps)
    form = {"solver_type": solver_type, "third_order": third_order}
    return _dpm("dpm_solver", "eps", order, method, "ode", ending, **form)


def dpm_solver_pp(
    order: int = 2,
    method: str = "multistep",
    equation: str = "ode",
    *,
    lower_order_final: bool | int = True,
    euler_at_final: bool = False,
    solver_type: str = "midpoint",
    third_order: str = "exact",
    idle_steps: int = 0,
) -> Solver:
    """DPM-Solver++ on x0; order 2, multistep, is DPM-Solver++(2M), singlestep (2S); with `equation='sde'` its SDE form.

    order: 1 (DDIM), 2 or 3. equation: 'ode', or 'sde' for the reverse SDE (order 1 is then `ddim(eta=1)`).
    Order 2 uses the published coefficient `alpha' (1 - exp(-h)) / 2`, order 3 the exact integral of the parabola.
    The other options are those of `dpm_solver`.
    Raises InvalidInput for values outside of these, and for the singlestep SDE of order 3.
    """
    ending = Ending(lower_order_final, euler_at_final, idle_steps)
    return _dpm(
        "dpm_solver_pp", "x0", order, method, equation, ending, solver_type=solver_type, third_order=third_order
    )


def _dpm(name, prediction, order, method, equation, ending, *, solver_type, third_order):
    check_order(order, (1, 2, 3))
    for field, value, choices in (
        ("method", method, METHODS),
        ("equation", equation, EQUATIONS),
        ("solver_type", solver_type, SOLVER_TYPES),
        ("third_order", third_order, THIRD_ORDERS),
    ):
        if value not in choices:
            raise unknown(field, value, choices)
    stochastic = equation == "sde"
    if method == "singlestep":
        if stochastic and order == 3:
            raise InvalidInput(
                "order is 3, but the singlestep SDE form exists for orders 1 and 2; use method='multistep'."
            )
        return _singlestep(name, prediction, order, stochastic)

    def frame(process, t, t_next, count):
        tau = 1.0 if stochastic else 0.0
        bh = SOLVER_TYPES[solver_type]
        return exponential_frame(process, t, t_next, count, prediction, tau=tau, bh=bh, third_order=third_order)

    def doubled(process, t, t_next, count):
        # The square's weight in the released singlestep form is twice that of the multistep one.
        this = frame(process, t, t_next, count)
        factor = 2.0 if third_order == "diffusers" else 1.0
        return this._replace(moments=[*this.moments[:2], *(factor * moment for moment in this.moments[2:])])

    if method == "restarting":
        return restarting(name, order, doubled, prediction, ending, stochastic, nearest_only=solver_type == "midpoint")
    return linear_multistep(name, order, frame, prediction, ending, stochastic)


def _intermediate(process, t, t_next, fraction):
    """The t at a fraction of the way in lam, and where the way is finite; t itself elsewhere."""
    lam = half_log_snr(process, t)
    h, usable = difference(half_log_snr(process, t_next), lam)
    middle = process.inverse_log_snr(2.0 * (jnp.where(usable, lam, 0.0) + fraction * h))
    return jnp.where(usable, middle, t).astype(jnp.result_type(t)), usable


def _refined(process, first, answer, latest, step, node, usable, *, prediction, tau=0.0, exact=False):
    """`first` plus the correction by the line through the outputs: `answer` at `step.t`, `latest` at `node`."""
    frame = exponential_frame(process, step.t, step.t_next, 1, prediction, tau=tau, bh=None if exact else "b2")
    offset, distinct = difference(frame.coordinate(node), frame.coordinate(step.t))
    usable = usable & frame.usable & distinct
    value, other = (answer.x0, latest.x0) if prediction == "x0" else (answer.eps, latest.eps)
    terms = correction(value, [Node(other, offset, usable)], frame.moments, jnp.where(usable, 2, 1), frame.simple)
    return first + expand(frame.scale, first) * terms


def _singlestep(name, prediction, order, stochastic):
    fractions = {1: (), 2: (0.5,), 3: (1 / 3, 2 / 3)}[order]
    tau = 1.0 if stochastic else 0.0

    def step(process, denoise, carry, state, x, step, key):
        answer, carry = denoise(carry, x, step)
        noises = [normal_like(k, x) for k in split(key, 2)] if stochastic else [x, x]

        def start(process, x, x0, eps, noise, t, t_next):
            if stochastic:
                return noisy_hub_step(process, x0, eps, noise, t, t_next, tau)
            return hub_step(process, x0, eps, t_next)

        def finish(process, x, answer, noise, middle_noise, step, middle):
            (x0, eps), t, t_next = answer[:2], step.t, step.t_next
            # One Brownian path for the whole step: its part before `middle`, shrunk, plus its part after.
            if not stochastic:
                return hub_step(process, x0, eps, t_next)
            before = process.sigma(t_next) * shrinkage(process, middle, t_next)
            part = before * safe_sqrt(jnp.clip(1.0 - shrinkage(process, t, middle) ** 2, 0.0))
            mean = noisy_hub_step(process, x0, eps, jnp.zeros_like(x), t, t_next, tau)
            rest = process.sigma(t_next) * safe_sqrt(jnp.clip(1.0 - shrinkage(process, middle, t_next) ** 2, 0.0))
            return mean + expand(part, x) * middle_noise + expand(rest, x) * noise

        if order == 1:
            x = per_modality(start, process, x, answer.x0, answer.eps, noises[0], step.t, step.t_next)
            return x, state, carry

        latest, times = answer, [step.t]
        for stage, fraction in enumerate(fractions):
            middle, usable = per_modality(
                lambda process, x, t, t_next, fraction=fraction: _intermediate(process, t, t_next, fraction),
                process, x, step.t, step.t_next,
            )  # fmt: skip
            guess = per_modality(start, process, x, answer.x0, answer.eps, noises[0], step.t, middle)
            if stage:
                refined = partial(_refined, prediction=prediction, exact=True)
                shorter = step._replace(t_next=middle)
                guess = per_modality(refined, process, guess, answer, latest, shorter, times[-1], usable)
            needed = jax.tree.map(
                lambda u, a, b: u & (a != b), usable, _like(usable, step.t), _like(usable, step.t_next)
            )
            latest, carry = evaluate_if(needed, denoise, carry, guess, step._replace(t=middle), latest)
            times.append(middle)
        first = per_modality(finish, process, x, answer, noises[1], noises[0], step, times[-1])
        refined = partial(_refined, prediction=prediction, tau=tau, exact=order == 3)
        return per_modality(refined, process, first, answer, latest, step, times[-1], usable), state, carry

    return Solver(stateless(name), step, order=order)


def _like(tree, t):
    """`t` with the structure of `tree`: one array serves all modalities."""
    return {name: t[name] if isinstance(t, dict) else t for name in tree} if isinstance(tree, dict) else t
