"""What the study of ADDP adds to its method: predictors trained together, answers by step, and corrections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import data, denoisers, processes
from diffusion_jax.clock import single_step
from diffusion_jax.config import ConfigDict, build, load
from diffusion_jax.recipes import addp
from diffusion_jax.recipes.parts.predictors import trained_together
from diffusion_jax.typing import Network


@pytest.fixture(scope="module")
def config():
    return load("configs/recipes/addp.py:smoke")


def test_predictors_that_are_trained_together_do_not_know_of_each_other(config):
    trained = trained_together(ConfigDict({"arm": config.predictors["v, both"], "seeds": (4, 3, 4)}))["params"]
    for leaf in jax.tree.leaves(trained):
        np.testing.assert_array_equal(leaf[0], leaf[2])
    assert any(np.any(leaf[0] != leaf[1]) for leaf in jax.tree.leaves(trained))


def test_the_measures_of_answers_are_best_for_the_truth_and_the_judge_asks_for_what_was_marked():
    source = data.referring_scenes("test", 12, tasks=("segment",), ambiguous=1.0)
    true = source.x0[..., 0]
    assert addp.quality(source, true) == 1.0
    wrong, again = addp.correction(source, true)
    assert not wrong.any() and list(source.requests) == again
    pairs = zip(source.scenes, source.meant, strict=True)
    others = [next(mask for i, mask in enumerate(scene.masks) if i != meant) for scene, meant in pairs]
    marked = np.where(others, 1.0, -1.0)
    wrong, again = addp.correction(source, marked)
    assert wrong.all() and all(len(request.split()) == 4 for request in again)
    told = addp.corrected_overlap(source, marked, true, wrong)
    assert told["wrong, after"] == 1.0 and told["wrong, before"] < 0.1 and np.isnan(told["right, after"])
    depths = data.referring_scenes("test", 12, tasks=("depth",))
    assert addp.quality(depths, depths.x0[..., 0]) < 1e-5 < addp.quality(depths, 0 * depths.x0[..., 0])
    stereo = data.stereo_patches("test")
    few = addp.spread(stereo, 20)
    assert addp.quality(stereo, stereo.disparity[few]) < 1e-5 < addp.constant_error(stereo, 20)


def test_a_correction_moves_away_from_what_was_marked_and_one_by_the_request_changes_nothing():
    def apply(params, x, t, cond, train=False, key=None):
        assert set(cond) == {"concat", "tokens", "tokens_mask"}
        told = jnp.where(cond["tokens_mask"], cond["tokens"], 0).sum(axis=1)
        return x + told[:, None].astype(x.dtype), {}

    plain = denoisers.denoiser(Network(lambda *_: {}, apply), processes.vp_scaled_linear(prediction="x0"))
    asked, wrong = jnp.asarray([[3, 0], [3, 0]]), jnp.asarray([[3, 0], [1, 1]])
    cond = {"concat": jnp.zeros((2, 1)), "tokens": asked, "tokens_mask": asked != 0, "wrong": wrong}
    x, made = jnp.ones((2, 1)), addp.with_correction(plain, 2.0)
    found = made.apply({}, made.init({}, x, cond), x, single_step(jnp.full(2, 0.5)), cond)[0].x0
    np.testing.assert_allclose(found, [[4.0], [4.0 + 2.0 * (3 - 2)]])


def test_the_published_settings_can_be_built():
    config = load("configs/recipes/addp.py:paper")
    build(config.objective, network=build(config.model), process=build(config.process))
