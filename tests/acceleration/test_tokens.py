"""Laws of tokens that are computed between refreshes: all of them is the network, none of them is reuse of features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, models, solvers
from diffusion_jax.acceleration import cached_features, cached_tokens, every, reuse
from diffusion_jax.clock import some_step
from diffusion_jax.distributed import make_mesh
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import make_sampler
from tests.acceleration.test_features import (
    CLIP,
    COND,
    FLOW,
    GRID,
    NULL,
    STEPS,
    X,
    compiled,
    params,
    plain,
    ready,
    tiny,
)


@functools.cache
def run(ratio, attention=None):
    """The compiled run, of the interval and the weight of staleness (in place of the warm-up)."""

    def make(interval, staleness):
        return cached_tokens(tiny(), FLOW, every(interval), ratio, attention=attention, staleness=1.0 * staleness)

    return compiled(make)


def test_all_tokens_are_the_plain_run_and_none_are_reuse():
    np.testing.assert_allclose(run(1.0)[0](params(), 3).x, plain().x, atol=1e-6)
    reused = compiled(lambda interval, _: cached_features(tiny(), FLOW, reuse(), every(interval)))[0](params(), 3)
    none = run(0.0)[0](params(), 3)
    np.testing.assert_allclose(none.x, reused.x, atol=1e-6)
    assert float(none.cost.compute) == pytest.approx(float(reused.cost.compute))
    np.testing.assert_array_equal(run(0.25)[0](params(), 1).x, plain().x)


def test_a_share_of_the_tokens_costs_a_share_of_the_products():
    found = {ratio: run(*ratio)[0](params(), 3).cost for ratio in ((0.0,), (0.25, 0.0), (0.25,), (1.0,))}
    assert {float(cost.evaluations) for cost in found.values()} == {3.0}
    work = [float(cost.compute) for cost in found.values()]
    assert work == sorted(work) and len(set(work)) == 4
    assert work[-1] == pytest.approx(STEPS)


def test_only_the_chosen_tokens_enter_and_each_has_its_turn():
    seen = []

    def noted(run, data, y):
        seen.append(y.shape)
        return run(y)

    network = models.intercepted(tiny(), models.edit("feed_forward", noted)).network
    weights = {"params": params()}
    denoiser = cached_tokens(network, FLOW, every(9), 0.5, attention=0.0, staleness=100.0)
    carry, ages = denoiser.init(weights, X, COND), []
    step = jax.jit(denoiser.apply)
    for index in range(4):
        at = some_step(X)._replace(index=jnp.int32(index), t=jnp.full(8, GRID[index]))
        _, carry = step(weights, carry, X, at, COND)
        kept = carry.kept["blocks"]["block"]
        ages.append(np.asarray(kept["mlp"]["feed_forward"]["output"].age))
        assert (np.asarray(kept["attention"]["attention"]["output"].age) == index).all()
    assert {shape[1] for shape in seen} == {4, 2}
    assert ages[0].max() == 0
    for one in ages[1:]:
        np.testing.assert_array_equal(np.sort(one, axis=-1), np.broadcast_to([0, 0, 1, 1], one.shape))
    # What waited for a step is computed in the next.
    assert ((ages[1] == 0) != (ages[2] == 0)).all() and ((ages[2] == 0) != (ages[3] == 0)).all()


def test_what_is_chosen_is_new_and_the_rest_is_what_was_said_last():
    denoiser = cached_tokens(tiny(), FLOW, every(9), 0.25)

    @jax.jit
    def two(params):
        carries = [denoiser.init(params, X, COND)]
        for index in range(2):
            at = some_step(X)._replace(index=jnp.int32(index), t=jnp.full(8, GRID[index]))
            carries.append(denoiser.apply(params, carries[-1], X, at, COND)[1])
        return carries[1:]

    first, second = (carry.kept["blocks"]["block"]["mlp"]["feed_forward"]["output"] for carry in two(params()))
    moved = np.abs(np.asarray(first.value - second.value)).max(axis=-1) > 0
    np.testing.assert_array_equal(moved, np.asarray(second.age) == 0)
    largest = np.linalg.norm(np.asarray(first.value), axis=-1).argmax(axis=-1)
    np.testing.assert_array_equal(np.asarray(second.age).argmin(axis=-1), largest)


def test_guided_clips_on_a_mesh():
    network = models.video_dit(width=16, depth=2, heads=2, conditions=(models.label(3),))
    weights = ready(network, CLIP)
    guided = denoisers.guided(cached_tokens(network, FLOW, every(3), 0.3, attention=0.0), 2.0, NULL)
    found = [
        make_sampler(guided, solvers.flow_euler(), shape=CLIP.shape[1:], mesh=mesh)(
            jax.random.key(2), weights, GRID, COND, jnp.arange(8), CLIP
        )
        for mesh in (None, make_mesh(data=8))
    ]
    np.testing.assert_allclose(found[0].x, found[1].x, atol=1e-4)
    assert float(found[1].cost.evaluations) == 2 * 3


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(InvalidInput, match="ratio"):
        cached_tokens(tiny(), FLOW, every(2), 1.5)
    turned = cached_tokens(tiny(positions="rotary"), FLOW, every(2), 0.5)
    carry = jax.eval_shape(turned.init, params(), X, COND)
    at = some_step(X)
    with pytest.raises(InvalidInput, match="attention=0"):
        jax.eval_shape(turned.apply, params(), carry, X, at, COND)
