"""Forecasts by dynamic mode decomposition: the last values as a few modes that grow, decay and turn.

Values a span apart that follow one linear operator, y_(i+1) = A y_i, are sums of exponentials. The operator that two
modes leave is a recurrence with two numbers, of which least squares over all entries of a sample find the best
(the companion form of dynamic mode decomposition, Schmid 2010),

    y_i = a y_(i-1) + b y_(i-2),        lambda_1, lambda_2 the roots of  z^2 = a z + b                         (1)

and k spans ahead, k any number, the forecast is the combination of the last two values that is exact for both modes:

    y(k) = alpha y_0 + beta y_(-1),        lambda_j^k = alpha + beta / lambda_j  for both j                    (2)
"""

import jax.numpy as jnp

from diffusion_jax.acceleration.forecasting import Forecaster, taylor
from diffusion_jax.errors import invalid
from diffusion_jax.processes import safe_inverse, safe_sqrt


def dmd(history: int = 4, ridge: float = 1e-6) -> Forecaster:
    """Two modes, real or a turning pair, fitted to the last `history` values of each sample and leaf by itself.

    history: values that are kept, 3 or more; history - 2 equations (1) are fitted together.
    ridge: what pulls (a, b) to (2, -1), the straight line through the last two values, relative to the data: what the
        values leave open stays a line.

    Exact for sums of two exponentials, for straight lines and for constants; the forecast is that of `taylor(1)` until
    three values an equal span apart are known (a longer history is used as far back as spans are equal). Other than
    with rules that know times alone, a sample has weights of its own.

    The idea is that of the DMD calibrator of cache-dit (1.5), which takes more modes by a singular value decomposition
    and their eigenvectors; here two, in closed form, so that it runs wherever XLA does.
    """
    if not isinstance(history, int) or history < 3:
        raise invalid("history", history, "it must be an integer, 3 or more")
    if not ridge > 0:
        raise invalid("ridge", ridge, "it must be positive")

    def fitted(values, lead, knots, at, count):
        y = values.reshape(*values.shape[: 1 + lead], -1)
        spans = knots[:-1] - knots[1:]
        span = jnp.where(count > 1, spans[0], 1.0)
        equal = (jnp.abs(spans - span) <= 1e-3 * jnp.abs(span)) & (jnp.arange(1, history) < count)
        p, q = _line_correction(y, jnp.cumprod(equal)[1:].astype(y.dtype), ridge)
        steps = jnp.where(count > 1, (at - knots[0]) / span, 0.0)
        whole, change = _advanced(p, q, steps)
        moved = y[0] + whole[..., None] * y[0] + change[..., None] * (y[0] - y[1])
        return jnp.where(count > 1, moved, y[0]).reshape(values.shape[1:])

    # There are no differences: D^0 is all that is updated.
    return Forecaster(history - 1, lambda knots, at: jnp.zeros(history - 1), taylor(history - 1).weights, fitted)


def _line_correction(y, counts, ridge):
    """(p, q) `[*lead]` with `a = 2 + p + q, b = -1 - q` in equation (1): what the values differ from a straight line.

    Fitted to `y_0 - 2 y_1 + y_2 = p y_1 + q (y_1 - y_2)`, whose two columns are far from parallel where y_1 and y_2 are
    not. counts: `[history - 2]`, which equations count.
    """
    bend, value, slope = y[:-2] - 2 * y[1:-1] + y[2:], y[1:-1], y[1:-1] - y[2:]

    def dot(a, b):
        return jnp.einsum("i...d,i...d,i->...", a, b, counts, precision="highest")

    # A column of zeros has no part in it.
    per_length = [safe_inverse(safe_sqrt(dot(column, column))) for column in (value, slope)]
    right = [dot(column, bend) * inverse for column, inverse in zip((value, slope), per_length)]
    cosine = dot(value, slope) * per_length[0] * per_length[1]
    diagonal = 1.0 + ridge
    determinant = diagonal**2 - cosine**2
    p = (diagonal * right[0] - cosine * right[1]) / determinant * per_length[0]
    q = (diagonal * right[1] - cosine * right[0]) / determinant * per_length[1]
    return p, q


def _advanced(p, q, steps):
    """alpha + beta - 1 and -beta of equation (2).

    With the logarithms mu +- nu of the roots: beta = -e^(mu (k + 1)) S, alpha = e^(mu k) (cosh(nu k) + S cosh nu), and
    S = sinh(nu k) / sinh(nu), k for equal roots.
    """
    square = (p + 0.25 * (p + q) ** 2).astype(jnp.complex64)
    # What follows is even in the root: moved off 0, where the root alone has an infinite derivative, it has its own.
    half = jnp.sqrt(jnp.where(jnp.abs(square) < 1e-12, square + 1e-12, square))
    beyond = [0.5 * (p + q) + half, 0.5 * (p + q) - half]
    logs = [jnp.log1p(jnp.where(jnp.abs(1 + root) < 1e-6, 1e-6 - 1, root)) for root in beyond]
    mu, nu = (logs[0] + logs[1]) / 2, (logs[0] - logs[1]) / 2
    near = jnp.abs(nu) < 1e-2
    apart = jnp.where(near, 1.0, nu)
    ratio = jnp.where(near, steps * (1 + nu**2 * (steps**2 - 1) / 6), jnp.sinh(apart * steps) / jnp.sinh(apart))
    minus_beta = jnp.exp(mu * (steps + 1)) * ratio
    alpha = jnp.exp(mu * steps) * (jnp.cosh(nu * steps) + ratio * jnp.cosh(nu))
    return (alpha - minus_beta - 1).real, minus_beta.real
