"""UWM's own laws: modes of a linear world are its conditional distributions; the published settings fit together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models, processes
from diffusion_jax.config import build, load
from diffusion_jax.denoisers import analytic, gaussian_mixture
from diffusion_jax.recipes.uwm import ROLES, latency, latent_tokens, prepared_arms
from diffusion_jax.sampling import sample
from diffusion_jax.solvers import ddim
from diffusion_jax.timesteps import linspace, roles

SMALL = {"width": 16, "depth": 1, "heads": 2}

FLOW = processes.rectified_flow()
PROCESS = processes.JointProcess({"action": FLOW, "future": FLOW})
SEEN = np.array([0.5, -0.8])
A, K = np.array([[0.9, 0.2], [-0.1, 0.8]]), np.array([[0.3, 0.1], [0.0, -0.4], [0.2, 0.2]])
SPREAD = np.array([[0.5, 0.2, 0.1], [0.2, 0.4, 0.1], [0.1, 0.1, 0.3]])
DONE = np.array([0.7, -0.2, 0.4])


def world(push):
    """a ~ N(K o, SPREAD) and o' = A o + push sum(a) + w: the joint distribution of (a, o') given o, by moments."""
    reach = np.outer(push, np.ones(3))
    mean = np.concatenate([K @ SEEN, A @ SEEN + reach @ K @ SEEN])
    across = reach @ SPREAD
    covariance = np.block([[SPREAD, across.T], [across, across @ reach.T + 0.2 * np.eye(2)]])
    return mean, covariance


def ran(mode, push, steps=60):
    """Mean and covariance of what the exact denoiser generates, from the run's action on a basis of the noise."""
    mean, covariance = world(push)
    mixture = gaussian_mixture({"action": mean[None, :3], "future": mean[None, 3:]}, covariances=covariance[None])
    basis = jnp.asarray(np.concatenate([np.zeros((1, 5)), np.eye(5)]), jnp.float32)
    after = A @ SEEN + push * DONE.sum()
    known = {"action": DONE, "future": after}
    noise = {"action": basis[:, :3], "future": basis[:, 3:]}
    x = {
        name: jnp.broadcast_to(jnp.asarray(known[name], jnp.float32), noise[name].shape)
        if role == "given"
        else noise[name]
        for name, role in ROLES[mode].items()
    }
    out = sample(jax.random.key(0), analytic(PROCESS), mixture, ddim(), roles(linspace(steps), ROLES[mode]), x_init=x).x
    moved = np.concatenate([out[name] for name, role in ROLES[mode].items() if role == "generate"], axis=1)
    kept = np.concatenate(
        [np.full(3, ROLES[mode]["action"] == "generate"), np.full(2, ROLES[mode]["future"] == "generate")]
    )
    given = np.concatenate([np.full(3, ROLES[mode]["action"] == "given"), np.full(2, ROLES[mode]["future"] == "given")])
    expected, within = mean[kept], covariance[np.ix_(kept, kept)]
    if given.any():
        gain = covariance[np.ix_(kept, given)] @ np.linalg.inv(covariance[np.ix_(given, given)])
        expected = expected + gain @ (np.concatenate([DONE, after])[given] - mean[given])
        within = within - gain @ covariance[np.ix_(given, kept)]
    return moved[0], (moved[1:] - moved[0]).T @ (moved[1:] - moved[0]), expected, within


@pytest.mark.parametrize("mode", ROLES)
def test_modes_of_a_linear_world_are_its_conditional_distributions(mode):
    mean, covariance, expected, within = ran(mode, np.array([0.5, -0.3]))
    np.testing.assert_allclose(mean, expected, atol=0.05)
    np.testing.assert_allclose(covariance, within, atol=0.05)


def test_actions_that_do_nothing_tell_nothing_about_the_future():
    still = np.zeros(2)
    forward, video = ran("forward", still), ran("video", still)
    np.testing.assert_allclose(forward[0], video[0], atol=1e-5)
    np.testing.assert_allclose(forward[1], video[1], atol=1e-5)
    np.testing.assert_allclose(ran("inverse", still)[0], ran("policy", still)[0], atol=1e-5)


def test_a_cloned_policy_drives_with_actions_alone():
    config = load("configs/recipes/uwm.py:smoke")
    cloned = load("configs/recipes/uwm.py").arms.cloned
    assert cloned.data.future == 0 and cloned.model.network.modalities == (2,)
    cloned.train.steps, cloned.data.episodes, cloned.data.image_size = 0, 12, 8
    cloned.model.network.update(SMALL)
    space = latent_tokens(config)
    config.arms = {"cloned": cloned}
    plan = roles(linspace(config.solver_steps), ROLES["policy"])
    arm = prepared_arms(config, space, plan)["cloned"]
    np.testing.assert_array_equal(arm.plan, plan["action"])
    frames = arm.experiment.example(3)["cond"]["frames"]
    assert latency(arm, frames) > 0
    shares = [float(arm.success(arm.params, arm.plan, jax.random.key(seed))) for seed in (0, 0)]
    assert shares[0] == shares[1] and 0 <= shares[0] <= 1


def test_the_published_settings_fit_together():
    """The published network has 130 million parameters, and at the start its loss is w_a + w_o, labelled or not."""
    arm = load("configs/recipes/uwm.py:paper").arms.cotrained
    shapes = {"action": (1, 16, 7), "future": (1, 2, 28, 28, 4)}
    network = build(arm.model)
    params = models.param_shapes(network, shapes, {"pooled": jax.ShapeDtypeStruct((1, 1024), jnp.float32)})
    assert models.count_params(params) == pytest.approx(130e6, rel=0.05)
    arm.model.update(SMALL)
    network, process = build(arm.model), build(arm.process)
    key = jax.random.key(0)
    x0 = {"action": jax.random.normal(key, (64, 16, 2)), "future": jax.random.normal(key, (64, 2, 8, 8, 4))}
    batch = {"x0": x0, "cond": {"pooled": jnp.ones((64, 8))}, "missing": {"action": jnp.arange(64) % 2 == 0}}
    params = network.init(key, x0, jnp.zeros(64), batch["cond"])
    objective = build(arm.objective, network=network, process=process)
    loss, aux = jax.jit(lambda batch: objective.loss(params, objective.init(key, params, batch), batch, key))(batch)
    assert float(loss.mean()) == pytest.approx(2.0, abs=0.06)
    t = np.asarray(aux.per_example["t"]["action"])
    assert (t[::2] == 1).all() and np.allclose(100 * t, np.round(100 * t), atol=1e-4) and len(set(t[1::2])) > 10
    sampling = arm.sampling
    assert len(build(sampling.grid, process=process)) == 11 and build(sampling.solver).order == 1
