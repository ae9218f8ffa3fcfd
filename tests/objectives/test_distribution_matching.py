"""Distribution matching: no gradient where the scores agree, the teacher's distribution as the fixed point."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import objectives, processes, training
from diffusion_jax.denoisers import analytic, denoiser, gaussian_mixture
from diffusion_jax.errors import InvalidInput
from diffusion_jax.randomness import normal
from diffusion_jax.time_axes import expand
from diffusion_jax.typing import Denoiser, Frozen, Network, Prediction
from tests import shipped

FLOW = processes.rectified_flow(time="t")
KEY = jax.random.key(5)
SIZE = 64
"""Independent coordinates of an example, all of one Gaussian: the mean in the normaliser is then nearly a number."""


def gaussian_network():
    """The velocity of rectified flow when x0 is N(mean, exp(log_std)^2): a network with two parameters."""

    def apply(params, x, t, cond, train=False, key=None):
        t = expand(t, x)
        mean, variance = params["mean"], jnp.exp(2 * params["log_std"])
        residual = (x - (1 - t) * mean) / ((1 - t) ** 2 * variance + t**2)
        return t * residual - (mean + (1 - t) * variance * residual), {}

    return Network(lambda *_: params(0.0, 1.0), apply)


def params(mean, std):
    return {"mean": jnp.float32(mean), "log_std": jnp.log(jnp.float32(std))}


def affine(student, batch, key):
    keys = jax.random.split(key, batch["index"].shape[0])
    return student["mean"] + jnp.exp(student["log_std"]) * normal(keys, batch["x0"].shape)


def batch(size=32):
    return {"x0": jnp.zeros((size, SIZE)), "index": jnp.arange(size)}


def gradient(objective, learned):
    state = objective.init(KEY, learned, batch())
    return shipped.jit(jax.grad(lambda p: objective.loss(p, state, batch(), KEY)[0].mean()))(learned)


def test_equal_scores_do_not_move_the_student():
    network = gaussian_network()
    real = params(0.7, 0.4)
    objective = objectives.distribution_matching(affine, denoiser(network, FLOW), real, network, every=1)
    grads = gradient(objective, {"student": params(-0.5, 2.0), "fake": real})
    np.testing.assert_array_equal(jax.tree.leaves(grads["student"]), 0.0)
    assert all(abs(leaf) > 1e-3 for leaf in jax.tree.leaves(grads["fake"]))
    # Where they differ, samples move towards the data.
    grads = gradient(objective, {"student": params(-0.5, 2.0), "fake": params(-0.5, 2.0)})
    assert grads["student"]["mean"] < 0 < grads["student"]["log_std"]


def test_the_losses_are_disjoint_and_the_student_has_its_turns():
    network = gaussian_network()
    objective = objectives.distribution_matching(affine, denoiser(network, FLOW), params(0.7, 0.4), network, every=3)
    learned = {"student": params(0.0, 1.0), "fake": params(0.2, 0.8)}
    state = objective.init(KEY, learned, batch())

    @jax.jit
    @jax.grad
    def differentiated(learned, state):
        return objective.loss(learned, state, batch(), KEY)[0].mean()

    loss = jax.jit(objective.loss)
    for step in range(4):
        grads = differentiated(learned, state)
        _, aux = loss(learned, state, batch(), KEY)
        assert (aux.metrics["distance"] > 0) == (step % 3 == 0)
        assert bool(grads["student"]["mean"] != 0) == (step % 3 == 0)
        assert grads["fake"]["mean"] != 0
        # The fake's loss is that of denoising the samples: the teacher is not in it.
        other = state._replace(teacher=Frozen(params(-3.0, 1.0)))
        np.testing.assert_array_equal(differentiated(learned, other)["fake"]["mean"], grads["fake"]["mean"])
        state = aux.state


def test_the_fixed_point_of_an_affine_generator_is_the_teachers_gaussian():
    network = gaussian_network()
    real = gaussian_mixture(jnp.full((1, SIZE), 0.7), 0.4)
    objective = objectives.distribution_matching(affine, analytic(FLOW), real, network, every=5)
    rate = training.optimizers.cosine(0.1, total_steps=240)
    optimizer = training.optimizers.alternating(
        {"student": training.optimizers.adamw(rate), "fake": training.optimizers.adamw(0.05)}, {"student": 5}
    )
    state = training.train(
        objective,
        optimizer,
        ({"x0": np.zeros((32, SIZE), np.float32), "index": np.arange(32) + 32 * i} for i in itertools.count()),
        init_params=lambda key: {"student": params(-0.5, 1.5), "fake": params(-0.5, 1.5)},
        steps=1200,
        progress=False,
    )
    for part in ("student", "fake"):
        np.testing.assert_allclose(state.params[part]["mean"], 0.7, atol=0.03)
        np.testing.assert_allclose(jnp.exp(state.params[part]["log_std"]), 0.4, atol=0.03)


def test_a_student_sees_noise_in_its_first_step_and_noised_data_in_the_others():
    def told(params, carry, x, step, cond):
        return Prediction((x, step.t), None), carry

    grid = jnp.array([0.7, 0.25, 0.12, 0.05, 0.0])
    data = {"x0": 100.0 * jnp.ones((4, SIZE)), "index": jnp.arange(4)}
    generate = objectives.few_step_answers(Denoiser(lambda *_: (), told, FLOW), grid, first=0.5)
    x, t = jax.jit(jax.vmap(lambda key: generate({}, data, key)))(jax.random.split(KEY, 24))
    levels = dict(zip(np.round(grid, 3).tolist(), (1 - np.asarray(grid)).tolist()))
    times = np.round(t, 3).tolist()
    assert {round(one, 3) for one in times} == {0.7, 0.25, 0.12, 0.05}
    assert 0.3 < np.mean(np.asarray(times) > 0.6) < 0.7
    for one, time in zip(np.asarray(x), times):
        # The data are so large that their share of x says at which level they stand.
        np.testing.assert_allclose(one.mean() / 100, 0.0 if time > 0.6 else levels[time], atol=0.02)
    alone, t = objectives.few_step_answers(Denoiser(lambda *_: (), told, FLOW), [0.7, 0.0])({}, data, KEY)
    assert np.abs(alone).max() < 10 and np.isclose(t, 0.7), "a student of one step sees noise alone"


def test_every_answer_of_a_student_moves_it():
    network = gaussian_network()
    generate = objectives.few_step_answers(denoiser(network, FLOW), [0.9, 0.5, 0.0])
    gradients = jax.jit(jax.vmap(jax.grad(lambda p, key: generate(p, batch(), key).mean()), in_axes=(None, 0)))
    found = gradients(params(0.3, 0.8), jax.random.split(KEY, 6))
    assert (np.abs(found["mean"]) > 1e-3).all() and (np.abs(found["log_std"]) > 1e-6).all()


def test_wrong_input_is_told():
    network = gaussian_network()
    with pytest.raises(InvalidInput, match="between 0 and 1"):
        objectives.few_step_answers(denoiser(network, FLOW), [1.0, 0.5, 0.0], 1.0)
    with pytest.raises(InvalidInput, match="every"):
        objectives.distribution_matching(affine, denoiser(network, FLOW), {}, network, every=0)
    objective = objectives.distribution_matching(affine, denoiser(network, FLOW), {}, network)
    with pytest.raises(InvalidInput, match="student"):
        objective.init(KEY, {"fake": params(0.0, 1.0)}, batch())
