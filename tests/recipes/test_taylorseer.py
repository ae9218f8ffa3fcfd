"""The worlds of TaylorSeer, and its published settings: what they would hold, ask and compute, from shapes alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import models
from diffusion_jax.acceleration import cached_features, every, refresh, refresh_table, taylor
from diffusion_jax.clock import some_step
from diffusion_jax.config import build, load
from diffusion_jax.costs import carry_bytes
from diffusion_jax.denoisers import guided
from diffusion_jax.recipes import taylorseer
from diffusion_jax.recipes.study import Study

PAPER = load("configs/recipes/taylorseer.py:paper")
SHAPE, COND = (32, 32, 4), {"label": jax.ShapeDtypeStruct((1,), jnp.int32)}


def test_all_arms_of_an_interval_ask_as_often_and_fewer_steps_are_not_cached(tmp_path):
    config = load("configs/recipes/taylorseer.py")
    config.mixture.update({"samples": 8, "dims": 4, "intervals": (3, 1), "rules": ("reuse", "order 1")})
    config.mixture.grid.steps, config.mixture.prototype = 9, {3: (1, "")}
    s = Study(config, (0, 1), tmp_path, True, {})
    found = taylorseer.compared(s, taylorseer.mixture(s), config.mixture)
    for interval, count in ((3, 5), (1, 9)):
        asked = {tuple(found[f"{rule} {interval}"]["evaluations"]) for rule in ("reuse", "order 1", taylorseer.FEWER)}
        assert asked == {(count, count)}
        assert all((found[f"{rule} {interval}"]["error"][0] < 1e-5) == (interval == 1) for rule in config.mixture.rules)
    rows = taylorseer.mixture_rows(found, config.mixture)
    assert len({row.title for row in rows}) == 4 and all(np.isfinite(row.ours).all() for row in rows)


@pytest.fixture(scope="module")
def published():
    network = build(PAPER.model)
    return network, models.param_shapes(network, (1, *SHAPE), COND)


@pytest.mark.parametrize(("name", "times_fewer"), [("N3_m3", 2.77), ("N5_m3", 4.53)])
def test_operations_are_saved_as_published(name, times_fewer, published):
    network, params = published
    (interval, order), grid = PAPER.settings[name], build(PAPER.grid)
    full, steps = int(refresh_table(every(interval, PAPER.warmup), grid).sum()), len(grid) - 1
    denoiser = cached_features(network, build(PAPER.process), taylor(order), every(interval, PAPER.warmup))
    rest = skipped_share(denoiser, params)
    assert 0 < rest < 0.01
    assert steps / (full + (steps - full) * rest) == pytest.approx(times_fewer, rel=0.01)


def skipped_share(denoiser, shapes):
    """The relative work of a skipped step; nothing else of the program is used, so nothing else is compiled."""

    @jax.jit
    def compute():
        params, cond = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes, COND))
        x = jnp.zeros((1, *SHAPE))
        carry = denoiser.init(params, x, cond)._replace(history=refresh.RefreshHistory(jnp.int32(5), jnp.int32(0)))
        return denoiser.apply(params, carry, x, some_step(x), cond)[0].cost.compute

    return float(compute())


def test_order_3_keeps_224_outputs_and_guidance_doubles_them(published):
    network, params = published
    cached = cached_features(network, build(PAPER.process), taylor(3), every(3, PAPER.warmup))
    x, one = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32), 4 * 256 * 1152
    # Beside the outputs: four knots, a basis of four by four, and three counters.
    assert carry_bytes(cached, params, x, COND) == 224 * one + 4 * (4 + 16 + 3)
    both = guided(cached, PAPER.guidance, PAPER.null.to_dict())
    assert carry_bytes(both, params, x, COND) >= 2 * 224 * one
