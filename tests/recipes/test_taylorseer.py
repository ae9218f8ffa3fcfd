"""The published settings of TaylorSeer: what they would hold, ask and compute, from shapes alone."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax import models
from diffusion_jax.acceleration import cached_features, refresh
from diffusion_jax.clock import some_step
from diffusion_jax.config import build, load
from diffusion_jax.costs import count_bytes
from diffusion_jax.denoisers import guided
from diffusion_jax.recipes.taylorseer import asked
from diffusion_jax.typing import Step

PAPER = load("configs/recipes/taylorseer.py:paper")


@pytest.fixture(scope="module")
def published():
    network = build(PAPER.model)
    cond = {"label": jax.ShapeDtypeStruct((1,), jnp.int32)}
    return network, models.param_shapes(network, (1, *PAPER.shape), cond), cond


def computed(policy, steps):
    """At how many of the steps a cache is filled."""

    def body(history, index):
        now = refresh.due(policy, Step(index, 1.0, 0.0, steps), history)
        return refresh.after(history, now), now

    return int(jax.lax.scan(body, refresh.no_history(), jnp.arange(steps))[1].sum())


@pytest.mark.parametrize(("name", "times_fewer"), [("N3_m3", 2.77), ("N5_m3", 4.53)])
def test_operations_are_saved_as_published(name, times_fewer, published):
    network, params, cond = published
    setting, steps = PAPER.settings[name], len(build(PAPER.grid)) - 1
    policy = build(setting.refresh)
    full = computed(policy, steps)
    assert full == asked(steps, setting.refresh.interval, setting.refresh.warmup)
    denoiser = cached_features(network, build(PAPER.process), build(setting.forecaster), policy)
    rest = skipped_share(denoiser, params, cond)
    assert 0 < rest < 0.01
    assert steps / (full + (steps - full) * rest) == pytest.approx(times_fewer, rel=0.01)


def skipped_share(denoiser, shapes, label):
    """The relative work of a skipped step; nothing else of the program is used, so nothing else is compiled."""

    @jax.jit
    def compute():
        params, cond = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes, label))
        x = jnp.zeros((1, *PAPER.shape))
        carry = denoiser.init(params, x, cond)._replace(history=refresh.RefreshHistory(jnp.int32(5), jnp.int32(0)))
        return denoiser.apply(params, carry, x, some_step(x), cond)[0].cost.compute

    return float(compute())


def test_order_3_keeps_224_outputs_and_guidance_doubles_them(published):
    network, params, cond = published
    setting = PAPER.settings["N3_m3"]
    cached = cached_features(network, build(PAPER.process), build(setting.forecaster), build(setting.refresh))
    x = jax.ShapeDtypeStruct((1, *PAPER.shape), jnp.float32)
    one = 4 * 256 * 1152
    kept = jax.eval_shape(cached.init, params, x, cond).table.values
    assert count_bytes(kept) == 224 * one
    both = guided(cached, PAPER.guidance, PAPER.null.to_dict())
    assert count_bytes(jax.eval_shape(both.init, params, x, cond).inner.table.values) == 2 * 224 * one
