"""A weight names one loss: whatever the network predicts, the weighted error of its output is the same number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, timesteps
from diffusion_jax.errors import InvalidInput
from diffusion_jax.processes import PARAMETERIZATIONS

PROCESSES = {
    "vp": processes.vp_linear(),
    "cosine": processes.cosine(),
    "edm": processes.edm(),
    "flow": processes.rectified_flow(shift=2),
}
TIMES = np.array([0.02, 0.2, 0.5, 0.8, 0.97], np.float32)
WEIGHTS = {
    "x0": timesteps.x0_weight(),
    "epsilon": timesteps.epsilon_weight(),
    "v": timesteps.v_weight(),
    "min_snr": timesteps.min_snr_weight(),
    "soft_min_snr": timesteps.soft_min_snr_weight(),
    "p2": timesteps.p2_weight(),
    "sigmoid": timesteps.sigmoid_weight(),
    "elbo": timesteps.elbo_weight(),
    "edm": timesteps.edm_weight(),
}


def errors(process):
    """Squared errors of output, x0 and eps of one imperfect prediction x0_hat, for each of TIMES."""
    x0, noise, wrong = jax.random.normal(jax.random.key(0), (3, len(TIMES), 6))
    x_t = process.marginal(x0, noise, TIMES)
    found = process.from_x0(x0 + 0.3 * wrong, x_t, TIMES)
    output, target = process.output(found, TIMES), process.target(x0, noise, TIMES)
    return [np.asarray(jnp.sum(e**2, axis=1)) for e in (output - target, found.x0 - x0, found.eps - noise)]


@pytest.mark.parametrize("name", PROCESSES)
def test_the_weighted_loss_is_the_same_for_every_prediction(name):
    losses = {}
    for prediction in PARAMETERIZATIONS:
        process = dataclasses.replace(PROCESSES[name], prediction=prediction)
        error, x0_error, eps_error = errors(process)
        for kind, weight in WEIGHTS.items():
            losses.setdefault(kind, []).append(np.asarray(weight(process, TIMES)) * error)
        np.testing.assert_allclose(losses["x0"][-1], x0_error, rtol=2e-3)
        np.testing.assert_allclose(losses["epsilon"][-1], eps_error, rtol=2e-3)
    for kind, values in losses.items():
        for value in values:
            np.testing.assert_allclose(value, values[0], rtol=4e-3, err_msg=kind)


@pytest.mark.parametrize("name", PROCESSES)
def test_each_weight_is_the_published_function_of_snr(name):
    process = dataclasses.replace(PROCESSES[name], prediction="x0")
    snr = np.exp(np.asarray(process.log_snr(TIMES), np.float64))
    on_x0 = {kind: np.asarray(weight(process, TIMES)) for kind, weight in WEIGHTS.items()}
    expected = {
        "x0": np.ones_like(snr),
        "epsilon": snr,
        "min_snr": np.minimum(snr, 5),
        "soft_min_snr": 5 * snr / (snr + 5),
        "p2": snr / (1 + snr),
        "edm": snr + 1 / 0.5**2,
    }
    if name in ("vp", "cosine"):
        expected["v"] = snr + 1
    for kind, value in expected.items():
        np.testing.assert_allclose(on_x0[kind], value, rtol=1e-4, err_msg=kind)
    with jax.enable_x64(True):
        t, h = TIMES.astype(np.float64) + 3e-4, 1e-6
        rate = -(np.asarray(process.log_snr(t + h)) - np.asarray(process.log_snr(t - h))) / (2 * h)
        snr = np.exp(np.asarray(process.log_snr(t)))
        np.testing.assert_allclose(WEIGHTS["elbo"](process, t), 0.5 * rate * snr, rtol=1e-4)
        gate = 1 / (1 + snr * np.exp(1.0))
        np.testing.assert_allclose(WEIGHTS["sigmoid"](process, t), rate * gate * snr, rtol=1e-4)


def test_weights_that_are_one_on_their_own_output():
    ones = np.ones_like(TIMES)
    t = np.concatenate([[0.0], TIMES, [1.0]]).astype(np.float32)
    np.testing.assert_allclose(timesteps.edm_weight()(PROCESSES["edm"], t), 1.0, rtol=1e-5)
    np.testing.assert_allclose(timesteps.v_weight()(PROCESSES["cosine"], t), 1.0, rtol=1e-5)
    np.testing.assert_allclose(timesteps.epsilon_weight()(PROCESSES["vp"], t), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(timesteps.unit_weight()(PROCESSES["flow"], TIMES), ones)


@pytest.mark.parametrize("name", PROCESSES)
def test_weights_are_finite_at_both_ends_and_shaped_like_t(name):
    for prediction in PARAMETERIZATIONS:
        process = dataclasses.replace(PROCESSES[name], prediction=prediction)
        t = jnp.array([[0.0, 0.5], [1.0, 0.3]])
        for kind, weight in WEIGHTS.items():
            value = weight(process, t)
            assert value.shape == t.shape and np.isfinite(value).all() and (value >= 0).all(), (prediction, kind)


def test_min_snr_is_one_where_noise_dominates_for_epsilon():
    process = processes.vp_linear(prediction="epsilon")
    np.testing.assert_allclose(timesteps.min_snr_weight()(process, jnp.array([0.9, 1.0])), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: timesteps.min_snr_weight(-1), "gamma"),
        (lambda: timesteps.edm_weight(0), "sigma_data"),
        (lambda: timesteps.v_weight()(processes.absorbing(4), 0.5), "Absorbing"),
    ],
)
def test_wrong_values_are_named(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()


@pytest.mark.parametrize("name", ["vp", "zero terminal", "flow"])
def test_at_both_ends_a_weight_is_that_beside_it_with_a_derivative(name):
    """No clean entry of a vector time counts 10^24 times as much as its neighbours, whatever the rates are there."""
    process = (PROCESSES | {"zero terminal": processes.vp_cosine(20, zero_terminal_snr=True)})[name]
    times = jnp.asarray([0.0, 1e-6, 0.5, 1.0 - 1e-6, 1.0], jnp.float32)
    for prediction in PARAMETERIZATIONS:
        own = dataclasses.replace(process, prediction=prediction)
        for kind, weight in WEIGHTS.items():
            values, backwards = jax.vjp(lambda t, own=own, weight=weight: weight(own, t), times)
            slopes, values = np.asarray(backwards(jnp.ones_like(values))[0]), np.asarray(values)
            assert np.isfinite(values).all() and np.isfinite(slopes).all(), kind
            np.testing.assert_array_equal(values[[0, 4]], values[[1, 3]])
    # sigma' is infinite at the clean end of a table: there the velocity says nothing of the data, and counts nothing.
    slow = dataclasses.replace(processes.vp_linear(20), prediction="velocity")
    assert np.asarray(timesteps.epsilon_weight()(slow, np.array([0.0, 1e-3], np.float32))).argmin() == 0
    with pytest.raises(InvalidInput, match="times lie in"):
        timesteps.min_snr_weight()(process, 1.5)
