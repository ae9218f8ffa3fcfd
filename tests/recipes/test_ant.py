"""What the study of ANT adds to the objectives: intervals from measured affinities, counted costs, settings."""

import jax
import numpy as np
import pytest

from diffusion_jax import costs, timesteps
from diffusion_jax.config import build, load
from diffusion_jax.experiment import prepare
from diffusion_jax.recipes import ant
from diffusion_jax.recipes.__main__ import main
from diffusion_jax.stages import Stage


@pytest.fixture(scope="module")
def config():
    return load("configs/recipes/ant.py")


def test_the_baseline_that_is_trained_longer_has_as_many_operations(config):
    """A forward pass and k backward passes of about two: (1 + 2 k) / 3 plain updates."""
    flops = {}
    for name in ("equal", "PCGrad"):
        one = prepare(config.arms[name])
        params, batch = jax.eval_shape(one.init_params, jax.random.key(0)), one.example(50)
        state = jax.eval_shape(one.objective.init, jax.random.key(0), params, batch)
        gradient = one.objective.gradient or jax.grad(lambda *at, one=one: one.objective.loss(*at)[0].mean())
        flops[name] = costs.count_flops(lambda *at, f=gradient: f(*at, jax.random.key(0)), params, state, batch)
    ratio = config.arms["equal, longer"].train.steps / config.arms.equal.train.steps
    assert ratio == pytest.approx(flops["PCGrad"] / flops["equal"], rel=0.02)


def test_intervals_by_affinity_are_those_of_the_cosines_that_were_measured(config):
    """Two blocks of times that agree within and not between."""
    arm = config.arms["Nash, affinity"].copy_and_resolve_references()
    arm.objective.edges.clusters = 2
    cosines = np.kron(np.eye(2), np.ones((3, 3)))
    one = ant.by_affinity(arm, Stage("affinity", "", {"cosines": cosines}, None, 0.0, False))
    assert tuple(one.config.objective.edges) == (0.0, 0.5, 1.0)
    t, _ = build(one.config.objective.objective.draw).draw((), jax.random.key(0), (8,))
    assert ((np.asarray(t) <= 0.5) == (np.arange(8) < 4)).all()


def test_specialists_take_the_steps_in_their_interval_and_no_others(config):
    edges = build(config.edges, process=build(config.arms.equal.process))
    np.testing.assert_array_equal(np.round(edges * 1000), [0, 153, 394, 624, 823, 1000])
    draw = timesteps.restricted(timesteps.uniform(), low=float(edges[4]), high=float(edges[5]))
    t, _ = draw.draw((), jax.random.key(0), (100,))
    assert (np.asarray(timesteps.cluster_of(edges, t)) == 4).all()


def test_the_published_settings(capsys):
    config = load("configs/recipes/ant.py:paper")
    assert config.objective.learning_rate == 0.025 and config.train.batch_size % 5 == 0
    main(["ant:paper"])
    assert "million parameters" in capsys.readouterr().out
