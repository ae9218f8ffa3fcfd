"""Predictions under several conditions, of which differences are added up: compositions, sliders, corrections.

    pair = pair(c_base) + sum_k scale_k (pair(c_plus_k) - pair(c_minus_k)),        pair = (x0, eps)               (1)

is composition of conditions (Liu et al. 2022). Guidance compares one condition with one null; here what is kept and
what is compared are different things. With one term it is equation (1) of concept sliders (Gandikota et al. 2023). With
the terms image - nothing, text and image - image, and text - what was wrong, it is InstructPix2Pix with a correction
(Brooks et al. 2023; Pang et al. 2025, ADDP).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax.denoisers.base import cost_like
from diffusion_jax.denoisers.conditions import check_null, null_condition
from diffusion_jax.denoisers.scales import Scale, check_scale, is_static, value_at
from diffusion_jax.errors import invalid, unknown
from diffusion_jax.processes import need_gaussian
from diffusion_jax.time_axes import batch_axes, batch_size, each, expand
from diffusion_jax.typing import Denoiser


def contrasted(denoiser: Denoiser, plus: Any, minus: Any, scale: Scale = 1.0) -> Denoiser:
    """Equation (1) with one term, whatever the condition of the run is; three evaluations a call, with a memory each.

    plus, minus: what replaces the condition in the two compared predictions: a dict such as `{"label": 8}` whose
        leaves broadcast to the batch (entries that it does not name stay), or a function `cond -> cond`.
    scale: a number, an array by step or a function of the step, see `scales`; negative steers the other way.

    Extras are those of the run's own condition. Raises InvalidInput for values of the wrong kind.
    """
    check_null(plus)
    check_null(minus)
    check_scale("scale", scale)
    return composed(denoiser, {"own": None, "plus": plus, "minus": minus}, "own", (("plus", "minus", scale),))


def composed(denoiser: Denoiser, conditions: Mapping[str, Any], base: str, terms: Sequence[Sequence[Any]]) -> Denoiser:
    """Equation (1) of named conditions, each evaluated once a call, with a memory of its own.

    conditions: by name, what replaces the condition of the run: a dict such as `{"label": 10}`, a function
        `cond -> cond` (what differs by sample travels in `cond`), or None for the run's own condition.
    base: the name of the first. terms: `(plus, minus, scale)`, two names and how strongly their difference counts; a
        number, an array by step or a function of the step, see `scales`. A plain 0 is no term, and a condition that no
        term needs is not evaluated.

    With an edit by text `c` of a picture `z`, and `wrong` what an earlier answer took for it:

        nothing = {"concat": 0.0, "tokens": 0}
        conditions = {"none": nothing, "image": {"tokens": 0}, "text": None, "wrong": lambda c: {**c, "tokens": ...}}
        terms = [("image", "none", 1.5), ("text", "image", 7.5), ("text", "wrong", 4.0)]

    Extras are those of `base`. Raises InvalidInput for values of the wrong kind, names that are no condition, and a
    process that is not Gaussian.
    """
    need_gaussian("composed", denoiser.process)
    for condition in conditions.values():
        if condition is not None:
            check_null(condition)
    for i, term in enumerate(terms):
        if len(term) != 3:
            raise invalid(f"terms[{i}]", term, "two names and a scale were expected")
        check_scale(f"the scale of terms[{i}]", term[2])
    for name in (base, *(name for term in terms for name in term[:2])):
        if name not in conditions:
            raise unknown("a condition in base or terms", name, conditions)
    terms = tuple(term for term in terms if not (is_static(term[2]) and term[2] == 0))
    asked = tuple(dict.fromkeys((base, *(name for term in terms for name in term[:2]))))

    def condition_of(name, x, cond):
        condition = conditions[name]
        return cond if condition is None else null_condition(cond, condition, batch_size(x))

    def init(params, x, cond):
        return {name: denoiser.init(params, x, condition_of(name, x, cond)) for name in asked}

    def apply(params, carry, x, step, cond):
        found = {name: denoiser.apply(params, carry[name], x, step, condition_of(name, x, cond)) for name in asked}
        answers = {name: answer for name, (answer, _) in found.items()}
        main = answers[base]
        x0, eps = main.x0, main.eps
        for plus, minus, scale in terms:
            value = value_at(scale, step)
            x0 = each(_moved, x0, answers[plus].x0, answers[minus].x0, value)
            eps = each(_moved, eps, answers[plus].eps, answers[minus].eps, value)
        cost = cost_like(answers[asked[0]].cost)
        for name in asked[1:]:
            cost = cost + cost_like(answers[name].cost)
        return main._replace(x0=x0, eps=eps, cost=cost), {name: carry for name, (_, carry) in found.items()}

    def axes(carry):
        return {name: batch_axes(denoiser, own) for name, own in carry.items()}

    return Denoiser(init, apply, denoiser.process, axes)


def _moved(main, more, less, scale):
    return main + (scale if is_static(scale) else expand(scale, main)) * (more - less)
