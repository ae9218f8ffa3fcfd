"""The exact denoiser of a Gaussian mixture: a network that needs no training, for tests, demonstrations and references.

When x0 is drawn from a mixture of Gaussians with weights w_k, means m_k and covariances C_k, so is x_t:

    p_t(x) = sum_k w_k N(x; a m_k, S_k),        S_k = a C_k a + s^2,                                           (1)
    E[x0 | x] = sum_k r_k (m_k + C_k a S_k^-1 (x - a m_k)),        r_k the posterior weights of x in (1)       (2)
    E[eps | x] = sum_k r_k s S_k^-1 (x - a m_k) = -s grad log p_t(x)                                           (3)

with `a = alpha(t)` and `s = sigma(t)`, diagonal matrices when t is a vector: the formulas then hold as they stand, so
every coordinate may have a time of its own: frames of a clip (`gaussian_clip`), modalities of joint data. With all
C_k = 0 this is the optimal denoiser of a finite data set. With S_k = L L' and z = L^-1 (x - a m_k), (2) and (3) are

    E[x0 | x, k] = m_k + (C_k a L'^-1) z,        E[eps | x, k] = (s L'^-1) z                                   (4)

and the columns of the first j coordinates alone are what is known from the first j: the causal denoiser, in which a
frame sees no later ones. Only Gaussian processes (and dicts of them) have this closed form; nothing here is trained.
"""

import math
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from diffusion_jax.errors import InvalidInput, invalid
from diffusion_jax.models import Staged
from diffusion_jax.processes import is_gaussian, members, safe_sqrt
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import ONE_EVALUATION, Data, Denoiser, Prediction


class GaussianMixture(NamedTuple):
    """A mixture of K Gaussians, as a pytree: the parameters of `analytic`. Build it with `gaussian_mixture`.

    log_weights: `[K]`, normalised.
    means: `[K, *data]`, or a dict of those for joint data (the modalities share the component).
    variances: `[K, *data]` of diagonal covariances, or None (a dict like `means` for joint data).
    covariances: `[K, D, D]` over the flattened data, or None (for joint data a dict like `means`, or one array over all
        modalities, flattened in alphabetical order: modalities then depend on each other within a component).
    labels: `[K]`, the class of each component, or None.
    """

    log_weights: Any
    means: Any
    variances: Any = None
    covariances: Any = None
    labels: Any = None


class Posterior(NamedTuple):
    """What is known of x_t: E[x0 | x_t], E[eps | x_t], log p_t(x_t) `[B]` and the components' weights `[B, K]`."""

    x0: Any
    eps: Any
    log_density: Any
    responsibilities: Any


def gaussian_mixture(means, stds=1.0, weights=None, *, covariances=None, labels=None) -> GaussianMixture:
    """A mixture of Gaussians from plain values.

    means: `[K, *data]`, or a dict of such arrays for joint data.
    stds: standard deviations: one number, `[K]` (isotropic) or `[K, *data]` (diagonal); 0 makes point masses.
    weights: `[K]`, positive, any sum; equal when absent.
    covariances: `[K, D, D]` over the flattened data, positive definite; replaces `stds`. For joint data a dict of them,
        or one array over all modalities, flattened and concatenated in alphabetical order.
    labels: `[K]` integers: the class of each component, to which `cond["label"]` refers.

    Raises InvalidInput when shapes do not agree or a standard deviation is negative.
    """
    if isinstance(means, dict):
        parts = {
            name: gaussian_mixture(
                mean,
                stds[name] if isinstance(stds, dict) else stds,
                weights,
                covariances=covariances.get(name) if isinstance(covariances, dict) else None,
                labels=labels,
            )
            for name, mean in means.items()
        }
        first = next(iter(parts.values()))
        together = {name: part.means for name, part in parts.items()}
        if covariances is not None and not isinstance(covariances, dict):
            size = sum(mean[0].size for mean in together.values())
            covariances = _dense(covariances, len(first.log_weights), size, first.log_weights.dtype)
            return GaussianMixture(first.log_weights, together, None, covariances, first.labels)
        return GaussianMixture(
            first.log_weights,
            together,
            {name: part.variances for name, part in parts.items()},
            {name: part.covariances for name, part in parts.items()},
            first.labels,
        )
    means = jnp.asarray(means, jnp.result_type(float))
    if means.ndim < 1:
        raise invalid("means.shape", means.shape, "a first axis over the components was expected")
    num = means.shape[0]
    # Values are checked in NumPy: a mixture of known numbers can be built while something else is being traced.
    weights = np.ones(num, means.dtype) if weights is None else np.asarray(weights, means.dtype)
    if weights.shape != (num,) or not ((weights > 0) & np.isfinite(weights)).all():
        raise invalid("weights", weights.tolist(), f"{num} positive numbers were expected, one per component")
    weights = jnp.asarray(weights)
    log_weights = jnp.log(weights / weights.sum())
    labels = None if labels is None else jnp.asarray(labels, jnp.int32)
    if labels is not None and labels.shape != (num,):
        raise invalid("labels.shape", labels.shape, f"one label per component, {(num,)}, was expected")
    if covariances is not None:
        return GaussianMixture(log_weights, means, None, _dense(covariances, num, means[0].size, means.dtype), labels)
    stds = np.asarray(stds, means.dtype)
    if stds.shape not in ((), (num,), means.shape):
        raise invalid("stds.shape", stds.shape, f"(), {(num,)} or {means.shape} was expected")
    if not ((stds >= 0) & np.isfinite(stds)).all():
        raise invalid("stds", stds.tolist(), "standard deviations must not be negative, nor infinite or NaN")
    stds = jnp.asarray(stds)
    stds = stds.reshape(stds.shape + (1,) * (means.ndim - stds.ndim)) if stds.ndim else stds
    return GaussianMixture(log_weights, means, jnp.broadcast_to(stds**2, means.shape), None, labels)


