"""Steering along the difference of two conditions, whatever the condition of the run is: the direction of a slider.

    pair = pair(c) + scale (pair(c_plus) - pair(c_minus)),        pair = (x0, eps)                             (1)

is equation (1) of concept sliders (Gandikota et al. 2023), and composition of conditions (Liu et al. 2022). Guidance
compares one condition with one null; here what is kept and what is compared are three different things.
"""

from typing import Any

from diffusion_jax.denoisers.base import cost_like, with_pair
from diffusion_jax.denoisers.conditions import check_null, null_condition
from diffusion_jax.denoisers.scales import Scale, check_scale, is_static, value_at
from diffusion_jax.processes import need_gaussian
from diffusion_jax.time_axes import batch_axes, batch_size, each, expand
from diffusion_jax.typing import Denoiser


def contrasted(denoiser: Denoiser, plus: Any, minus: Any, scale: Scale = 1.0) -> Denoiser:
    """Equation (1); three evaluations a call, with a memory each.

    plus, minus: what replaces the condition in the two compared predictions: a dict such as `{"label": 8}` whose
        leaves broadcast to the batch (entries that it does not name stay), or a function `cond -> cond`.
    scale: a number, an array by step or a function of the step, see `scales`; negative steers the other way.

    Extras are those of the run's own condition. Raises InvalidInput for values of the wrong kind.
    """
    check_null(plus)
    check_null(minus)
    check_scale("scale", scale)
    need_gaussian("contrasted", denoiser.process)

    def conditions(x, cond):
        size = batch_size(x)
        return cond, null_condition(cond, plus, size), null_condition(cond, minus, size)

    def init(params, x, cond):
        return tuple(denoiser.init(params, x, one) for one in conditions(x, cond))

    def apply(params, carry, x, step, cond):
        answers = [
            denoiser.apply(params, own, x, step, one) for own, one in zip(carry, conditions(x, cond), strict=True)
        ]
        (main, more, less), carries = zip(*answers, strict=True)
        value = value_at(scale, step)

        def moved(main, more, less, value):
            return main + (value if is_static(value) else expand(value, main)) * (more - less)

        def pair(x0, more_x0, less_x0, eps, more_eps, less_eps, value):
            return moved(x0, more_x0, less_x0, value), moved(eps, more_eps, less_eps, value)

        both = each(pair, main.x0, more.x0, less.x0, main.eps, more.eps, less.eps, value)
        cost = cost_like(main.cost) + cost_like(more.cost) + cost_like(less.cost)
        return with_pair(main, both)._replace(cost=cost), carries

    return Denoiser(init, apply, denoiser.process, lambda carry: tuple(batch_axes(denoiser, own) for own in carry))
