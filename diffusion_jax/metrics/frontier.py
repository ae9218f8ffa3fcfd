"""What to pay: the settings that no other beats in both cost and quality, and the cheapest one that is good enough.

Costs and errors are one number a setting, both better when lower; give the negative of what should be high.
"""

import numpy as np

from diffusion_jax.errors import invalid
from diffusion_jax.typing import Number, Numbers


def pareto_front(costs: Numbers, errors: Numbers) -> list[int]:
    """Indices of the settings to which none is better in one and at least as good in the other, by rising cost.

    Of settings that agree in both the first stays. Raises InvalidInput for lengths that differ, NaN, and no settings.
    """
    costs, errors = _checked(costs, errors)
    front: list[int] = []
    for index in np.lexsort((errors, costs)).tolist():
        if not front or errors[index] < errors[front[-1]]:
            front.append(index)
    return front


def cheapest_within(costs: Numbers, errors: Numbers, tolerance: float, reference: int | None = None) -> int:
    """Index of the cheapest setting with `error <= errors[reference] + tolerance`: how a budget is chosen.

    reference: the setting that is to be matched; the dearest when None (of several, the best). Of settings that cost
    the same the best is taken. Raises InvalidInput as `pareto_front` does, and for a negative tolerance.
    """
    costs, errors = _checked(costs, errors)
    if not tolerance >= 0:
        raise invalid("tolerance", tolerance, "it must be at least 0")
    if reference is None:
        reference = int(np.lexsort((errors, -costs))[0])
    elif not 0 <= reference < len(costs):
        raise invalid("reference", reference, f"an index into {len(costs)} settings was expected")
    good = np.flatnonzero(errors <= errors[reference] + tolerance)
    return int(good[np.lexsort((errors[good], costs[good]))[0]])


def error_at_cost(costs: Numbers, errors: Numbers, cost: Number) -> float:
    """What a method errs at `cost`, between the costs of its settings: the logarithm of the error is interpolated.

    So that methods whose settings fall on other costs are compared at equal cost. Raises InvalidInput as `pareto_front`
    does, for a cost outside of the settings' (nothing is extrapolated), and for errors that are not positive.
    """
    costs, errors = _checked(costs, errors)
    if not costs.min() <= cost <= costs.max():
        raise invalid("cost", cost, f"a cost between those of the settings, {costs.min():g} .. {costs.max():g}, fits")
    if not (errors > 0).all():
        raise invalid("errors", errors.tolist(), "an error of 0 has no logarithm; leave that setting out")
    order = np.argsort(costs)
    return float(np.exp(np.interp(cost, costs[order], np.log(errors[order]))))


def _checked(costs, errors):
    costs, errors = np.asarray(costs, np.float64), np.asarray(errors, np.float64)
    if costs.ndim != 1 or costs.shape != errors.shape or not costs.size:
        raise invalid("shapes of costs and errors", (costs.shape, errors.shape), "a number each a setting was expected")
    if np.isnan(costs).any() or np.isnan(errors).any():
        raise invalid("costs, errors", (costs.tolist(), errors.tolist()), "they must not be NaN")
    return costs, errors
