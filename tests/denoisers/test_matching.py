"""A denoiser of another schedule, seen through equal log-SNRs, is the denoiser of the process itself."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, randomness, sampling, solvers, timesteps
from diffusion_jax.denoisers import analytic, gaussian_mixture, on_process
from diffusion_jax.errors import InvalidInput
from tests.denoisers.tiny import network, step_at

PROCESSES = {
    "vp epsilon": processes.vp_linear(),
    "vp v": processes.cosine("v"),
    "flow": processes.rectified_flow(),
    "edm": processes.edm(),
    "ve": processes.variance_exploding(),
}
MIXTURE = gaussian_mixture([[-1.0, 0.0, 0.4], [1.0, 0.5, 0.0], [0.2, -0.8, -0.5]], 0.4, labels=[0, 1, 2])
LABEL = {"label": jnp.array([0, 1, 2, 3])}
KEY = jax.random.key(0)


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.permutations(PROCESSES, 2)))
def test_the_exact_denoiser_of_any_schedule_is_that_of_any_other(ours, theirs):
    """At times per sample, noise and data at both ends included, where the other schedule reaches that noise."""
    process, other = PROCESSES[ours], PROCESSES[theirs]
    x0 = randomness.normal(KEY, (4, 3))

    @jax.jit
    def both(log_snr):
        t = jnp.clip(process.inverse_log_snr(log_snr), 0.0, 1.0)
        x, _ = process.corrupt(jax.random.key(1), x0, t)
        answers = (
            d.apply(MIXTURE, (), x, step_at(t), LABEL)[0] for d in (analytic(process), on_process(inner, process))
        )
        return x, t, *answers

    inner = analytic(other)
    for log_snr in ([-6.0, -3.0, 0.0, 2.0], [-1.0, 1.0, 4.0, 7.0]):
        x, t, expected, got = both(jnp.array(log_snr))
        np.testing.assert_allclose(got.x0, expected.x0, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.eps, expected.eps, rtol=1e-5, atol=1e-4 if log_snr[-1] > 3 else 1e-5)
        rebuilt = process.marginal(got.x0, got.eps, t)
        np.testing.assert_allclose(rebuilt, x, rtol=1e-5, atol=1e-5 * float(jnp.abs(x).max()))


@pytest.mark.parametrize(
    ("ours", "theirs"), [("vp epsilon", "flow"), ("flow", "vp epsilon"), ("flow", "edm"), ("edm", "vp v")]
)
def test_a_run_with_a_matched_denoiser_anywhere_in_it_is_the_run_of_one(ours, theirs):
    """From pure noise to data; random tables of two parameterisations and two schedules of the exact denoiser."""
    process = PROCESSES[ours]
    grid = timesteps.uniform_log_snr(process, 12, -7.0, 7.0)
    pair = analytic(process), on_process(analytic(PROCESSES[theirs]), process)

    @jax.jit
    def run(table):
        d = denoisers.switched(pair, table)
        return sampling.sample(KEY, d, (MIXTURE, MIXTURE), solvers.ddim(), grid, shape=(8, 3)).x

    plain = run(jnp.zeros(12, jnp.int32))
    for table in (jnp.ones(12, jnp.int32), jax.random.bernoulli(jax.random.key(3), shape=(12,)).astype(jnp.int32)):
        np.testing.assert_allclose(run(table), plain, rtol=1e-5, atol=1e-5)


def test_noise_that_the_other_never_saw_is_asked_at_its_noisiest():
    """At t = 1 a flow is pure noise, a VP model trained to a finite log-SNR is not: the pair holds all the same."""
    flow, vp = PROCESSES["flow"], PROCESSES["vp epsilon"]
    x = randomness.normal(KEY, (4, 3))
    prediction, _ = on_process(analytic(vp), flow).apply(MIXTURE, (), x, step_at(1.0), None)
    expected, _ = analytic(vp).apply(MIXTURE, (), x, step_at(1.0), None)
    np.testing.assert_allclose(prediction.x0, expected.x0, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(prediction.eps, x, rtol=1e-6)
    clean, _ = on_process(analytic(vp), flow).apply(MIXTURE, (), x, step_at(0.0), None)
    np.testing.assert_allclose(clean.x0, x, rtol=1e-5, atol=1e-5)
    assert bool(jnp.isfinite(clean.eps).all())


def test_a_network_keeps_its_time_and_equal_schedules_keep_every_bit():
    """Only the prediction differs: nothing is moved or scaled; else the network is fed its own t."""
    x, t = randomness.normal(KEY, (3, 4, 2)), 0.3
    params = network().init(KEY, x, None, None)
    inner = denoisers.denoiser(network(), processes.cosine("v", time="t"))
    expected, _ = inner.apply(params, (), x, step_at(t), None)
    same, _ = on_process(inner, processes.cosine("x0")).apply(params, (), x, step_at(t), None)
    np.testing.assert_array_equal(same.x0, expected.x0)
    moved = timesteps.matching_time(processes.cosine("v"), PROCESSES["edm"], t)
    seen = x / inner.process.alpha(t)
    got, _ = on_process(inner, PROCESSES["edm"]).apply(params, (), seen, step_at(moved), None)
    np.testing.assert_allclose(got.x0, expected.x0, rtol=1e-5, atol=1e-5)


def test_modalities_are_matched_one_by_one():
    """Each with a schedule and times of its own, times per token included."""
    ours = processes.JointProcess({"a": PROCESSES["flow"], "b": PROCESSES["edm"]})
    theirs = processes.JointProcess({"a": PROCESSES["vp v"], "b": PROCESSES["flow"]})
    mixture = gaussian_mixture(
        {"a": jnp.array([[[-1.0], [0.5]], [[1.0], [0.0]]]), "b": jnp.array([[0.3], [-0.6]])}, 0.5
    )
    x = {"a": randomness.normal(KEY, (2, 2, 1)), "b": 3.0 * randomness.normal(jax.random.key(1), (2, 1))}
    step = step_at({"a": [[0.2, 0.9], [0.5, 0.7]], "b": [0.01, 0.05]})
    got, _ = on_process(analytic(theirs), ours).apply(mixture, (), x, step, None)
    expected, _ = analytic(ours).apply(mixture, (), x, step, None)
    for name in x:
        np.testing.assert_allclose(got.x0[name], expected.x0[name], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.eps[name], expected.eps[name], rtol=1e-5, atol=1e-5)


def test_what_has_no_noise_to_match_is_refused():
    with pytest.raises(InvalidInput, match="Gaussian"):
        on_process(analytic(PROCESSES["flow"]), processes.absorbing(8))
    with pytest.raises(InvalidInput, match="modalities"):
        on_process(analytic(PROCESSES["flow"]), processes.JointProcess({"a": PROCESSES["flow"]}))