def _dense(covariances, num, size, dtype):
    covariances = jnp.asarray(covariances, dtype)
    if covariances.shape != (num, size, size):
        raise invalid("covariances.shape", covariances.shape, f"{(num, size, size)} was expected")
    if not isinstance(covariances, Tracer):
        known = np.asarray(covariances, np.float64)
        # A NaN compares with nothing.
        scale = np.abs(known).max()
        if not (np.abs(known - np.swapaxes(known, 1, 2)) <= 1e-5 * scale).all() or not np.isfinite(scale):
            raise InvalidInput("covariances must be finite and symmetric.")
        least = np.linalg.eigvalsh(known).min()
        if least < -1e-5 * scale:
            raise invalid("an eigenvalue of covariances", float(least), "none may be negative")
    return covariances


def gaussian_clip(frames: int = 6, features: int = 1, correlation: float = 0.9) -> GaussianMixture:
    """Clips `[B, frames, features]` of a stationary AR(1): unit variance, correlation `rho^|i - j|` between frames.

    The smallest world in which frames depend on each other, the same for any stretch of frames. Raises InvalidInput
    unless -1 < correlation < 1.
    """
    if not -1 < correlation < 1:
        raise invalid("correlation", correlation, "it must lie between -1 and 1")
    index = np.arange(frames)
    covariance = float(correlation) ** np.abs(index[:, None] - index)
    return gaussian_mixture(np.zeros((1, frames, features)), covariances=np.kron(covariance, np.eye(features))[None])


def _levels(process, x, t, dense):
    """alpha and sigma `[R, 1, *data]`; R is B, or 1 where one factor of a dense covariance serves all samples."""
    t = jnp.asarray(t)
    rows = 1 if dense and (t.ndim == 0 or t.shape[0] == 1) else x.shape[0]

    def level(value):
        return jnp.broadcast_to(expand(value, x), (rows, *x.shape[1:]))[:, None]

    return level(process.alpha(t)), level(process.sigma(t))


def _components(alpha, sigma, mean, variance, covariance, x, causal):
    """Per component: log N(x; a m_k, S_k) by coordinate, E[x0 | x, k] and E[eps | x, k], all `[B, K, *data]`."""
    residual = x[:, None] - alpha * mean
    if covariance is None:
        total = alpha**2 * variance + sigma**2
        # Point masses at sigma = 0: x is x0, whatever the component.
        known = total == 0
        # The precision is a constant where the variance vanishes: its derivative would be infinite.
        least = float(jnp.finfo(total.dtype).tiny ** 0.5)
        sharp = total < least
        precision = jnp.where(sharp, 1.0 / least, 1.0 / jnp.where(sharp, 1.0, total))
        gain = jnp.where(known, 1.0 / jnp.where(known, alpha, 1.0), alpha * variance * precision)
        log_density = -0.5 * (residual**2 * precision - jnp.log(precision / (2 * jnp.pi)))
        return log_density, mean + gain * residual, sigma * precision * residual
    flat = residual.reshape(*residual.shape[:2], -1)
    size = flat.shape[-1]
    a, s = (value.reshape(value.shape[0], 1, -1) for value in (alpha, sigma))
    total = a[..., :, None] * covariance * a[..., None, :] + s[..., None] ** 2 * jnp.eye(size)
    factor = jnp.linalg.cholesky(total)
    whitening = jax.scipy.linalg.solve_triangular(factor, jnp.broadcast_to(jnp.eye(size), factor.shape), lower=True)
    transposed = jnp.swapaxes(whitening, -1, -2)
    x0_gain, eps_gain = (covariance * a[..., None, :]) @ transposed, s[..., None] * transposed
    if causal:
        frame = np.arange(size) // math.prod(x.shape[2:])
        x0_gain, eps_gain = (jnp.where(frame[:, None] >= frame, gain, 0.0) for gain in (x0_gain, eps_gain))
    white = _times(whitening, flat)
    x0, eps = mean + _times(x0_gain, white).reshape(residual.shape), _times(eps_gain, white).reshape(residual.shape)
    log_diagonal = jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1))
    log_density = -0.5 * (white**2 + jnp.log(2 * jnp.pi)) - log_diagonal
    return log_density.reshape(residual.shape), x0, eps


