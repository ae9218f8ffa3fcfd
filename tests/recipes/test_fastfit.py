"""Ways of painting, what they are measured by, and the published network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.baselines import try_on_transformer
from diffusion_jax.config import build, load
from diffusion_jax.data import try_on
from diffusion_jax.errors import InvalidInput
from diffusion_jax.recipes.parts import trying_on


def test_what_is_not_hidden_stays_and_caching_changes_nothing():
    config = load("configs/recipes/fastfit.py:smoke")
    config.guidance = 2.5
    editor = trying_on.editor(config.fastfit)
    task = trying_on.try_on_tasks(editor.experiment.held_out, 0, 2)["unpaired"]
    cond, noise = task.example["cond"], jax.random.normal(jax.random.key(0), task.before.shape)
    params = jax.jit(editor.experiment.network.init)(jax.random.key(0), noise, jnp.zeros(2), cond)
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.05), params)
    once, anew = (trying_on.painter(editor, way, config)(params, noise, cond) for way in ("cached", "encoding"))
    np.testing.assert_allclose(once, anew, atol=1e-5)
    outside = np.broadcast_to(cond["concat"][..., :1] == 0, noise.shape)
    np.testing.assert_array_equal(np.asarray(once)[outside], task.before[outside])
    with pytest.raises(InvalidInput, match="way"):
        trying_on.painter(editor, "twice", config)


def test_the_twin_with_the_references_of_its_first_step_is_the_twin_in_a_run_of_one_step():
    config = load("configs/recipes/fastfit.py:smoke")
    config.grid.steps = 1
    editor = trying_on.editor(try_on_transformer(2, "coupled", width=32, depth=1, heads=2))
    task = trying_on.try_on_tasks(editor.experiment.held_out, 0, 2)["paired"]
    cond, noise = task.example["cond"], jax.random.normal(jax.random.key(0), task.before.shape)
    params = jax.jit(editor.experiment.network.init)(jax.random.key(0), noise, jnp.zeros(2), cond)
    draws = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + draws.normal(0.0, 0.2, leaf.shape).astype(np.float32), params)
    anew, kept = (trying_on.painter(editor, way, config) for way in ("coupled", "coupled_cached"))
    np.testing.assert_allclose(kept(params, noise, cond), anew(params, noise, cond), atol=1e-5)
    blind = anew(params, noise, trying_on.without(cond))
    assert np.abs(anew(params, noise, cond) - blind).max() > 1e-3


def test_the_truth_measures_best():
    task = trying_on.try_on_tasks(try_on("test", length=60), 1, 20)["unpaired"]
    truth = task.example["x0"]
    blurred = trying_on.try_on_measures(0.9 * truth, task)
    assert blurred["item"]["all"] == 1 and 15 < blurred["psnr"] < 40 and 0.5 < blurred["ssim"] < 1
    own = trying_on.try_on_measures(task.before, task)
    assert own["item"]["all"] < 0.3 and own["psnr"] < blurred["psnr"]


def test_the_published_network_has_references_and_no_cross_attention():
    config = load("configs/recipes/fastfit.py:paper")
    forms = models.referenced(build(config.model), config.kinds)
    x = jax.ShapeDtypeStruct((1, *config.latents), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, *config.latents[:2], 5), jnp.float32)
    params = jax.eval_shape(forms.encoding.init, jax.random.key(0), x, jnp.zeros(1), {"concat": mask})
    assert not [path for path in models.by_path(params) if "cross_attention" in path]
    # Of 5, 5 and 6 transformer blocks, cross-attention (q, k, v, out with its bias, a norm) is gone.
    crossing = sum(blocks * (2 * w**2 + (2 * 768 + 3) * w) for w, blocks in ((320, 5), (640, 5), (1280, 6)))
    entrance, own = 9 * 5 * 320, 9 * 9 * 320 + 320 + config.kinds * 1280
    assert models.count_params(params) == 859_520_964 - crossing + entrance + own
    references = jax.ShapeDtypeStruct((1, 3, *config.latents), jnp.float32)
    items, present = jax.ShapeDtypeStruct((1, 3), jnp.int32), jax.ShapeDtypeStruct((1, 3), bool)
    cache = jax.eval_shape(forms.encode, params, references, items, present)
    keys = models.by_path(cache.layers)
    assert len(keys) == 2 * 16 and keys["mid_attention/blocks/block/attention/attention/attend/keys"].shape == (
        (1, 1, 3, 16 * 12, 8, 160)
    )
    output, _ = jax.eval_shape(forms.cached.apply, params, x, jnp.zeros(1), {"concat": mask, "cache": cache})
    assert output.shape == x.shape and len(build(config.grid)) == 51
