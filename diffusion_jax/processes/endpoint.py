"""Gaussian processes with a known second endpoint: data becomes noise around something that the condition holds.

    x_t = a(t) (x0 + gamma(t) r) + s(t) eps,    r = m - x0,    gamma(0) = 0,  gamma(1) = 1                       (1)

runs from clean data x0 to noise around a known m of the same shape: a picture with shadows, rain or blur for one
without. At t = 1 nothing of x0 is left but what m has of it, so a run begins with m and noise alone, and what m and x0
have in common is in the state all the time.

Since m is known, so is `a gamma m`, the part of the mean that it makes. The process is that of the rest,

    y_t = x_t - b(t) m = alpha(t) x0 + sigma(t) eps,    b = a gamma,  alpha = a (1 - gamma),  sigma = s,         (2)

an ordinary Gaussian process, with y_0 = x_0 and y_1 pure noise. Solvers, guidance, inversion, losses and weights work
on y with the alpha and sigma of (2), and are those of every other process: a step from t to s at a frozen pair is the
same step of y and of x, because both differ by a known term. Only what the network is fed and what it answers depend on
m: it sees x_t, and may answer with it (3). Both happen in `network_input` and `predict` of the process that knows m,
which `process.given(cond)` returns with what of the condition is the network's; denoisers and losses ask for both by
`processes.with_condition`. Any process whose mean is shifted by a known amount can be written so, as another schedule
of `alpha`, `sigma` and `endpoint` (b).

    residual_noise: (x_t - a x0) / s = eps + (b / s) r        residual: r                                        (3)

are predictions of their own. The first is what a network that predicts eps says where x_t is taken for noised x0, so a
network without shadows is changed little by it; unlike eps it gives x0 even at t = 1, where alpha is 0 and a is not.
The pair (x0, eps) follows from an answer as in `processes.gaussian`, and r = m - x0.

Published settings, as arguments of `residual_diffusion`: the shadow residual schedule is `vp_scaled_linear()`, gamma
tied to its noise; residual denoising diffusion (Liu et al. 2024, RDDM) is `edm(0.1, time="t"), "residual",
share="decreasing"`; Resfusion (Shi et al. 2024) is `vp_linear(), share="odds", end=t` with a(t) = 1/2.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from diffusion_jax.errors import InvalidInput, invalid, unknown
from diffusion_jax.processes.gaussian import NETWORK_TIMES, PARAMETERIZATIONS, GaussianProcess
from diffusion_jax.processes.schedules import as_time, check_positive, check_time, safe_inverse, safe_log
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Condition, Number, Prediction

SHARES: dict[str, Callable[..., Any]] = {
    "noise": lambda a, last, t: (a - last) / (1.0 - last),
    "odds": lambda a, last, t: (a - last) / (a * (1.0 - last)),
    "decreasing": lambda a, last, t: jnp.square(1.0 - t),
    "none": lambda a, last, t: jnp.ones_like(t),
}
"""1 - gamma of equation (1), as functions of a(t), a(1) and t, exactly 1 at t = 0 and, but for "none", 0 at 1.

