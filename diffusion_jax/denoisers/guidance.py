"""Guidance: the prediction is moved along the difference between a main prediction and that of a guide.

    pair = guide + scale (main - guide),        pair = (x0, eps)                                               (1)

`scale = 1` is the main prediction, 0 the guide's, more than 1 extrapolates. The pair (x0, eps) is a linear image of the
network's output at given (x_t, t), so (1) is the same guidance whether the network predicts epsilon, v, x0 or a
velocity. For discrete processes (1) holds for log-probabilities, which are then normalised. In classifier-free
guidance the guide is the same network under a null condition; in autoguidance it is a worse network.

When the guide is evaluated, and what that costs, is decided in `branches`; strengths are in `scales`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.denoisers.base import with_pair
from diffusion_jax.denoisers.branches import Rule, from_two_networks, in_one_batch, steered
from diffusion_jax.denoisers.conditions import check_null
from diffusion_jax.denoisers.scales import Scale, is_static
from diffusion_jax.errors import invalid
from diffusion_jax.processes import by_modality, is_gaussian, need_gaussian, safe_inverse, safe_sqrt
from diffusion_jax.processes.discrete import LOG_ZERO
from diffusion_jax.time_axes import each, expand
from diffusion_jax.typing import Denoiser, Number, Prediction


def guided(
    denoiser: Denoiser,
    scale: Scale = 3.0,
    null: Any = None,
    *,
    interval: Sequence[Any] | None = None,
    interval_unit: str = "t",
    rescale: Number = 0.0,
) -> Denoiser:
    """Classifier-free guidance, equation (1) (Ho & Salimans 2022), with `scale = 1` for the conditional model.

    scale: a number, an array by step `[S, *prefix]`, or a function of the step; see `scales`.
    null: what replaces the condition for the guide: a dict such as `{"label": 10}` whose leaves broadcast to the batch
        (other entries of the condition are the same for both), or a function `cond -> cond`.
    interval: bounds on t between which to guide (Kynkäänniemi et al. 2024); one evaluation instead of two outside.
    interval_unit: "t", or "log_snr" when the bounds are on log(alpha^2 / sigma^2).
    rescale: from 0 to 1, how much of the conditional answer's standard deviation is restored, per sample
        (Lin et al. 2024, equations 15 and 16; phi = 0.7 there). Measured on v = alpha eps - sigma x0.

    Where the scale is 1 for the whole batch, the result is the conditional prediction bit for bit, with one evaluation.
    A plain 1.0 compiles to the conditional model; an array or a function is checked in each step. Arrays per sample
    that the denoiser closes over (a scale `[1, B]`, a null `[B, ...]`) are not split by a sampler over a mesh. Raises
    InvalidInput for values of the wrong kind, and when the run has no condition.
    """
    check_null(null)
    rule = linear_rule(denoiser.process, rescale)
    return steered(in_one_batch(denoiser, null), rule, scale, interval=interval, interval_unit=interval_unit)


def autoguided(
    denoiser: Denoiser,
    guide: Denoiser,
    scale: Scale = 2.0,
    null: Any = None,
    *,
    interval: Sequence[Any] | None = None,
    interval_unit: str = "t",
    rescale: Number = 0.0,
    guide_compute: Number = 1.0,
) -> Denoiser:
    """Autoguidance: equation (1) with a second, worse network as the guide (Karras et al. 2024).

    The parameters are `{"main": ..., "guide": ...}`. Both denoisers are of the same process.
    null: when given, the guide sees this condition: classifier-free guidance by a network of its own.
    guide_compute: the work of one evaluation of the guide relative to one of the main network, for the cost.
    The other arguments are those of `guided`.
    """
    if null is not None:
        check_null(null)
    if not is_static(guide_compute) or not 0 < guide_compute < math.inf:
        raise invalid("guide_compute", guide_compute, "a positive number was expected")
    rule = linear_rule(denoiser.process, rescale)
    branches = from_two_networks(denoiser, guide, null, guide_compute)
    return steered(branches, rule, scale, interval=interval, interval_unit=interval_unit)


def cfg_plus_plus(
    denoiser: Denoiser,
    scale: Scale = 0.6,
    null: Any = None,
    *,
    interval: Sequence[Any] | None = None,
    interval_unit: str = "t",
) -> Denoiser:
    """CFG++: x0 from equation (1) with a scale in [0, 1], eps from the null condition (Chung et al. 2024, algorithm 2).

    The result is intentionally inconsistent: `alpha x0 + sigma eps` differs from x_t by `alpha scale (x0 - x0_null)`.
    Use it with solvers that take both x0 and eps as they are, such as DDIM. Solvers that derive one from the other
    give another method. The guide's eps is needed at every scale, so only `interval` saves evaluations
    (outside of it the result is the conditional prediction).
    """
    check_null(null)
    need_gaussian("cfg_plus_plus", denoiser.process)

    def combine(state, main, guide, scale, x, step):
        x0 = each(_line, main.x0, guide.x0, scale)
        return Prediction(x0, guide.eps), state

    rule = Rule(lambda x: (), combine, neutral=False)
    return steered(in_one_batch(denoiser, null), rule, scale, interval=interval, interval_unit=interval_unit)


def projected_guided(
    denoiser: Denoiser,
    scale: Scale = 5.0,
    null: Any = None,
    *,
    eta: Number = 0.0,
    momentum: Number = -0.5,
    threshold: Number | None = None,
    interval: Sequence[Any] | None = None,
    interval_unit: str = "t",
) -> Denoiser:
    """Adaptive projected guidance (Sadat et al. 2024, algorithm 1): strong guidance without oversaturation.

        d <- x0 - x0_null + momentum d;  d' = d min(1, threshold / |d|);  x0 + (scale - 1) (d' - (1 - eta) d'_parallel)

    eta: how much of the part of d' that is parallel to x0 is kept; 1 keeps it all.
    momentum: weight of the previous difference, negative to favour what is new; the carry holds d per sample.
    threshold: bound on the norm of d, per sample; None for none.
    With eta 1, momentum 0 and no threshold this is `guided`, whose other arguments it shares. Norms and projections
    are per sample and per modality.
    """
    check_null(null)
    need_gaussian("projected_guided", denoiser.process)
    for name, value in (("eta", eta), ("momentum", momentum)):
        if not is_static(value) or not math.isfinite(value):
            raise invalid(name, value, "a number was expected")
    if threshold is not None and (not is_static(threshold) or not threshold > 0):
        raise invalid("threshold", threshold, "a positive number or None was expected")
    process = denoiser.process

    def init(x):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), x) if momentum else ()

    def combine(state, main, guide, scale, x, step):
        difference = jax.tree.map(jnp.subtract, main.x0, guide.x0)
        if momentum:
            difference = state = jax.tree.map(lambda d, old: d + momentum * old, difference, state)

        def move(x0, process, eps, direction, scale, t):
            if threshold is not None:
                norm = safe_sqrt(_inner(direction, direction))
                direction = direction * jnp.where(norm > threshold, threshold * safe_inverse(norm), 1.0)
            if eta != 1:
                along = _inner(direction, x0) * safe_inverse(_inner(x0, x0)) * x0
                direction = direction - (1.0 - eta) * along
            strength = scale if is_static(scale) else expand(scale, x0)
            alpha, sigma = expand(process.alpha(t), x0), expand(process.sigma(t), x0)
            # At sigma = 0 nothing is left to be guessed: x_t is x0.
            shift = (strength - 1.0) * direction * (sigma != 0)
            return x0 + shift, eps - alpha / jnp.where(sigma == 0, 1.0, sigma) * shift

        return with_pair(main, each(move, main.x0, by_modality(process), main.eps, difference, scale, step.t)), state

    rule = Rule(init, combine)
    return steered(in_one_batch(denoiser, null), rule, scale, interval=interval, interval_unit=interval_unit)


def linear_rule(process: Any, rescale: Number = 0.0) -> Rule:
    """Equation (1), for log-probabilities where the process is discrete; then `rescale`, as in `guided`."""
    if not is_static(rescale) or not 0 <= rescale <= 1:
        raise invalid("rescale", rescale, "a number from 0 (off) to 1 was expected")
    if rescale:
        need_gaussian("rescale", process)
    processes = by_modality(process)

    def combine(state, main, guide, scale, x, step):
        def mix(x0, guide_x0, eps, guide_eps, scale, process, t):
            if not is_gaussian(process):
                return _log_line(x0, guide_x0, scale), eps
            mixed = _line(x0, guide_x0, scale), _line(eps, guide_eps, scale)
            return _restore_deviation(*mixed, x0, eps, process, t, rescale) if rescale else mixed

        pair = each(mix, main.x0, guide.x0, main.eps, guide.eps, scale, processes, step.t)
        return with_pair(main, pair), state

    return Rule(lambda x: (), combine)


def _line(main, guide, scale):
    """`guide + scale (main - guide)`, exactly `main` where the scale is 1."""
    if is_static(scale):
        return guide + scale * (main - guide)
    scale = expand(scale, main)
    return jnp.where(scale == 1, main, guide + scale * (main - guide))


def _log_line(main, guide, scale):
    """The line through log-probabilities, normalised; what is impossible under the condition stays so."""
    scale = jnp.asarray(scale, main.dtype)
    scale = expand(scale, main) if scale.ndim else scale
    impossible = main <= 0.5 * LOG_ZERO
    # Where only the guide rules a token out, the difference says nothing: the main answer stands.
    finite_guide = jnp.where(guide <= 0.5 * LOG_ZERO, main, guide)
    mixed = jnp.where(impossible, LOG_ZERO, finite_guide + scale * (main - finite_guide))
    mixed = jnp.maximum(jax.nn.log_softmax(mixed, axis=-1), LOG_ZERO)
    return jnp.where(scale == 1, main, jnp.where(scale == 0, guide, mixed))


def _restore_deviation(x0, eps, main_x0, main_eps, process, t, share):
    alpha, sigma = expand(process.alpha(t), x0), expand(process.sigma(t), x0)
    v, main_v = alpha * eps - sigma * x0, alpha * main_eps - sigma * main_x0
    axes = tuple(range(1, v.ndim))
    deviation, main_deviation = (safe_sqrt(jnp.var(value, axes, keepdims=True)) for value in (v, main_v))
    # Nothing is restored where an answer is constant: what is left of its deviation is rounding.
    size = jnp.mean((alpha * eps) ** 2 + (sigma * x0) ** 2, axes, keepdims=True)
    constant = deviation <= 1e-6 * safe_sqrt(size)
    ratio = jnp.where(constant, 1.0, main_deviation * safe_inverse(deviation))
    change = share * (ratio - 1.0) * v / (alpha**2 + sigma**2)
    return x0 - sigma * change, eps + alpha * change


def _inner(a, b):
    """Inner products per sample, `[B, 1, ...]`."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)
