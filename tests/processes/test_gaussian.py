"""Laws of Gaussian processes: conversions round-trip, corrupt has its moments, times of any prefix shape agree."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes
from diffusion_jax.errors import InvalidInput
from diffusion_jax.processes import NETWORK_TIMES, PARAMETERIZATIONS, GaussianProcess, Linear
from diffusion_jax.typing import Prediction

PROCESSES = {
    "vp_linear": processes.vp_linear(),
    "vp_scaled_linear": processes.vp_scaled_linear(50),
    "vp_zero_terminal": processes.vp_cosine(100, zero_terminal_snr=True),
    "vp_continuous": processes.vp_continuous(),
    "cosine": processes.cosine(log_snr_shift=-1.0),
    "gvp": processes.gvp(),
    "ve": processes.variance_exploding(),
    "edm": processes.edm(),
    "flow": processes.rectified_flow(),
    "flow_shifted": processes.rectified_flow(shift=3),
}
TIMES = np.array([0.0, 1e-3, 0.02, 0.3, 0.5, 0.9, 0.999, 1.0], np.float32)


def pair(shape, seed=0):
    return np.random.default_rng(seed).standard_normal((2, *shape), np.float32)


X0, NOISE = pair((len(TIMES), 64))


def named_predictions(process):
    return {name: dataclasses.replace(process, prediction=name) for name in PARAMETERIZATIONS}


@functools.cache
def conversions(name):
    """What the laws below compare, computed by one program a process: alpha and sigma, x_t, and for each prediction the
    target, the pair found from it, the pair found from that one's output, and what a pair gives by the method."""

    @jax.jit
    def program(x0, noise, t):
        x_t = PROCESSES[name].marginal(x0, noise, t)
        out = {}
        for prediction, process in named_predictions(PROCESSES[name]).items():
            target = process.target(x0, noise, t)
            found = process.predict(target, x_t, t)
            again = process.predict(process.output(found, t), process.marginal(found.x0, found.eps, t), t)
            method = getattr(PROCESSES[name], prediction, None)
            out[prediction] = target, found, again, method(Prediction(x0, noise), t) if method else None
        return PROCESSES[name].alpha(t), PROCESSES[name].sigma(t), x_t, out

    return jax.device_get(program(X0, NOISE, TIMES))


@pytest.mark.parametrize("prediction", PARAMETERIZATIONS)
@pytest.mark.parametrize("name", PROCESSES)
def test_prediction_of_the_target_is_the_pair(name, prediction):
    """Output -> pair -> output at every t, ends included, to round-off; and the pair is consistent with x_t."""
    alpha, sigma, x_t, out = conversions(name)
    _, found, again, _ = out[prediction]
    alpha, sigma = alpha[:, None], sigma[:, None]
    size = alpha + sigma
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found, again)))
    # Both halves are exact in the units of x_t, in which each is known: alpha x0 and sigma eps.
    np.testing.assert_allclose(alpha * found.x0 / size, alpha * X0 / size, atol=3e-6)
    np.testing.assert_allclose(sigma * found.eps / size, sigma * NOISE / size, atol=3e-6)
    np.testing.assert_allclose((alpha * found.x0 + sigma * found.eps) / size, x_t / size, atol=3e-6)
    np.testing.assert_allclose(again.x0 * alpha / size, found.x0 * alpha / size, atol=3e-6)
    np.testing.assert_allclose(again.eps * sigma / size, found.eps * sigma / size, atol=3e-6)


@pytest.mark.parametrize("prediction", ["v", "velocity", "edm"])
@pytest.mark.parametrize("name", PROCESSES)
def test_well_posed_predictions_know_both_halves_wherever_they_can(name, prediction):
    _, sigma, _, out = conversions(name)
    found = out[prediction][1]
    inner = slice(1, -1) if prediction == "velocity" else slice(None)  # some rates are infinite at the ends
    scale = 1.0 + sigma[:, None] if name in ("ve", "edm") else 1.0
    np.testing.assert_allclose((found.x0 / scale)[inner], (X0 / scale)[inner], atol=5e-6)
    np.testing.assert_allclose(found.eps[inner], NOISE[inner], atol=5e-6)


