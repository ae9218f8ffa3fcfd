"""Mixed precision under a budget: which layer has how many bits at which part of a run (ViDiT-Q, Zhao et al. 2025).

An item is what has bits of its own: a layer, or a layer in an interval of the steps. With size_i values and loss_i(b)
when only item i is quantised, to b bits, the bits b_i are sought that lower sum_i loss_i(b_i) while

    sum_i size_i b_i  <=  budget sum_i size_i.                                                                    (1)

The steps from one width to a larger one are taken in the order of what they save a bit, which does not depend on the
budget, up to the first that does not fit. So no item ever loses bits when the budget grows.

Decoupled from the metric: a layer that decides what is shown changes the output more than one that decides how well,
so one error of the output ranks them wrongly. Groups of items (by path: cross-attention, feed-forward, temporal
attention) share the budget by the error of the output; within a group its own metric ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_jax.errors import invalid


def sensitivities(measure: Callable[[Any], Any], items: int, bits: Sequence[int], full: int = 16) -> Any:
    """What quantising one item alone changes: `measure(bits [items])`, a tree of scalars, gives `[items, len(bits)]`
    a leaf, the difference from everything at `full` bits. One program: the bits are data."""
    table = np.full((items, len(bits), items), full, np.float32)
    for i in range(items):
        table[i, :, i] = bits
    rows = np.concatenate([np.full((1, items), full, np.float32), table.reshape(-1, items)])
    found = jax.jit(lambda rows: jax.lax.map(measure, rows))(rows)
    return jax.tree.map(lambda x: np.asarray(x[1:] - x[0]).reshape(items, len(bits)), found)


def average_bits(allocated: Any, sizes: Any) -> float:
    """The left side of (1) over the number of values."""
    return float(np.sum(np.asarray(allocated) * np.asarray(sizes)) / np.sum(sizes))


def allocated_bits(losses: Any, sizes: Any, bits: Sequence[int], budget: float) -> np.ndarray:
    """Bits of each item, int `[I]`, of losses `[I, len(bits)]` (larger is worse) and sizes `[I]`; budget: average bits.

    Raises InvalidInput where the budget is below the smallest width, and for arrays that do not fit.
    """
    losses, sizes = _checked(losses, sizes, bits, budget)
    allocated, left = np.full(len(sizes), bits[0], int), (budget - bits[0]) * sizes.sum()
    for item, step in _order(losses, sizes, bits):
        price = (step - allocated[item]) * sizes[item]
        if price > left + 1e-9 * sizes.sum():
            break
        allocated[item], left = step, left - price
    return allocated


def group_budgets(losses: Any, sizes: Any, bits: Sequence[int], budget: float) -> np.ndarray:
    """Average bits of each group, float `[G]`: as `allocated_bits`, but the last step may be taken in part."""
    losses, sizes = _checked(losses, sizes, bits, budget)
    average, left = np.full(len(sizes), bits[0], float), (budget - bits[0]) * sizes.sum()
    for group, step in _order(losses, sizes, bits):
        taken = min(step - average[group], left / sizes[group])
        average[group], left = average[group] + taken, left - taken * sizes[group]
    return average


def decoupled_bits(
    drops: Mapping[str, Any],
    members: Mapping[str, Sequence[int]],
    errors: Mapping[str, Any],
    sizes: Any,
    bits: Sequence[int],
    budget: float,
) -> np.ndarray:
    """Bits of each item, int `[I]`: between groups by the error of the output, within each by its own metric.

    drops: by group, `[members, len(bits)]`, by how much the group's metric is worse when one member is quantised.
    members: by group, its items; every item belongs to exactly one.
    errors: by group, `[len(bits)]`, the error of the output when the whole group is quantised.
    """
    listed = sorted(i for items in members.values() for i in items)
    if listed != list(range(len(sizes))):
        raise invalid("members", listed, f"each of the {len(sizes)} items must belong to exactly one group")
    sizes, names = np.asarray(sizes, float), list(members)
    totals = np.array([sizes[list(members[name])].sum() for name in names])
    shares = group_budgets(np.stack([np.asarray(errors[name], float) for name in names]), totals, bits, budget)
    allocated = np.zeros(len(sizes), int)
    for name, share in zip(names, shares, strict=True):
        items = list(members[name])
        allocated[items] = allocated_bits(drops[name], sizes[items], bits, share)
    return allocated


def _checked(losses, sizes, bits, budget):
    losses, sizes = np.asarray(losses, float), np.asarray(sizes, float)
    if not len(bits) or list(bits) != sorted(set(bits)):
        raise invalid("bits", list(bits), "the widths to choose from must ascend strictly")
    if losses.shape != (len(sizes), len(bits)) or not np.all(np.isfinite(losses)):
        raise invalid("losses", losses.shape, f"finite losses of shape {(len(sizes), len(bits))}: items, widths")
    if np.any(sizes <= 0):
        raise invalid("sizes", sizes.tolist(), "each item must have at least one value")
    if budget < bits[0]:
        raise invalid("budget", budget, f"an average of at least {bits[0]} bits, the smallest width")
    return losses, sizes


def _order(losses, sizes, bits):
    """Steps `(item, bits)`, the one that saves most a bit first: along each item's lower convex hull, so that the steps
    of one item come in ascending order; widths that save nothing are left out."""
    steps = []
    for item, loss in enumerate(losses):
        at = 0
        while at + 1 < len(bits):
            slopes = [(loss[at] - loss[j]) / ((bits[j] - bits[at]) * sizes[item]) for j in range(at + 1, len(bits))]
            best = int(np.argmax(slopes))
            if slopes[best] <= 0:
                break
            at += 1 + best
            steps.append((-slopes[best], item, bits[at]))
    return [(item, step) for _, item, step in sorted(steps)]