def _times(matrix, vector):
    """Matrices `[R, K, D, D]` of vectors `[B, K, D]`."""
    if matrix.shape[0] == 1:
        return jnp.einsum("kij,bkj->bki", matrix[0], vector)
    return jnp.einsum("bkij,bkj->bki", matrix, vector)


def _together(parts, like):
    """A dict of `[A, *data]` as one array `[A, D]`, in alphabetical order; A broadcasts."""
    parts = {name: parts[name].reshape(*parts[name].shape[: -like[name].ndim + 1], -1) for name in sorted(parts)}
    lead = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts.values()))
    return jnp.concatenate([jnp.broadcast_to(part, (*lead, part.shape[-1])) for part in parts.values()], axis=-1)


def _apart(whole, like):
    """The inverse of `_together` for an array `[..., D]`."""
    sizes = [like[name][0].size for name in sorted(like)]
    pieces = jnp.split(whole, np.cumsum(sizes)[:-1], axis=-1)
    return {name: piece.reshape(*piece.shape[:-1], *like[name].shape[1:]) for name, piece in zip(sorted(like), pieces)}


def posterior(
    mixture: GaussianMixture, process: Any, x: Any, t: Any, label: ArrayLike | None = None, causal: bool = False
) -> Posterior:
    """Equations (1) to (3) at `x` `[B, *data]` and `t`, any prefix of its shape up to one time per coordinate.

    label: `[B]`, restricts each sample to the components of its class; a label that no component has (the null class
    of classifier-free guidance) means all components.
    causal: each frame (axis 1) sees itself and earlier ones only; responsibilities are then `[B, K, F]`.
    """
    if isinstance(x, dict):
        if causal:
            raise InvalidInput("causal is about the frames of one array, but x is a dict of modalities.")
        times = {name: t[name] if isinstance(t, dict) else t for name in x}
        separate = mixture.covariances if isinstance(mixture.covariances, dict) else None
        dense = {name: separate is None or separate[name] is not None for name in x}
        levels = {name: _levels(process.processes[name], x[name], times[name], dense[name]) for name in x}
        if separate is None:
            alpha, sigma = (_together({name: level[i] for name, level in levels.items()}, x) for i in (0, 1))
            whole = _components(
                alpha, sigma, _together(mixture.means, x), None, mixture.covariances, _together(x, x), causal
            )
            pieces = [_apart(values, x) for values in whole]
            parts = {name: tuple(piece[name] for piece in pieces) for name in x}
        else:
            parts = {
                name: _components(
                    *levels[name],
                    mixture.means[name],
                    mixture.variances[name],
                    separate[name],
                    x[name],
                    causal,
                )
                for name in x
            }
    else:
        levels = _levels(process, x, t, mixture.covariances is not None)
        parts = {"": _components(*levels, mixture.means, mixture.variances, mixture.covariances, x, causal)}

    def gathered(log_density):
        if causal:
            return log_density.reshape(*log_density.shape[:3], -1).sum(-1).cumsum(-1)
        return log_density.reshape(*log_density.shape[:2], -1).sum(-1)

    logits = reduce(jnp.add, [gathered(part[0]) for part in parts.values()])
    trailing = (1,) * (logits.ndim - 2)
    logits = logits + mixture.log_weights.reshape(-1, *trailing)
    if label is not None and mixture.labels is not None:
        same = jnp.asarray(label)[:, None] == mixture.labels
        same = same | ~same.any(axis=1, keepdims=True)
        prior = jax.nn.logsumexp(jnp.where(same, mixture.log_weights, -jnp.inf), axis=1, keepdims=True)
        logits = jnp.where(same.reshape(*same.shape, *trailing), logits - prior.reshape(-1, 1, *trailing), -jnp.inf)
    log_density = jax.nn.logsumexp(logits, axis=1)
    responsibilities = jax.nn.softmax(logits, axis=1)

    def mean(values):
        weights = responsibilities.reshape(responsibilities.shape + (1,) * (values.ndim - responsibilities.ndim))
        return (weights * values).sum(axis=1)

    x0 = {name: mean(part[1]) for name, part in parts.items()}
    eps = {name: mean(part[2]) for name, part in parts.items()}
    if not isinstance(x, dict):
        x0, eps = x0[""], eps[""]
    return Posterior(x0, eps, log_density[..., -1] if causal else log_density, responsibilities)


