"""Ways of painting, what they are measured by, and the published network."""

import functools

import jax
import numpy as np
import pytest

from diffusion_jax import denoisers, models, solvers
from diffusion_jax.baselines import try_on_transformer
from diffusion_jax.config import build, load
from diffusion_jax.data import try_on
from diffusion_jax.recipes import fastfit
from diffusion_jax.recipes.published import published_inputs
from diffusion_jax.timesteps import linspace
from tests.models.shared import drawn_params

SOURCE = try_on("test", length=60)


@pytest.fixture(scope="module")
def made():
    """The forms of a small network, with weights of which no part is zero, and a task."""
    config = try_on_transformer(2, width=32, depth=1, heads=2)
    forms = models.referenced(build(config.model.network), 5, concat=True)
    task = fastfit.tasks_of(SOURCE, 0, 2)["unpaired"]
    params = drawn_params(forms.coupled, task.truth, np.zeros(2, np.float32), task.cond)
    return forms, build(config.process), params, task


def painted(made, network, sampled, steps):
    _, process, params, task = made
    denoiser = denoisers.denoiser(network, process)

    @jax.jit
    def run(cond):
        shape, told = task.truth.shape, {"task": cond}
        return sampled(jax.random.key(0), denoiser, params, solvers.ddim(), linspace(steps), cond=told, shape=shape).x

    return lambda cond: np.asarray(run(cond))


def test_what_is_not_hidden_stays_and_caching_changes_nothing(made):
    forms, _, _, task = made
    once = painted(made, forms.cached, functools.partial(fastfit.paint_cached, forms=forms), 3)(task.cond)
    anew = painted(made, fastfit.bound(forms.encoding), fastfit.paint, 3)(task.cond)
    np.testing.assert_allclose(once, anew, atol=1e-5)
    outside = np.broadcast_to(task.cond["concat"][..., :1] == 0, once.shape)
    np.testing.assert_array_equal(once[outside], task.before[outside])


def test_the_twin_with_the_references_of_its_first_step_is_the_twin_in_a_run_of_one_step(made):
    forms, _, _, task = made
    twin = painted(made, forms.coupled, fastfit.paint, 1)
    kept = painted(made, forms.cached, functools.partial(fastfit.paint_first, twin=forms.coupled), 1)(task.cond)
    np.testing.assert_allclose(kept, twin(task.cond), atol=1e-5)
    blind = denoisers.null_condition(task.cond, {"references": 0.0})
    assert np.abs(kept - twin(blind)).max() > 1e-3


def test_the_truth_measures_best():
    task = fastfit.tasks_of(SOURCE, 1, 20)["unpaired"]
    blurred, own = 0.9 * task.truth, task.before
    assert np.nanmin(fastfit.item_scores(blurred, task)) == 1 and 15 < fastfit.hidden_psnr(blurred, task) < 40
    assert np.nanmean(fastfit.item_scores(own, task)) < 0.3
    assert fastfit.hidden_psnr(own, task) < fastfit.hidden_psnr(blurred, task)


def test_the_published_network_has_references_and_no_cross_attention():
    config = load("configs/recipes/fastfit.py:paper")
    forms, kinds = models.referenced(build(config.model.network), config.model["items"]), config.model["items"]
    x, t, cond = published_inputs(config)
    params = jax.eval_shape(forms.encoding.init, jax.random.key(0), x, t, cond)
    assert not [path for path in models.by_path(params) if "cross_attention" in path]
    # Of 5, 5 and 6 transformer blocks, cross-attention (q, k, v, out with its bias, a norm) is gone.
    crossing = sum(blocks * (2 * w**2 + (2 * 768 + 3) * w) for w, blocks in ((320, 5), (640, 5), (1280, 6)))
    entrance, own = 9 * 5 * 320, 9 * 9 * 320 + 320 + kinds * 1280
    assert models.count_params(params) == 859_520_964 - crossing + entrance + own
    told = jax.eval_shape(functools.partial(models.cache_references, forms), params, cond)
    keys = models.by_path(told["cache"].layers)
    assert len(keys) == 2 * 16 and keys["mid_attention/blocks/block/attention/attention/attend/keys"].shape == (
        (1, 1, 3, 16 * 12, 8, 160)
    )
    output, _ = jax.eval_shape(forms.cached.apply, params, x, t, told)
    assert output.shape == x.shape and len(build(config.grid)) == 51
