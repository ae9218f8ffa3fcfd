"""The threshold of a method for a budget, found from the cost of runs with several thresholds."""

from collections.abc import Callable

from diffusion_jax.errors import invalid
from diffusion_jax.typing import Number


def threshold_for(
    cost: Callable[[float], Number], budget: Number, *, low: Number = 1e-4, high: Number = 2.0, rounds: int = 14
) -> float:
    """The lowest threshold from `low` to `high` at which `cost(threshold) <= budget`, by bisection of its logarithm.

    cost: what a run with that threshold costs, falling as the threshold rises: evaluations of a gated or a calibrated
    run, the mean depth of early exits. It is asked `rounds + 1` times, so let it run one compiled program whose
    threshold is an argument, on seeds that are not reported. A cost that is not monotone everywhere, as of a gate along
    its own trajectory, gives one of the places where it crosses the budget. The cost at the answer never exceeds it.
    Raises InvalidInput unless 0 < low < high, and where even `high` costs more.
    """
    if not 0 < low < high:
        raise invalid("low, high", (low, high), "0 < low < high was expected")
    low, high = float(low), float(high)
    found = float(cost(high))
    if not found <= budget:
        raise invalid("budget", budget, f"even the threshold {high:g} costs {found:g}; raise the budget or high")
    for _ in range(rounds):
        middle = (low * high) ** 0.5
        if float(cost(middle)) <= budget:
            high = middle
        else:
            low = middle
    return high