@pytest.mark.parametrize("name", PROCESSES)
def test_derived_quantities_are_the_targets_of_their_parameterisations(name):
    """score, velocity and v of a pair equal what networks of those kinds are regressed to."""
    for kind in ("score", "velocity", "v"):
        target, _, _, derived = conversions(name)[-1][kind]
        np.testing.assert_allclose(derived, target, rtol=1e-6, atol=1e-6)


def test_flow_velocity_is_noise_minus_data():
    x0, noise = pair((5, 3))
    target = processes.rectified_flow().target(x0, noise, np.linspace(0.0, 1.0, 5, dtype=np.float32))
    np.testing.assert_allclose(target, noise - x0, atol=1e-6)


def test_edm_is_the_preconditioning_of_the_paper():
    """D(x) = c_skip x + c_out F(c_in x), with unit variance of the network's input and target."""
    process = processes.edm(sigma_data=0.5)
    t = np.array([1e-4, 0.01, 0.5, 1.0], np.float32)
    sigma, data = 80 * t[:, None], 0.5
    x_t, output = pair((4, 8))
    total = sigma**2 + data**2
    x0 = data**2 / total * x_t + sigma * data / np.sqrt(total) * output
    np.testing.assert_allclose(process.predict(output, x_t, t).x0, x0, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(process.network_input(x_t, t), x_t / np.sqrt(total), rtol=1e-6)
    np.testing.assert_allclose(process.network_time(t), np.log(sigma[:, 0]) / 4, rtol=1e-5)
    clean, noise = pair((4, 100_000), 1)
    target = process.target(data * clean, noise, t)
    fed = process.network_input(process.marginal(data * clean, noise, t), t)
    np.testing.assert_allclose(np.std(target, axis=1), 1.0, atol=0.01)
    np.testing.assert_allclose(np.std(fed, axis=1), 1.0, atol=0.01)


@pytest.mark.parametrize("name", PROCESSES)
def test_corrupt_has_its_moments(name):
    process, t = PROCESSES[name], np.array([0.0, 0.4, 1.0], np.float32)
    x0 = np.full((3, 40_000), 0.7, np.float32)

    @jax.jit
    def drawn(x0, t):
        x_t, _ = process.corrupt(jax.random.key(1), x0, t)
        return x_t, process.prior(jax.random.key(2), (1, 40_000)), process.alpha(t), process.sigma(t)

    x_t, prior, alpha, sigma = jax.device_get(drawn(x0, t))
    np.testing.assert_allclose(np.mean(x_t, axis=1), 0.7 * alpha, atol=5 * sigma.max() / 200)
    np.testing.assert_allclose(np.std(x_t, axis=1), sigma, rtol=0.02, atol=1e-6)
    np.testing.assert_array_equal(x_t[0], x0[0])
    np.testing.assert_allclose(np.std(prior), sigma[-1], rtol=0.02)


@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow_shifted", "gvp"])
def test_a_time_of_any_prefix_shape_is_the_loop_over_its_entries(name):
    process = PROCESSES[name]
    x0, noise = pair((2, 3, 4, 5))
    rng = np.random.default_rng(3)
    times = [rng.uniform(size=prefix).astype(np.float32) for prefix in ((), (2,), (2, 3), (2, 3, 4))]

    def everything(x0, noise, t):
        x_t = process.marginal(x0, noise, t)
        target = process.target(x0, noise, t)
        found = process.predict(target, x_t, t)
        return x_t, target, found.x0, found.eps, process.network_input(x_t, t)

    def entry_by_entry(x0, noise, t):
        """Each entry of t by itself: it is a scalar then."""
        loop = everything
        for _ in range(t.ndim):
            loop = jax.vmap(loop)
        return loop(x0, noise, t)

    @jax.jit
    def both(x0, noise, times):
        return [(everything(x0, noise, t), entry_by_entry(x0, noise, t)) for t in times]

    for whole, parts in both(x0, noise, times):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, parts)