noise: gamma = (1 - a) / (1 - a(1)). odds: a gamma = (1 - a) a(1) / (1 - a(1)), which is 1 - a where a(1) = 1/2
(Resfusion). decreasing: gamma = 1 - (1 - t)^2 (RDDM). none: gamma = 0, where m is no part of the process at all.
"""


@dataclasses.dataclass(frozen=True)
class ResidualSchedule:
    """alpha, sigma and b of equation (2). schedule: a and s, run up to its time `end`; share: a key of `SHARES`."""

    schedule: Any
    share: str = "noise"
    end: Number = 1.0

    def __post_init__(self):
        check_positive(end=self.end)
        if self.end > 1:
            raise invalid("end", self.end, "a time in (0, 1] is needed")
        if self.share not in SHARES:
            raise unknown("share", self.share, SHARES)

    def whole(self, t: ArrayLike) -> Array:
        """a(t), what x0 and m have together."""
        return self.schedule.alpha(self.end * as_time(t))

    def _left(self, t):
        a, last = self.whole(t), self.schedule.alpha(as_time(self.end))
        left = SHARES[self.share](a, last, as_time(t))
        # Clean is clean: XLA divides by numbers that it knows with a rounding more.
        return left + jax.lax.stop_gradient(jnp.where(as_time(t) == 0, 1.0 - left, 0.0))

    def alpha(self, t: ArrayLike) -> Array:
        return self.whole(t) * self._left(t)

    def sigma(self, t: ArrayLike) -> Array:
        return self.schedule.sigma(self.end * as_time(t))

    def endpoint(self, t: ArrayLike) -> Array:
        """b(t)."""
        return self.whole(t) * (1.0 - self._left(t))

    def log_snr(self, t: ArrayLike) -> Array:
        return 2.0 * (safe_log(self.alpha(t)) - safe_log(self.sigma(t)))

    def inverse_log_snr(self, log_snr: ArrayLike) -> Array:
        """By bisection; its derivative is that of the inverse, and 0 where `log_snr` has none."""
        wanted = as_time(log_snr)
        finite = jnp.where(jnp.isfinite(wanted), wanted, 0.0)
        goal = jax.lax.stop_gradient(wanted)

        def halved(_, ends):
            low, high = ends
            middle = 0.5 * (low + high)
            noisier = self.log_snr(middle) < goal
            return jnp.where(noisier, low, middle), jnp.where(noisier, middle, high)

        start = jnp.zeros_like(goal), jnp.ones_like(goal)
        low, high = jax.lax.fori_loop(0, 30, halved, start)
        # Noise that no t has is at 1, none at 0.
        t = jnp.where(high >= 1, 1.0, jnp.where(low <= 0, 0.0, 0.5 * (low + high)))
        rate = jax.jvp(self.log_snr, (t,), (jnp.ones_like(t),))[1]
        slope = jnp.where(jnp.isfinite(rate) & (t > 0) & (t < 1), safe_inverse(rate), 0.0)
        return t + jax.lax.stop_gradient(slope) * (finite - jax.lax.stop_gradient(finite))


def _noise_and_residual(process, t):
    share = process.endpoint_share(t) * safe_inverse(process.sigma(t))
    return -share, jnp.ones_like(t), jnp.ones_like(t), share


def _residual(process, t):
    one = jnp.ones_like(t)
    return -one, jnp.zeros_like(t), one, one


WITH_ENDPOINT: dict[str, Callable[..., Any]] = {"residual_noise": _noise_and_residual, "residual": _residual}
"""Predictions with a part of m: functions `(process, t) -> (c_x0, c_eps, scale, c_m)` of the equation

    scale(t) * output = c_x0(t) * x0 + c_eps(t) * eps + c_m(t) * m.
