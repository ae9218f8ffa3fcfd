"""What is FVDM's own: tasks are plans of one shape, arms differ in p alone, the published setting is Latte's."""

from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data, timesteps
from diffusion_jax.config import build, load
from diffusion_jax.experiment import prepare
from diffusion_jax.models import param_shapes, video_dit
from diffusion_jax.recipes import fvdm
from tests.models.drawn import drawn

FILE = "configs/recipes/fvdm.py"


@pytest.mark.parametrize("task", fvdm.TASKS)
def test_a_task_is_which_frames_stand_at_zero(task):
    grid = timesteps.linspace(4)
    times = np.asarray(fvdm.plan(grid, task))
    assert times.shape == (5, 1, 8)
    given = np.zeros(8, bool)
    given[list(fvdm.TASKS[task])] = True
    assert (times[:, :, given] == 0).all()
    np.testing.assert_array_equal(times[:, 0, ~given], np.repeat(np.asarray(grid)[:, None], (~given).sum(), axis=1))


def test_blending_keeps_the_ends():
    real = data.moving_shapes("test").take(range(2))["x0"]
    between = fvdm.blended(real)
    np.testing.assert_allclose(between[:, [0, -1]], real[:, [0, -1]], atol=1e-6)
    assert np.abs(between[:, fvdm.MIDDLE] - real[:, fvdm.MIDDLE]).max() > 0.5


def test_the_arms_differ_in_p_alone():
    arms = load(FILE).arms
    shares = {}
    for name, entry in arms.items():
        shares[name] = entry.objective.draw.probability
        entry.objective.draw.probability = 0.0
    assert shares == {"synchronous": 0.0, "mixed": 0.2, "independent": 1.0}
    assert all(entry.to_dict() == arms.mixed.to_dict() for entry in arms.values())


def test_the_published_setting_has_a_time_for_every_frame_and_the_size_of_latte():
    config = load(f"{FILE}:paper")
    network = build(config.model)
    clip, times = jax.ShapeDtypeStruct((1, 16, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((1, 16), jnp.float32)
    params = jax.eval_shape(lambda x, t: network.init(jax.random.key(0), x, t, {}), clip, times)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 6.5e8 < count < 7e8
    assert config.objective.draw.probability == 0.2
    output = jax.eval_shape(lambda p, x, t: network.apply(p, x, t, {})[0], params, clip, times)
    assert output.shape == clip.shape


def test_frames_are_a_set_without_temporal_positions():
    """Permuting frames together with their times permutes the answer: times reach their own frame's patches."""
    network = video_dit("S/2", patch=2, width=16, depth=2, heads=2, temporal_positions="none")
    key = jax.random.key(0)
    x, t = jax.random.normal(key, (2, 5, 4, 4, 3)), jax.random.uniform(key, (2, 5))
    params = jax.tree.map(lambda leaf: leaf + 0.1, network.init(key, x, t, {}))
    order = np.array([3, 0, 4, 1, 2])
    apply = jax.jit(lambda x, t: network.apply(params, x, t, {})[0])
    np.testing.assert_allclose(apply(x[:, order], t[:, order]), apply(x, t)[:, order], atol=1e-5)
    assert np.abs(apply(x[:, order], t) - apply(x, t)[:, order]).max() > 1e-3


@pytest.mark.parametrize("moved", [0.0, 0.25])
def test_a_given_frame_that_moves_is_found(moved):
    real = data.moving_shapes("test").take(range(2))["x0"]
    made = fvdm.ClipSampler(lambda params, key, times, known: known + moved, None, None, [()])
    found = fvdm.exactness(None, jax.random.key(0), made, timesteps.linspace(2), real)
    assert found["given"] == pytest.approx(moved, abs=1e-6)
    assert found["scalar"] == 0


def test_clips_go_on_and_equal_times_are_one_time():
    """The smoke run makes no long clips and compares no times."""
    entry = load(f"{FILE}:smoke").arms.mixed
    experiment = prepare(entry)._replace(shape=(8, 1, 1, 8))
    params = drawn(param_shapes(experiment.network, (1, *experiment.shape)))
    made, grid = fvdm.clip_sampler(experiment), jnp.asarray(build(entry.sampling.grid))
    known = np.random.default_rng(0).standard_normal((2, 8, 1, 1, 8), np.float32)
    found = fvdm.exactness(params, jax.random.key(0), made, grid, known)
    assert found["given"] == 0 and found["programs"] == 1 and found["scalar"] < 1e-5
    long = made.chained(params, jax.random.key(0), known, 3)
    assert long.shape == (2, 4 + 3 * 4, 1, 1, 8)
    np.testing.assert_array_equal(long[:, :4], known[:, :4])
    assert np.isfinite(long).all()


def test_exact_claims_fail_for_any_deviation():
    found = defaultdict(lambda: [1.0, 1.0])
    held = {one.name: one.holds for one in fvdm.claims(found, {"given": 1e-9, "scalar": 0.0, "programs": 2.0})}
    assert not held["Given frames return bit for bit"]
    assert held["Equal times are one time"]
    assert not held["Tasks are data"]