@pytest.mark.parametrize("name", PROCESSES)
def test_equal_entries_of_a_vector_time_are_the_scalar_bit_for_bit(name):
    """Operation by operation; compiled, to round-off.

    In the XLA of jax 0.12 the two programs round a product and a sum once (FMA) at other places, as only one of their
    loops is vectorised: 1e-7 of the largest entry, 7e-6 where x0 is a difference of large terms (at t = 1).
    """
    process = PROCESSES[name]
    x0, noise = pair((3, 4, 5))

    def everything(x0, noise, t):
        x_t = process.marginal(x0, noise, t)
        return x_t, process.predict(process.target(x0, noise, t), x_t, t), process.network_input(x_t, t)

    def near(scalar, vector):
        np.testing.assert_allclose(vector, scalar, rtol=0, atol=2e-5 * np.abs(scalar).max())

    compiled = jax.jit(everything)
    for t in (0.0, 0.37, 1.0):
        scalar, vector = jnp.float32(t), jnp.full((3, 4), t, jnp.float32)
        with jax.disable_jit():
            chex.assert_trees_all_equal(everything(x0, noise, scalar), everything(x0, noise, vector))
        jax.tree.map(near, compiled(x0, noise, scalar), compiled(x0, noise, vector))


def test_pinned_clean_entries_give_finite_gradients():
    """t = 0 beside noisy times: nothing is NaN, forwards or backwards, for any prediction and network time."""
    t = np.array([0.0, 0.5, 1.0], np.float32)
    for name, base in PROCESSES.items():
        fed = {
            time: dataclasses.replace(base, time=time)
            for time in NETWORK_TIMES
            if not time.endswith("index") or hasattr(base.schedule, "position")
        }

        def losses(outputs, t, base=base):
            """One for each prediction, of an output of its own."""
            total = 0.0
            for prediction, process in named_predictions(base).items():
                output = outputs[prediction]
                found = process.predict(output, output, t)
                rest = process.score(found, t), process.from_x0(found.x0, output, t), process.network_input(output, t)
                total += sum(jnp.sum(leaf) for leaf in jax.tree.leaves((found.x0, found.eps, rest)))
            return total

        @jax.jit
        def program(outputs, t, losses=losses, fed=fed):
            return jax.grad(losses)(outputs, t), {time: process.network_time(t) for time, process in fed.items()}

        found = program({prediction: np.ones((3, 2), np.float32) for prediction in PARAMETERIZATIONS}, t)
        for values in found:
            for key, value in values.items():
                assert np.isfinite(value).all(), (name, key)


def test_the_network_of_a_discrete_process_is_fed_exact_indices():
    process = processes.vp_linear(1000)
    t = (jnp.arange(1000) + 1) / 1000
    np.testing.assert_array_equal(process.network_time(t), np.arange(1000))


def test_from_one_half_agrees_with_predict():
    process = processes.cosine()
    x0, noise = pair((3, 4))
    t = jnp.array([0.2, 0.5, 0.8])
    x_t = process.marginal(x0, noise, t)
    np.testing.assert_allclose(process.from_x0(x0, x_t, t).eps, noise, atol=1e-5)
    np.testing.assert_allclose(process.from_eps(noise, x_t, t).x0, x0, atol=1e-5)


def test_low_precision_output_gives_a_single_precision_pair():
    process = processes.rectified_flow()
    x = jnp.ones((2, 3), jnp.bfloat16)
    found = process.predict(x, x.astype(jnp.float32), jnp.array([0.1, 0.9]))
    assert found.x0.dtype == found.eps.dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: processes.rectified_flow(prediction="velocty"), "did you mean 'velocity'"),
        (lambda: processes.rectified_flow(shift=0), "shift is"),
        (lambda: processes.edm(time="index"), "discrete steps"),
        (lambda: processes.edm(sigma_data=-1), "sigma_data"),
        (lambda: processes.vp_linear(zero_terminal_snr=True, prediction="epsilon"), "zero terminal SNR"),
        (lambda: GaussianProcess(lambda t: t), "must have the method alpha"),
        (lambda: GaussianProcess(Linear(), time="seconds"), "time is"),
        (lambda: processes.edm().corrupt(jax.random.key(0), jnp.ones((2, 3), jnp.uint8), 0.5), "floating-point"),
        (lambda: processes.edm().marginal(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((3,))), "prefix"),
    ],
)
def test_wrong_values_are_named(make, words):
    with pytest.raises(InvalidInput, match=words):
        make()
