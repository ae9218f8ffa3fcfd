"""The exact denoiser against what defines it: the density's gradient, brute-force posteriors, and diagonal = full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes
from diffusion_jax.denoisers.analytic import (
    analytic,
    analytic_stages,
    gaussian_mixture,
    log_density,
    posterior,
    sample_mixture,
    score,
)
from diffusion_jax.errors import InvalidInput
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Step

MEANS, STDS = np.array([[0.0, 1.0, 2.0], [1.0, -1.0, 0.0]]), np.array([0.3, 0.5])
X = jax.random.normal(jax.random.key(0), (4, 3))
TIMES = {
    "clean": jnp.array(0.0),
    "scalar": jnp.array(0.3),
    "prior": jnp.array(1.0),
    "per sample": jnp.array([0.0, 0.2, 0.7, 1.0]),
    "per coordinate": jnp.broadcast_to(jnp.array([0.0, 0.5, 1.0]), (4, 3)),
}
PROCESSES = {"vp": processes.vp_cosine(), "flow": processes.rectified_flow(), "edm": processes.edm(sigma_max=5.0)}


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("name", PROCESSES)
def test_pair_score_and_full_covariances(name, time):
    process, t = PROCESSES[name], TIMES[time]
    diagonal = gaussian_mixture(MEANS, STDS, [0.3, 0.7])
    full = gaussian_mixture(MEANS, weights=[0.3, 0.7], covariances=STDS[:, None, None] ** 2 * np.eye(3))
    found, other = posterior(diagonal, process, X, t), posterior(full, process, X, t)
    for one, two in zip(found, other):
        np.testing.assert_allclose(one, two, rtol=2e-4, atol=2e-5)
    alpha, sigma = expand(process.alpha(t), X), expand(process.sigma(t), X)
    np.testing.assert_allclose(alpha * found.x0 + sigma * found.eps, X, atol=1e-5)
    np.testing.assert_allclose(-sigma * score(diagonal, process, X, t), found.eps, rtol=1e-4, atol=1e-5)


def test_posterior_mean_by_importance_sampling():
    """E[x0 | x_t] from 200 000 draws of x0 weighted by the likelihood of x_t, per-coordinate times included."""
    process, mixture = PROCESSES["vp"], gaussian_mixture(MEANS, STDS)
    t = jnp.array([[0.5, 0.7, 0.9]])
    x0, _ = sample_mixture(jax.random.key(1), mixture, 200_000)
    residual = (X[:1] - process.alpha(t) * x0) / process.sigma(t)
    weights = jax.nn.softmax(-0.5 * (residual**2).sum(-1))
    np.testing.assert_allclose(weights @ x0, posterior(mixture, process, X[:1], t).x0[0], atol=0.02)


def test_density_integrates_to_one():
    process, mixture = PROCESSES["flow"], gaussian_mixture([[0.0], [2.0]], 0.5)
    x = jnp.linspace(-8, 8, 4001)[:, None]
    mass = jnp.exp(log_density(mixture, process, x, 0.4)).sum() * (x[1, 0] - x[0, 0])
    np.testing.assert_allclose(mass, 1.0, atol=1e-4)


def test_point_masses_are_data():
    """With zero covariance a point at t = 0 is itself, and at alpha = 0 the posterior mean is that of the data."""
    process, mixture = PROCESSES["flow"], gaussian_mixture(MEANS, 0.0)
    near = posterior(mixture, process, jnp.asarray(MEANS, jnp.float32), 0.0)
    np.testing.assert_allclose(near.x0, MEANS, atol=1e-6)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in near)
    far = posterior(mixture, process, X, 1.0)
    np.testing.assert_allclose(far.x0, np.broadcast_to(MEANS.mean(0), (4, 3)), atol=1e-6)


def test_labels_choose_components_and_others_choose_all():
    process, mixture = PROCESSES["vp"], gaussian_mixture(MEANS, STDS, [0.3, 0.7], labels=[0, 1])
    step, denoiser = Step(0, 0.5, 0.4, 1), analytic(process)
    plain = denoiser.apply(mixture, (), X, step, None)[0]
    chosen = denoiser.apply(mixture, (), X, step, {"label": jnp.array([0, 1, 2, 1])})[0]
    np.testing.assert_array_equal(chosen.x0[2], plain.x0[2])
    for row, label in ((0, 0), (1, 1)):
        single = gaussian_mixture(MEANS[label : label + 1], STDS[label])
        alone = denoiser.apply(single, (), X, step, None)[0]
        np.testing.assert_allclose(chosen.x0[row], alone.x0[row], atol=1e-6)
        np.testing.assert_allclose(chosen.extras["log_density"][row], alone.extras["log_density"][row], rtol=1e-5)


def test_joint_modalities_share_the_component():
    """Seeing one modality clean tells which component the other comes from."""
    process = processes.JointProcess({"a": PROCESSES["flow"], "b": PROCESSES["vp"]})
    mixture = gaussian_mixture({"a": [[-3.0], [3.0]], "b": [[-1.0, 0.0], [1.0, 0.0]]}, 0.1)
    x = {"a": jnp.array([[3.0], [-3.0]]), "b": jnp.zeros((2, 2))}
    found = posterior(mixture, process, x, {"a": jnp.array(0.0), "b": jnp.array(1.0)})
    np.testing.assert_allclose(found.x0["b"], [[1.0, 0.0], [-1.0, 0.0]], atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_mixture(MEANS, -1.0), "must not be negative"),
        (lambda: gaussian_mixture(MEANS, weights=[1.0]), "one per component"),
        (lambda: gaussian_mixture(MEANS, np.ones(5)), "stds.shape"),
        (lambda: gaussian_mixture(MEANS, covariances=np.eye(3)), "covariances.shape"),
        (lambda: gaussian_mixture(MEANS, labels=[1]), "labels.shape"),
        (lambda: analytic(processes.absorbing(3)), "needs a Gaussian process"),
    ],
)
def test_wrong_values_are_told_in_one_sentence(call, message):
    with pytest.raises(InvalidInput, match=message):
        call()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_stages_are_the_exact_denoiser_and_their_head_says_the_component(prediction):
    process = processes.vp_linear(prediction=prediction, time="t")
    stages, t = analytic_stages(process), jnp.array([0.0, 0.2, 0.7, 1.0])
    mixtures = [
        gaussian_mixture(MEANS, STDS, [0.3, 0.7]),
        gaussian_mixture(MEANS, covariances=STDS[:, None, None] * np.eye(3)),
    ]

    @jax.jit
    def both(mixture):
        h = stages.head(mixture, X, t)
        output = stages.tail(mixture, stages.body(mixture, h, X, t), X, t)[0]
        exact = posterior(mixture, process, X, t)
        return h, process.predict(output, X, t), exact

    for mixture in mixtures:
        h, pair, exact = both(mixture)
        np.testing.assert_allclose(jax.nn.softmax(h, axis=1), exact.responsibilities, atol=1e-5)
        np.testing.assert_allclose(h.mean(axis=1), 0.0, atol=1e-4)
        np.testing.assert_allclose(pair.eps[1:], exact.eps[1:], atol=1e-4)
        np.testing.assert_allclose(pair.x0[:3], exact.x0[:3], atol=1e-4)


def test_stages_need_the_time_itself():
    for process in (processes.vp_linear(), processes.edm(), processes.absorbing(5)):
        with pytest.raises(InvalidInput, match="time='t'"):
            analytic_stages(process)
