"""Where a value is finite its derivative is too: every process, every function of t, both ends; and no t outside.

What is evaluated is not jitted: operations of one shape are compiled once for all processes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes
from diffusion_jax.errors import InvalidInput
from diffusion_jax.processes import NETWORK_TIMES, PARAMETERIZATIONS, DiscreteVP, GaussianProcess
from diffusion_jax.typing import Prediction

TIMES = np.array([0, 1e-7, 1e-5, 1e-3, 0.3, 0.5, 0.999, np.nextafter(np.float32(1), np.float32(0)), 1], np.float32)
LOG_SNRS = np.array([-np.inf, -1e4, -200, -90, -40, -5, 0, 5, 40, 90, 200, 1e4, np.inf], np.float32)
GAUSSIAN = {
    "vp_linear": processes.vp_linear(20),
    "zero terminal": processes.vp_cosine(20, zero_terminal_snr=True),
    "zero terminal, shifted": processes.vp_cosine(20, zero_terminal_snr=True, log_snr_shift=-2.0),
    "linear in sigma": GaussianProcess(DiscreteVP(processes.betas("linear", 20), "sigma")),
    "linear in log sigma": GaussianProcess(DiscreteVP(processes.betas("linear", 20), "log_sigma")),
    "vp_continuous": processes.vp_continuous(),
    "cosine": processes.cosine(),
    "ve": processes.variance_exploding(),
    "edm": processes.edm(),
    "flow": processes.rectified_flow(),
    "flow, shifted": processes.rectified_flow(shift=3),
}
DISCRETE = {
    "linear": processes.absorbing(5),
    "cosine": processes.absorbing(5, "cosine"),
    "geometric": processes.absorbing(5, "geometric"),
    "root": processes.absorbing(5, processes.KeepPolynomial(0.5)),
    "square": processes.absorbing(5, processes.KeepPolynomial(2.0, 1e-3)),
    "uniform": processes.uniform(5),
}
X0, NOISE = np.random.default_rng(0).standard_normal((2, len(TIMES), 2), np.float32)


def check(function, at, name, forwards=False):
    """Values are no NaN and derivatives are finite: backwards, and forwards where a product is taken from that side."""
    values, backwards = jax.vjp(function, jnp.asarray(at))
    slopes = backwards(jax.tree.map(jnp.ones_like, values))
    if forwards:
        slopes += (jax.jvp(function, (jnp.asarray(at),), (jnp.ones_like(at),))[1],)
    for leaf in jax.tree.leaves(values):
        assert not np.isnan(leaf).any(), f"{name} is NaN at {at[np.argwhere(np.isnan(leaf))[:, 0]]}"
    for leaf in jax.tree.leaves(slopes):
        assert np.isfinite(leaf).all(), f"the derivative of {name} at {at[np.argwhere(~np.isfinite(leaf))[:, 0]]}"
    return values


def of_pairs(process):
    def function(t):
        x_t, pair = process.marginal(X0, NOISE, t), Prediction(X0, NOISE)
        found = process.predict(process.target(X0, NOISE, t), x_t, t)
        return x_t, found.x0, found.eps, process.network_input(x_t, t), process.output(pair, t)

    return function


def of_hub(process):
    def function(t):
        x_t, pair = process.marginal(X0, NOISE, t), Prediction(X0, NOISE)
        derived = process.score(pair, t), process.velocity(pair, t), process.v(pair, t)
        return *derived, process.from_x0(X0, x_t, t).eps, process.from_eps(NOISE, x_t, t).x0

    return function


@pytest.mark.parametrize("name", GAUSSIAN)
def test_whatever_a_gaussian_process_says_of_t_has_a_derivative_at_both_ends(name):
    process = GAUSSIAN[name]
    for function in ("alpha", "sigma", "log_snr", "rates", "edm_scalings"):
        check(getattr(process, function), TIMES, function, forwards=True)
    for time in NETWORK_TIMES:
        if not time.endswith("index") or hasattr(process.schedule, "position"):
            check(dataclasses.replace(process, time=time).network_time, TIMES, time)
    finite = [check(of_hub(process), TIMES, "a derived quantity")]
    for prediction in PARAMETERIZATIONS:
        finite.append(check(of_pairs(dataclasses.replace(process, prediction=prediction)), TIMES, prediction))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(finite))


@pytest.mark.parametrize("name", [*GAUSSIAN, *DISCRETE])
def test_the_inverse_of_the_log_snr_stays_within_and_has_a_derivative_everywhere(name):
    process = (GAUSSIAN | DISCRETE)[name]
    times = check(process.inverse_log_snr, LOG_SNRS, "the inverse log-SNR", forwards=True)
    assert (np.diff(times) <= 0).all() and times[0] == 1 and times[-1] == 0
    again = check(lambda t: process.inverse_log_snr(process.log_snr(t)), TIMES, "the inverse of the log-SNR")
    np.testing.assert_allclose(again, TIMES, atol=2e-6)


@pytest.mark.parametrize("name", DISCRETE)
def test_whatever_a_discrete_process_says_of_t_has_a_derivative_at_both_ends(name):
    process = DISCRETE[name]
    for function in ("alpha", "sigma", "log_snr", "nelbo_weight", "network_time"):
        if hasattr(process, function):
            check(getattr(process, function), TIMES, function)
    logits = np.random.default_rng(1).standard_normal((len(TIMES), 2, 5), np.float32)
    tokens = np.array([[0, getattr(process, "mask_id", 3)]] * len(TIMES))

    def posterior(t):
        # The clean token certain, impossible, and in between.
        certain = jnp.where(jnp.arange(5) == 2, 0.0, processes.LOG_ZERO) + jnp.zeros_like(logits)
        return [process.posterior(process.predict(one, tokens, t).x0, tokens, t, 0.5 * t) for one in (logits, certain)]

    values = check(posterior, TIMES, "the posterior")
    assert all(np.isfinite(leaf).all() for leaf in values)


def test_clean_data_stays_and_noise_that_cannot_be_inverted_gives_nothing():
    """The right values at the ends, where the derivative is that of the formula."""
    flow = processes.rectified_flow()
    c_skip, c_out, ratio, c_in = flow.edm_scalings(np.array([0.0, 0.5, 1.0], np.float32))
    np.testing.assert_allclose(c_skip, [1, 0.2, 0], atol=1e-7)
    np.testing.assert_allclose(c_out, [0, 0.5 / np.sqrt(1.25), 0.5], atol=1e-7)
    np.testing.assert_allclose(c_in, [2, 1 / np.sqrt(1.25), 0], atol=1e-7)
    assert ratio[0] == 0 and ratio[2] > 1e37
    slope = jax.jacfwd(lambda t: jnp.stack(flow.edm_scalings(t))[jnp.array([0, 1, 3])])(1.0)
    # c_skip = (a d)^2 / (s^2 + a^2 d^2), c_out = s d / sqrt(...), c_in = a / sqrt(...) with a = 0, a' = -1, s = s' = 1.
    np.testing.assert_allclose(slope, [0, 0, -1], atol=1e-6)
    # The inverse has the inverse derivative, also at the last t that there is.
    for process, t in ((processes.gvp(), 1 - 1e-3), (processes.edm(), 1.0), (processes.vp_continuous(), 1.0)):
        slope = jax.grad(process.inverse_log_snr)(process.log_snr(t))
        np.testing.assert_allclose(slope, 1 / jax.grad(process.log_snr)(t), rtol=2e-3)


@pytest.mark.parametrize(
    "process", [processes.gvp(), processes.vp_linear(), processes.absorbing(5), DISCRETE["uniform"]]
)
def test_a_time_outside_is_refused_and_rounding_is_not(process):
    for wrong in (-0.1, 1.5, 999, np.array([0.5, 2.0]), jnp.float32(np.nan), jnp.array([3])):
        for function in (process.alpha, process.sigma, process.log_snr, process.network_time):
            with pytest.raises(InvalidInput, match=r"t is .* but times lie in \[0, 1\]"):
                function(wrong)
    for right in (0, 1, 1 + 1e-6, np.float32(-1e-7), jnp.array([[0.5], [1.0]])):
        process.alpha(right)
    with pytest.raises(InvalidInput, match="times lie in"):
        process.corrupt(jax.random.key(0), jnp.zeros((1, 2), process.prior(jax.random.key(0), (1, 2)).dtype), 1000)
