"""Averages of the parameters along the training run: fixed decay, warmed up, and the power-function family whose
width can be chosen after training.

Any number of tracks run side by side in a dict of name -> `Ema`. A track is updated once per applied step, with
n = 1, 2, ... counting them:

    average_n = beta_n average_(n-1) + (1 - beta_n) params_n                                                   (1)

Power-function averages (Karras et al. 2024, section 3) weigh the parameters of step tau by

    p(tau; t, gamma) = (gamma + 1) tau^gamma / t^(gamma + 1),      0 <= tau <= t                               (2)

so that the width is a fixed share `sigma_rel` of the run's length t. Stored snapshots of two tracks span a space of
profiles, and any other profile is their best combination in least squares: `post_hoc_weights`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.typing import Params


class Ema(NamedTuple):
    """One track.

    beta: n -> beta_n of equation (1), for n = 1, 2, ...
    sigma_rel: relative width of a power-function track, None for the others.
    """

    beta: Callable[[Any], Any]
    sigma_rel: float | None = None


def fixed(decay: float = 0.9999) -> Ema:
    """`beta_n = decay`; starts at the initial parameters and forgets them over 1 / (1 - decay) steps."""
    _check_decay(decay)
    return Ema(lambda n: jnp.full_like(n, decay, dtype=jnp.float32))


def warmup(decay: float = 0.9999, delay: float = 10.0) -> Ema:
    """`beta_n = min(decay, (1 + n) / (delay + n))`: a short memory at first, so the start is forgotten soon."""
    _check_decay(decay)
    if delay <= 1:
        raise invalid("delay", delay, "it must be larger than 1")
    return Ema(lambda n: jnp.minimum(decay, (1.0 + n) / (delay + n)))


def power(sigma_rel: float = 0.05) -> Ema:
    """`beta_n = (1 - 1/n)^(gamma + 1)`, the profile of equation (2) (Karras et al. 2024, equation 127).

    sigma_rel: standard deviation of the profile as a share of the training length so far, in (0, 0.28).
    """
    exponent = gamma(sigma_rel) + 1.0
    return Ema(lambda n: (1.0 - 1.0 / n) ** exponent, sigma_rel)


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise invalid("decay", decay, "it must be at least 0 and below 1")


def gamma(sigma_rel: float) -> float:
    """The exponent of equation (2) whose profile has relative width `sigma_rel` (Karras et al. 2024, algorithm 2).

    The width of the profile is `sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))`.
    """
    # The widest profile of the family with gamma >= 0 is the plain mean, of width sqrt(1 / 12).
    if not 0 < sigma_rel <= 12**-0.5:
        raise invalid("sigma_rel", sigma_rel, f"it must be above 0 and at most {12**-0.5:.4f} (the plain mean)")
    inverse = float(sigma_rel) ** -2
    return max(float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max()), 0.0)


def init(tracks: Mapping[str, Ema], params: Params) -> dict[str, Any]:
    """Every track starts at the initial parameters, in copies of their own (the buffers are donated).

    Averages are float32 at least: what a step adds to one is less than half precision can hold.
    """

    def copied(leaf):
        return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True)

    return {name: jax.tree.map(copied, params) for name in sorted(tracks)}


def update(tracks: Mapping[str, Ema], averages: Mapping[str, Any], params: Params, count: Any) -> dict[str, Any]:
    """Equation (1) for all tracks; `count` is n, the number of applied steps including this one."""
    n = jnp.asarray(count, jnp.float32)
    betas = {name: tracks[name].beta(n) for name in averages}

    def blend(beta):
        # The lerp form leaves an average that equals the parameters exactly where it is.
        return lambda average, leaf: average + (1.0 - beta).astype(average.dtype) * (leaf - average)

    return {name: jax.tree.map(blend(betas[name]), average, params) for name, average in averages.items()}


def overlap(t_a, gamma_a, t_b, gamma_b):
    """Inner product of two profiles of equation (2), elementwise (Karras et al. 2024, equation 151).

    `(a + 1)(b + 1) / (a + b + 1) * min(t_a, t_b)^(a + b + 1) / (t_a^(a + 1) t_b^(b + 1))`.
    """
    t_a, gamma_a, t_b, gamma_b = (np.asarray(value, np.float64) for value in (t_a, gamma_a, t_b, gamma_b))
    total = gamma_a + gamma_b + 1.0
    log_ratio = total * np.log(np.minimum(t_a, t_b)) - (gamma_a + 1) * np.log(t_a) - (gamma_b + 1) * np.log(t_b)
    return (gamma_a + 1) * (gamma_b + 1) / total * np.exp(log_ratio)


def post_hoc_weights(steps: Any, sigma_rels: Any, sigma_rel: float, step: int) -> np.ndarray:
    """Weights of snapshots whose combination is closest, in least squares, to the profile (sigma_rel, step).

    steps, sigma_rels: of each snapshot. Karras et al. 2024, algorithm 3.
    """
    steps = np.asarray(steps, np.float64)
    gammas = np.asarray([gamma(float(width)) for width in sigma_rels])
    if steps.size == 0:
        raise InvalidInput(
            "there are no EMA snapshots to reconstruct from; train with snapshot_every and power tracks."
        )
    if (steps <= 0).any():
        raise invalid("steps", steps.tolist(), "snapshots must lie after the first step")
    if step <= 0 or step > steps.max():
        raise invalid("step", step, f"it must be within 1 .. {int(steps.max())}, where there are snapshots")
    matrix = overlap(steps[:, None], gammas[:, None], steps[None, :], gammas[None, :])
    target = overlap(steps, gammas, float(step), gamma(sigma_rel))
    return np.linalg.lstsq(matrix, target, rcond=None)[0]


def reconstruct(
    snapshots: Iterable[tuple[int, float, Callable[[], Any]]], sigma_rel: float, step: int | None = None
) -> Any:
    """Parameters averaged with another width than was tracked, from stored snapshots.

    snapshots: `(step, sigma_rel, load)` each; `load()` gives its parameters, and one is held at a time.
    step: end of the averaging profile; the latest snapshot when absent.
    """
    snapshots = list(snapshots)
    step = max((at for at, _, _ in snapshots), default=0) if step is None else step
    weights = post_hoc_weights([at for at, _, _ in snapshots], [width for _, width, _ in snapshots], sigma_rel, step)
    total, dtypes = None, None
    # Weights are large and of both signs: float64 keeps their cancellation harmless.
    for weight, (_, _, load) in zip(weights, snapshots, strict=True):
        leaves = jax.tree.map(np.asarray, load())
        part = jax.tree.map(lambda leaf, w=weight: w * leaf.astype(np.float64), leaves)
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, leaves)
        total = part if total is None else jax.tree.map(np.add, total, part)
    return jax.tree.map(lambda leaf, dtype: jnp.asarray(leaf.astype(dtype)), total, dtypes)
