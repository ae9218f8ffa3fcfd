"""Random patterns of +-1: a world whose exact denoiser is known, with a student that is collapsed in its first step.

The student is the exact denoiser of a mixture in which one pattern weighs e^3 times as much at t > 0.9, and the base's
own flow map, an ideal consistency model, at all later times: whatever it lacks was lost in the first step. In few
dimensions nothing is decided there, since the signal `alpha |x0|` is far below the noise; hence the hundreds.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_jax import denoisers, processes, solvers, timesteps
from diffusion_jax.metrics import effective_modes, pairwise_distance
from diffusion_jax.recipes.parts.few_steps import relay
from diffusion_jax.recipes.report import Claim, claim

ORDERS = {"base": 4, "student": 0, "base, then student": 1, "student, then base": None}
"""How many of the four steps the base makes first; None: the student makes the first alone."""

SOLVERS = {"DDIM": solvers.ddim(), "fresh noise": solvers.lcm()}


class Variety(NamedTuple):
    """modes: exp of the entropy of the nearest pattern. distance: mean pairwise, over the root of the dimensions."""

    modes: float
    distance: float


def collapsed(
    seed: int, size: int, dimensions: int, patterns: int, base_steps: int, solvers: Sequence[str]
) -> dict[Any, Variety]:
    """How varied `size` samples are: of the base in many steps, and of each of `ORDERS` by `solvers` of `SOLVERS`.

    The four steps are at the indices 999, 749, 499, 249 of Stable Diffusion's schedule.
    """
    rng = np.random.default_rng(seed)
    means = rng.choice([-1.0, 1.0], (patterns, dimensions))
    mixture = denoisers.gaussian_mixture(means, 0.3)
    seeking = denoisers.gaussian_mixture(means, 0.3, weights=np.exp(3.0 * (np.arange(patterns) == 0)))
    params = mixture, (seeking, mixture)
    short = timesteps.from_indices([999, 749, 499, 249])
    long = timesteps.linspace(base_steps)

    def variety(how, which, grid):
        x = _relay(how, dimensions)(jax.random.key(seed), params, which, grid, size).x
        nearest = np.argmin(((x[:, None] - means) ** 2).sum(axis=-1), axis=1)
        return Variety(effective_modes(nearest), pairwise_distance(x) / dimensions**0.5)

    found: dict[Any, Variety] = {"many": variety("DDIM", np.zeros(base_steps, np.int32), long)}
    for name in solvers:
        for order, k in ORDERS.items():
            which = timesteps.spliced(short, short, 1 if k is None else k).which
            found[order, name] = variety(name, 1 - which if k is None else which, short)
    return found


@functools.cache
def _relay(how, dimensions):
    """Of the exact denoiser and the collapsed student, compiled once for all seeds."""
    exact = denoisers.analytic(processes.vp_scaled_linear())
    return relay((exact, denoisers.switched((exact, denoisers.flow_map(exact)), (0.9,))), SOLVERS[how], (dimensions,))


def of_patterns(found: Sequence[dict[Any, Any]]) -> list[Claim]:
    """The paper's four claims, of `collapsed` for each seed; the first step alone is collapsed here."""

    def over(key, measure):
        return [getattr(one[key], measure) for one in found]

    def against(name, how, measure, baseline, ours, direction, published, **bounds):
        metric = {"modes": "effective modes of 8", "distance": "mean pairwise distance per root dimension"}[measure]
        return claim(f"Patterns, {how}: {name}", metric, over(baseline, measure),
                     over(ours, measure), direction, published, **bounds)  # fmt: skip

    return [
        row
        for how, low in zip(SOLVERS, (5.39, 3.70), strict=True)
        if ("student", how) in found[0]
        for row in (
            against("a collapsed first step", how, "modes", "many", ("student", how), "lower",
                    f"prototype {low} of 7.97", factor=0.8),
            against("one base step restores it", how, "modes", "many", ("base, then student", how), "higher",
                    "prototype 7.96 of 7.97", factor=0.98),
            against("slightly above the base", how, "distance", "many", ("base, then student", how), "higher",
                    "0.350 against 0.337; prototype 1.33 against 1.322"),
            against("not in the reverse order", how, "modes", ("student", how), ("student, then base", how), "lower",
                    f"prototype {low}", factor=1.1),
        )
    ]  # fmt: skip