def score(mixture: GaussianMixture, process: Any, x: Any, t: Any) -> Data:
    """grad log p_t(x), finite wherever p_t has a density (also at sigma = 0, where `-eps / sigma` is not)."""
    return jax.grad(lambda x: posterior(mixture, process, x, t).log_density.sum())(x)


def log_density(mixture: GaussianMixture, process: Any, x: Any, t: Any) -> Float[Array, " B"]:
    """log p_t(x), `[B]`, in nats."""
    return posterior(mixture, process, x, t).log_density


def sample_mixture(key: Key[Array, ""], mixture: GaussianMixture, num: int) -> tuple[Data, Int[Array, " num"]]:
    """`num` exact samples of x0, and the component of each: `(x0 [num, *data], component [num])`."""
    key_component, key_noise = jax.random.split(key)
    component = jax.random.categorical(key_component, mixture.log_weights, shape=(num,))

    def one(key, mean, variance, covariance):
        noise = jax.random.normal(key, (num, *mean.shape[1:]), mean.dtype)
        if covariance is None:
            return mean[component] + safe_sqrt(variance)[component] * noise
        factor = jnp.linalg.cholesky(covariance)[component]
        return mean[component] + jnp.einsum("bij,bj->bi", factor, noise.reshape(num, -1)).reshape(noise.shape)

    if not isinstance(mixture.means, dict):
        return one(key_noise, mixture.means, mixture.variances, mixture.covariances), component
    if not isinstance(mixture.covariances, dict):
        whole = one(key_noise, _together(mixture.means, mixture.means), None, mixture.covariances)
        return _apart(whole, mixture.means), component
    keys = jax.random.split(key_noise, len(mixture.means))
    x0 = {
        name: one(k, mixture.means[name], mixture.variances[name], mixture.covariances[name])
        for k, name in zip(keys, sorted(mixture.means))
    }
    return x0, component


def analytic(process: Any, causal: bool = False) -> Denoiser:
    """The exact denoiser of a Gaussian mixture on `process`; its parameters are the `GaussianMixture`.

    Counts as one network evaluation a call. `extras` holds `log_density` `[B]` and `responsibilities` `[B, K]`.
    `cond["label"]` `[B]` selects the components of a class when the mixture has labels.
    causal: each frame (axis 1) is denoised from itself and earlier ones, as a network with temporally causal attention
    does. That is exact only where later frames are pure noise.

    Raises InvalidInput for a process that is not Gaussian (or a dict of Gaussian ones).
    """
    for part in members(process).values():
        if not is_gaussian(part):
            raise InvalidInput(f"analytic needs a Gaussian process, but {type(part).__name__} is not.")

    def init(params, x, cond):
        return ()

    def apply(params, carry, x, step, cond):
        found = posterior(params, process, x, step.t, (cond or {}).get("label"), causal)
        extras = {"log_density": found.log_density, "responsibilities": found.responsibilities}
        return Prediction(found.x0, found.eps, extras, ONE_EVALUATION), carry

    return Denoiser(init, apply, process)


def analytic_stages(process: Any) -> Staged:
    """`analytic` in stages, as `models.staged` cuts a network, so that methods that leave the body out can be studied.

        head: h_k = log p(k | x_t) + const, with mean zero over the K components        body: eps = E[eps | x_t]

    Nothing is trained and every feature is exact at every t. The constant is left out because it means nothing and
    would count in relative errors. The tail turns eps into what the process predicts. The parameters are a
    `GaussianMixture` of one array; its labels are ignored.

    process: fed t itself (`time="t"`), with any prediction but `edm`, whose input is scaled. Raises InvalidInput else.
    """
    if not is_gaussian(process) or process.time != "t" or process.prediction == "edm":
        raise InvalidInput("analytic_stages needs a Gaussian process with time='t' and another prediction than 'edm'.")

    def components(mixture, x, t):
        levels = _levels(process, x, t, mixture.covariances is not None)
        return _components(*levels, mixture.means, mixture.variances, mixture.covariances, x, False)

    def head(mixture, x, t, cond=None):
        log_density = components(mixture, x, t)[0]
        logits = mixture.log_weights + log_density.reshape(*log_density.shape[:2], -1).sum(-1)
        return logits - logits.mean(axis=1, keepdims=True)

    def body(mixture, h, x, t, cond=None):
        eps = components(mixture, x, t)[2]
        return (expand(jax.nn.softmax(h, axis=1), eps) * eps).sum(axis=1)

    def tail(mixture, z, x, t, cond=None):
        return process.output(process.from_eps(z, x, t), t), {}

    return Staged(head, body, tail, None)
