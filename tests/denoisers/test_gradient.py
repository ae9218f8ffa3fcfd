"""Laws of guidance by gradients: exact posteriors of Gaussians, the known bias of DPS, and what is paid."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, randomness
from diffusion_jax.denoisers import classifier_guided, energy_guided
from diffusion_jax.errors import InvalidInput
from tests import shipped
from tests.denoisers.tiny import ask, step_at

PROCESS = processes.cosine()
DATA_STD, NOISE_STD = 1.5, 0.4
MIXTURE = denoisers.gaussian_mixture([[0.5, -0.3]], DATA_STD)
PLAIN = denoisers.analytic(PROCESS)
X = randomness.normal(jax.random.key(0), (4, 2))
Y = jnp.array([1.0, 2.0])
STEP = step_at(0.5)
ANSWER = ask(PLAIN, MIXTURE, X, STEP)


def posterior_answer(process, t):
    """The exact denoiser of x0 given y: for a Gaussian the data's mean and variance are just other ones."""
    precision = 1 / DATA_STD**2 + 1 / NOISE_STD**2
    mean = (MIXTURE.means[0] / DATA_STD**2 + Y / NOISE_STD**2) / precision
    known = denoisers.gaussian_mixture(mean[None], precision**-0.5)
    return ask(denoisers.analytic(process), known, X, step_at(t))


def remaining_variance(process, t):
    """Var[x0 | x_t] of the Gaussian data."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return DATA_STD**2 * sigma**2 / (alpha**2 * DATA_STD**2 + sigma**2)


def likelihood(variance):
    return lambda prediction, t, cond: jnp.sum((Y - prediction.x0) ** 2, axis=-1) / (2 * variance(t))


@pytest.mark.parametrize("process", [processes.cosine(), processes.rectified_flow()], ids=["vp", "flow"])
@pytest.mark.parametrize("t", [0.2, 0.7])
def test_the_energy_of_a_gaussian_likelihood_gives_the_exact_posterior(process, t):
    d = energy_guided(denoisers.analytic(process), likelihood(lambda t: NOISE_STD**2 + remaining_variance(process, t)))
    found, exact = ask(d, MIXTURE, X, step_at(t)), posterior_answer(process, t)
    np.testing.assert_allclose(found.x0, exact.x0, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found.eps, exact.eps, rtol=2e-5, atol=2e-5)


def test_dps_overshoots_by_the_variance_it_leaves_out():
    dps = ask(energy_guided(PLAIN, likelihood(lambda t: NOISE_STD**2)), MIXTURE, X, STEP)
    exact = posterior_answer(PROCESS, 0.5)
    ratio = (dps.x0 - ANSWER.x0) / (exact.x0 - ANSWER.x0)
    np.testing.assert_allclose(ratio, 1 + remaining_variance(PROCESS, 0.5) / NOISE_STD**2, rtol=1e-4)


def test_a_classifier_that_is_exact_turns_the_unconditional_score_into_the_conditional_one():
    mixture = denoisers.gaussian_mixture([[-1.0, 0.0], [1.0, 0.5]], 0.6, labels=[0, 1])
    label = jnp.array([0, 1, 1, 0])

    def log_prob(params, x, t, cond):
        given = denoisers.posterior(params, PROCESS, x, t, label).log_density
        return given - denoisers.log_density(params, PROCESS, x, t)

    params = {"main": mixture, "guide": mixture}
    found = ask(classifier_guided(PLAIN, log_prob), params, X, STEP)
    conditional = ask(PLAIN, mixture, X, STEP, {"label": label})
    np.testing.assert_allclose(found.x0, conditional.x0, rtol=1e-4, atol=1e-5)
    doubled = ask(classifier_guided(PLAIN, log_prob, denoisers.sample_scale([0.0, 1.0, 2.0, 2.0])), params, X, STEP)
    plain = ask(PLAIN, mixture, X, STEP)
    weights = jnp.array([0.0, 1.0, 2.0, 2.0])[:, None]
    np.testing.assert_allclose(doubled.eps, plain.eps + weights * (conditional.eps - plain.eps), rtol=1e-4, atol=1e-5)


def test_without_the_network_the_answer_itself_descends():
    target = jnp.zeros(2)
    d = energy_guided(PLAIN, lambda p, t, c: 0.5 * jnp.sum((p.x0 - target) ** 2, -1), 0.25, through=False)
    found = ask(d, MIXTURE, X, STEP)
    np.testing.assert_allclose(found.x0, 0.75 * ANSWER.x0, rtol=1e-5)
    assert (float(found.cost.evaluations), float(found.cost.compute)) == (1.0, 1.0)


def test_energies_may_look_at_the_extras():
    d = energy_guided(PLAIN, lambda p, t, c: -p.extras["log_density"], 1.0)
    found = ask(d, MIXTURE, X, STEP)
    np.testing.assert_allclose(found.eps, 2 * ANSWER.eps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, jnp.zeros(4), denoisers.interval_scale(2.0, 0.8, 1.0, outside=0.0)])
@pytest.mark.parametrize("through", [True, False])
def test_scale_zero_takes_no_gradient_and_changes_nothing(scale, through):
    found = ask(energy_guided(PLAIN, likelihood(lambda t: 1.0), scale, through=through), MIXTURE, X, STEP)
    chex.assert_trees_all_equal(found, ANSWER)


def test_the_backward_pass_is_counted():
    found = ask(energy_guided(PLAIN, likelihood(lambda t: 1.0), jnp.ones(4)), MIXTURE, X, STEP)
    assert (float(found.cost.evaluations), float(found.cost.compute)) == (1.0, 3.0)


def test_joint_data_is_steered_in_every_modality_at_its_own_time():
    joint = processes.JointProcess({"a": PROCESS, "b": processes.rectified_flow()})
    mixture = denoisers.gaussian_mixture({"a": [[0.5, -0.3]], "b": [[0.0, 1.0]]}, {"a": DATA_STD, "b": 1.0})
    x, step = {"a": X, "b": 0.5 * X}, step_at({"a": 0.5, "b": 0.2})

    def energy(prediction, t, cond):
        variance = NOISE_STD**2 + remaining_variance(PROCESS, t["a"])
        return jnp.sum((Y - prediction.x0["a"]) ** 2, -1) / (2 * variance)

    @shipped.jit
    def answers(mixture, x):
        plain = denoisers.analytic(joint)
        return tuple(
            d.apply(mixture, d.init(mixture, x, None), x, step, None)[0] for d in (energy_guided(plain, energy), plain)
        )

    found, untouched = answers(mixture, x)
    np.testing.assert_allclose(found.x0["a"], posterior_answer(PROCESS, 0.5).x0, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(found.x0["b"], untouched.x0["b"])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: energy_guided(PLAIN, 3.0), "energy is 3.0"),
        (lambda: energy_guided(PLAIN, lambda p, t, c: 0.0, "1"), "scale is '1'"),
        (
            lambda: energy_guided(PLAIN._replace(process=processes.uniform(5)), lambda p, t, c: 0.0),
            "Uniform is discrete",
        ),
        (lambda: classifier_guided(PLAIN, lambda *a: 0.0, compute=-1.0), "compute is -1.0"),
        (lambda: ask(classifier_guided(PLAIN, lambda *a: 0.0), MIXTURE, X, STEP), "params={'main'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(make, says):
    with pytest.raises(InvalidInput, match=says):
        make()
