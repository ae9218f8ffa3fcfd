"""Guidance by gradients: of a classifier's log-probability at (x_t, t), or of an energy of the denoiser's prediction.

Both tilt the score, `grad log p_t(x_t) + g`, hence

    eps - sigma g,      x0 + sigma^2 / alpha g,                                                               (1)

which keeps `x_t = alpha x0 + sigma eps`. Samples are differentiated together by summing, so a network must not mix
them. A step at which the scale is 0 for the whole batch takes no gradient.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.denoisers.base import cost_like, replace_x0, tilt
from diffusion_jax.denoisers.scales import Scale, check_scale, is_static, value_at
from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.processes import need_gaussian
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Cost, Denoiser, Number


def classifier_guided(denoiser: Denoiser, log_prob: Any, scale: Scale = 1.0, *, compute: Number = 0.0) -> Denoiser:
    """Equation (1) with `g = scale grad_x log p(y | x_t, t)` (Dhariwal & Nichol 2021, algorithm 2).

    log_prob: `(params, x_t, t, cond) -> [B]`, trained on noisy data. The parameters of the run are
        `{"main": the denoiser's, "guide": those handed to log_prob}`; `None` or `()` when it has none.
    compute: the work of one classifier gradient in units of one forward pass of the network, for the cost.
    """
    _check("log_prob", log_prob, scale, denoiser)
    if not is_static(compute) or not compute >= 0:
        raise invalid("compute", compute, "a number of forward passes, at least 0, was expected")

    def main_params(params):
        if not isinstance(params, Mapping) or set(params) != {"main", "guide"}:
            raise InvalidInput("classifier_guided needs params={'main': ..., 'guide': ...}; guide may be None.")
        return params["main"]

    def init(params, x, cond):
        return denoiser.init(main_params(params), x, cond)

    def apply(params, carry, x, step, cond):
        prediction, carry = denoiser.apply(main_params(params), carry, x, step, cond)
        prediction = prediction._replace(cost=cost_like(prediction.cost))
        value = value_at(scale, step)

        def tilted(prediction):
            gradient = jax.grad(lambda x: jnp.sum(log_prob(params["guide"], x, step.t, cond)))(x)
            extra = cost_like(Cost(0.0, compute))
            return tilt(denoiser.process, prediction, _scaled(value, gradient), step.t)._replace(
                cost=prediction.cost + extra
            )

        return _unless_zero(value, tilted, lambda prediction: prediction, prediction), carry

    return denoiser._replace(init=init, apply=apply)


def energy_guided(denoiser: Denoiser, energy: Any, scale: Scale = 1.0, *, through: bool = True) -> Denoiser:
    """Equation (1) with `g = -scale grad_x E`, for an energy E of the denoiser's prediction.

    energy: `(prediction, t, cond) -> [B]`; it may look at `prediction.x0` and at `prediction.extras`. With
        `E = |y - A x0|^2 / (2 tau^2)` this is diffusion posterior sampling (Chung et al. 2023), which takes the
        data as known once x0 is predicted: its posterior is too narrow. With the variance `tau^2 + r(t)^2 A A^T`
        instead of tau^2, r^2 that of x0 given x_t, it is exact where x0 is Gaussian (Song et al. 2023, PiGDM). A norm
        that is not squared has a gradient of constant size, as DPS recommends.
    through: differentiates with respect to x_t through the network (one backward pass, counted as two forward
        passes). False moves x0 itself by `-scale grad_x0 E` and costs nothing (MPGD, He et al. 2024).
    """
    _check("energy", energy, scale, denoiser)

    def apply(params, carry, x, step, cond):
        value = value_at(scale, step)

        def plain(carry):
            prediction, carry = denoiser.apply(params, carry, x, step, cond)
            return prediction._replace(cost=cost_like(prediction.cost)), carry

        def through_network(carry):
            def total(x):
                prediction, new = denoiser.apply(params, carry, x, step, cond)
                return jnp.sum(energy(prediction, step.t, cond)), (prediction, new)

            gradient, (prediction, new) = jax.grad(total, has_aux=True)(x)
            cost = cost_like(prediction.cost)
            tilted = tilt(denoiser.process, prediction, _scaled(value, gradient, -1.0), step.t)
            return tilted._replace(cost=Cost(cost.evaluations, 3.0 * cost.compute)), new

        def at_the_answer(carry):
            prediction, new = plain(carry)
            gradient = jax.grad(lambda x0: jnp.sum(energy(prediction._replace(x0=x0), step.t, cond)))(prediction.x0)
            x0 = jax.tree.map(jnp.add, prediction.x0, _scaled(value, gradient, -1.0))
            return replace_x0(denoiser.process, prediction, x0, x, step.t), new

        return _unless_zero(value, through_network if through else at_the_answer, plain, carry)

    return denoiser._replace(apply=apply)


def _check(field, function, scale, denoiser):
    if not callable(function):
        raise invalid(field, function, "a function that returns one number per sample was expected")
    check_scale("scale", scale)
    need_gaussian("Guidance by a gradient", denoiser.process)


def _scaled(scale, gradient, sign=1.0):
    if is_static(scale):
        return jax.tree.map(lambda g: sign * scale * g, gradient)
    return jax.tree.map(lambda s, g: sign * s * g, expand(scale, gradient), gradient)


def _unless_zero(scale, function, otherwise, operand):
    """`function(operand)`, or `otherwise(operand)` where the scale is 0 for everything."""
    if is_static(scale):
        return function(operand) if scale else otherwise(operand)
    wanted = jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(scale)]))
    return jax.lax.cond(wanted, function, otherwise, operand)