"""

PLAIN = ("x0", "epsilon", "v", "velocity")
"""Predictions of the pair of y alone, as every Gaussian process has them."""


@dataclasses.dataclass(frozen=True)
class EndpointProcess(GaussianProcess):
    """The Gaussian process of y_t, equation (2); `residual_diffusion` makes one.

    schedule: alpha, sigma, log_snr and inverse_log_snr as for every Gaussian process, and `endpoint(t)`, b of (2).
    prediction: a key of `WITH_ENDPOINT`, or one of `PLAIN`. key: of the condition, the entry that is m.
    endpoint: m `[B, ...]`, of the shape of the data; None before `given`.
    told: the process by whose time the network is told t, with `end` as its t at 1; this one when None.
    """

    prediction: str = "residual_noise"
    key: str = "endpoint"
    told: GaussianProcess | None = None
    end: Number = 1.0
    endpoint: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self):
        if self.prediction not in (*WITH_ENDPOINT, *PLAIN):
            raise unknown("prediction", self.prediction, (*WITH_ENDPOINT, *PLAIN))
        if self.told is None and self.time.endswith("index"):
            raise invalid("time", self.time, "it needs a process with discrete steps to be told by")
        if self.time not in NETWORK_TIMES:
            raise unknown("time", self.time, NETWORK_TIMES)

    def given(self, cond: Condition) -> tuple["EndpointProcess", Condition]:
        """This process with its endpoint, and what is left of the condition, for the network.

        A network that is to see the endpoint has it under a name of its own too ("concat", "control"). Raises
        InvalidInput for a condition without it.
        """
        if not isinstance(cond, Mapping) or self.key not in cond:
            have = f"has {sorted(cond)}" if isinstance(cond, Mapping) else "is empty"
            raise InvalidInput(f"The process needs cond[{self.key!r}], its known endpoint, but the condition {have}.")
        process = copy.copy(self)
        object.__setattr__(process, "endpoint", cond[self.key])
        return process, {name: value for name, value in cond.items() if name != self.key} or None

    def endpoint_share(self, t: ArrayLike) -> Array:
        """b(t) of equation (2), any shape; 0 at t = 0. Raises InvalidInput for a known t outside of [0, 1]."""
        check_time(t)
        return self.schedule.endpoint(as_time(t))

    def coefficients(self, t):
        """As of every Gaussian process, of y."""
        if self.prediction in PLAIN:
            return PARAMETERIZATIONS[self.prediction](self, t)
        return WITH_ENDPOINT[self.prediction](self, t)[:3]

    def network_input(self, x_t, t):
        """x_t of equation (1), for `x_t`, which is y_t, of (2)."""
        return x_t + self._of_endpoint(self.endpoint_share(t), x_t)

    def network_time(self, t):
        """What the network is fed for t: what the process without an endpoint would tell it."""
        check_time(t)
        return super().network_time(t) if self.told is None else self.told.network_time(self.end * as_time(t))

    def predict(self, network_output, x_t, t) -> Prediction:
        """The pair (x0, eps) of y from the network's output at (y_t, t)."""
        if self.prediction not in PLAIN:
            t = as_time(t)
            _, _, scale, share = WITH_ENDPOINT[self.prediction](self, t)
            network_output = network_output - self._of_endpoint(share * safe_inverse(scale), x_t)
        return super().predict(network_output, x_t, t)

    def target(self, x0, noise, t):
        """What the network's output is regressed to; exactly the noise where the endpoint is x0 itself."""
        if self.prediction in PLAIN:
            return super().target(x0, noise, t)
        c_x0, c_eps, scale, share = WITH_ENDPOINT[self.prediction](self, as_time(t))
        of_x0, of_eps, of_residual = (c * safe_inverse(scale) for c in (c_x0 + share, c_eps, share))
        residual = self._of_endpoint(1.0, x0) - x0
        return expand(of_eps, x0) * noise + expand(of_residual, x0) * residual + expand(of_x0, x0) * x0

    def _of_endpoint(self, share, like):
        if self.endpoint is None:
            raise InvalidInput(
                "The process has a known endpoint that nobody gave: denoisers.denoiser and objectives.denoising take "
                "it from the condition, by processes.with_condition."
            )
        if jnp.shape(self.endpoint) != jnp.shape(like):
            told = f"the shape of the data, {jnp.shape(like)}, is needed"
            raise invalid(f"the shape of cond[{self.key!r}]", jnp.shape(self.endpoint), told)
        return expand(share, like) * self.endpoint


def residual_diffusion(
    process: GaussianProcess,
    prediction: str = "residual_noise",
    *,
    share: str = "noise",
    end: Number = 1.0,
    key: str = "endpoint",
) -> EndpointProcess:
    """Equation (1) with a and s of `process`: from x0 to noise around `cond[key]`, of the shape of x0.

    prediction: "residual_noise", "residual", or "x0", "epsilon", "v", "velocity" of the pair (x0, eps).
    share: how gamma grows, a key of `SHARES`.
    end: the time of `process` at which gamma is 1, where this process ends: less noise than that of `process` leaves
        more of the endpoint in the first state. The network is told the times of `process`, so it may be a trained one.

    It is sampled as any other, by `sample(key, denoiser(network, process), ..., cond={"endpoint": m})`, and gives x0.
    Raises InvalidInput for a process that is not Gaussian, and where gamma or the prediction are not defined: with a
    share tied to an a(t) that does not fall, and "residual_noise" where nothing of the endpoint is left, a(1) = 0.
    """
    if not isinstance(process, GaussianProcess) or isinstance(process, EndpointProcess):
        raise invalid("process", type(process).__name__, "an ordinary Gaussian process is needed")
    schedule = ResidualSchedule(process.schedule, share, end)
    with jax.ensure_compile_time_eval():
        last = float(process.alpha(float(end)))
    if share in ("noise", "odds") and last == 1:
        raise invalid("share", share, "alpha of the process is 1 at all t; use 'decreasing'")
    if last == 0 and (share == "odds" or prediction == "residual_noise"):
        raise invalid("end", end, "alpha of the process is 0 there: take an earlier end, another share or prediction")
    return EndpointProcess(schedule, prediction, process.time, process.sigma_data, key, process, end)
