"""Modes of a linear world are its conditional distributions; what the study measures; the published settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models, processes
from diffusion_jax.config import build, load
from diffusion_jax.denoisers import analytic, gaussian_mixture
from diffusion_jax.experiment import prepare
from diffusion_jax.recipes import uwm
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.recipes.uwm import MODES
from diffusion_jax.sampling import sample
from diffusion_jax.solvers import ddim
from diffusion_jax.stages import Stage, stage_key
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
        for name, role in MODES[mode].items()
    }
    out = sample(jax.random.key(0), analytic(PROCESS), mixture, ddim(), roles(linspace(steps), MODES[mode]), x_init=x).x
    moved = np.concatenate([out[name] for name, role in MODES[mode].items() if role == "generate"], axis=1)
    kept = np.concatenate(
        [np.full(3, MODES[mode]["action"] == "generate"), np.full(2, MODES[mode]["future"] == "generate")]
    )
    given = np.concatenate([np.full(3, MODES[mode]["action"] == "given"), np.full(2, MODES[mode]["future"] == "given")])
    expected, within = mean[kept], covariance[np.ix_(kept, kept)]
    if given.any():
        gain = covariance[np.ix_(kept, given)] @ np.linalg.inv(covariance[np.ix_(given, given)])
        expected = expected + gain @ (np.concatenate([DONE, after])[given] - mean[given])
        within = within - gain @ covariance[np.ix_(given, kept)]
    return moved[0], (moved[1:] - moved[0]).T @ (moved[1:] - moved[0]), expected, within


@pytest.mark.parametrize("mode", MODES)
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


def test_a_policy_drives_with_actions_alone_and_with_both_modalities():
    """The smoke run has one arm; here neither is trained."""
    config = load("configs/recipes/uwm.py:smoke")
    cloned, joint = load("configs/recipes/uwm.py").arms.cloned, config.arms.cotrained
    cloned.data.update({"episodes": 12, "image_size": 8})
    cloned.model.network.update(SMALL)
    for entry in (cloned, joint):
        entry.train.steps = 0
        experiment = prepare(entry)
        params = jax.jit(experiment.init_params)(jax.random.key(0))
        stage = Stage("", "", params, experiment, 0.0, False)
        program = uwm.driven(uwm.policy_of(stage, config), config)
        shares = [float(program(params, jax.random.key(seed))) for seed in (0, 0)]
        assert shares[0] == shares[1] and 0 <= shares[0] <= 1


def test_every_arm_depends_on_the_pictures_of_the_space_that_it_works_in():
    config = load("configs/recipes/uwm.py")
    before = {name: stage_key(entry) for name, entry in config.arms.items()}
    for entry in config.arms.values():
        if "world" in entry.data:
            entry.data.world.episodes += 1
    changed = {name for name, entry in config.arms.items() if stage_key(entry) != before[name]}
    assert changed == {"cotrained", "labelled", "shared"}
    assert config.arms.labelled.data.world == config.arms.cotrained.data.world


def test_mistakes_are_of_what_is_shown():
    """A world that is read exactly: the frames themselves as latents."""
    state = jax.vmap(lambda key: uwm.tabletop.reset(uwm.WORLD, key))(jax.random.split(jax.random.key(0), 8))
    still, moved = np.zeros((8, 10, 2), np.float32), np.full((8, 10, 2), 0.3, np.float32)
    after = {name: uwm.led_to(state, actions) for name, actions in (("still", still), ("moved", moved))}
    frames = {name: np.asarray(uwm.tabletop.render(there, 24, block=False))[:, None] for name, there in after.items()}
    windows = uwm.Windows(None, state, {"action": moved}, frames["moved"][:, 0], after["moved"].disc)
    space = models.LatentSpace(lambda x: x, lambda z: z)
    answers = {mode: {"action": moved, "future": frames["moved"]} for mode in MODES}
    answers["policy"] = {"action": still, "future": frames["still"]}
    found = uwm.mistakes(answers, windows, space)
    assert found["policy"] == pytest.approx(0.3) and found["inverse"] == 0
    # 10 steps of 0.3 * 0.06 along both axes, in pixels of 2 / 24.
    assert max(found[mode] for mode in ("video", "forward", "jointly")) < 0.2
    assert found["apart"] == pytest.approx(10 * 0.3 * 0.06 * np.sqrt(2) * 12, abs=0.3)


def test_the_published_settings_fit_together(capsys):
    """The published network has 130 million parameters, and at the start its loss is w_a + w_o, labelled or not."""
    main(["uwm:paper"])
    millions = float(capsys.readouterr().out.split("network: ")[1].split()[0])
    assert millions == pytest.approx(130, rel=0.05)
    arm = load("configs/recipes/uwm.py:paper")
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
