"""Laws of forecast features: refreshed always they are the network, what they skip is not run, tables are per row."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, models, processes, solvers
from diffusion_jax.acceleration import cached_features, every, newton, reuse, taylor
from diffusion_jax.costs import count_bytes
from diffusion_jax.distributed import make_mesh
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import make_sampler, sample
from tests import shipped
from tests.models.drawn import drawn

STEPS, DEPTH, WIDTH = 7, 2, 16
FLOW = processes.rectified_flow()
COND = {"label": jnp.asarray(np.arange(8) % 3)}
NULL = {"label": 3}
GRID = jnp.asarray(np.linspace(1.0, 0.0, STEPS + 1, dtype=np.float32))
X = jnp.asarray(np.random.default_rng(1).standard_normal((8, 4, 4, 1), np.float32))


def tiny(**fields):
    return models.dit("S/2", **{"width": WIDTH, "depth": DEPTH, "heads": 2, "conditions": (models.label(3),), **fields})


def ready(network, x=X, cond=COND):
    """Parameters of a network that are nowhere zero."""
    return drawn(models.param_shapes(network, jax.tree.map(jnp.shape, x), cond))


@functools.cache
def params():
    return ready(tiny())


def compiled(make, solver=None, x=X, cond=COND, grid=GRID, jit=jax.jit):
    """`(params, interval, warmup) -> Samples` of the denoiser `make(interval, warmup)`, and its list of traces."""
    solver = solvers.flow_euler() if solver is None else solver
    traces = []

    @jit
    def run(params, interval, warmup):
        traces.append(1)
        return sample(jax.random.key(2), make(interval, warmup), params, solver, grid, x_init=x, cond=cond)

    return lambda params, interval=1, warmup=1: run(params, jnp.int32(interval), jnp.int32(warmup)), traces


RULES = {"reuse": reuse(), "taylor 1": taylor(1), "newton 3": newton(3)}


@functools.cache
def cached_run(name):
    return compiled(lambda interval, warmup: cached_features(tiny(), FLOW, RULES[name], every(interval, warmup)))


@functools.cache
def plain_run():
    return compiled(lambda *_: denoisers.denoiser(tiny(), FLOW))[0]


@functools.cache
def plain():
    return plain_run()(params())


def counting(network, calls):
    """The network, which notes each call of an inner module; its parameters are `{"params": ...}`."""

    def noted(run, data, *args):
        jax.debug.callback(lambda: calls.append(1))
        return run(*args)

    return models.intercepted(network, models.edit(models.inner_modules, noted)).network


@pytest.mark.parametrize("name", RULES)
def test_without_skipped_steps_it_is_the_network_bit_for_bit_and_intervals_compile_nothing(name):
    run, traces = cached_run(name)
    for interval, warmup in ((1, 1), (3, STEPS), (2, STEPS + 5)):
        found = run(params(), interval, warmup)
        np.testing.assert_array_equal(found.x, plain().x)
        assert float(found.cost.evaluations) == float(found.cost.compute) == STEPS
    for interval, warmup in ((3, 1), (2, 2), (9, 3)):
        found = run(params(), interval, warmup)
        asked = warmup + (STEPS - warmup) // interval
        assert float(found.cost.evaluations) == asked
        # What is left of a skipped step: embeddings, modulation, the last layer.
        assert asked < float(found.cost.compute) < asked + 0.5 * (STEPS - asked)
        assert 1e-4 < float(jnp.abs(found.x - plain().x).max()) < 1e3
    assert len(traces) == 1


def test_skipped_steps_run_no_inner_module():
    calls = []
    network = counting(tiny(), calls)
    run, _ = compiled(lambda interval, warmup: cached_features(network, FLOW, taylor(1), every(interval, warmup)))
    for interval, warmup in ((1, 1), (3, 2), (4, 1), (2, STEPS)):
        calls.clear()
        run({"params": params()}, interval, warmup)
        jax.effects_barrier()
        assert len(calls) == 2 * DEPTH * (warmup + (STEPS - warmup) // interval)


def test_a_network_is_traced_once_to_compute_and_once_to_forecast():
    begun, traced = params(), []

    def count(call, args, kwargs, context):
        traced.append(context.module.name)
        return call(*args, **kwargs)

    run, _ = compiled(lambda interval, warmup: cached_features(tiny(), FLOW, taylor(1), every(interval, warmup)))
    with nn.intercept_methods(count):
        jax.eval_shape(run, begun)
    assert traced.count("patch_embed") == 2


def test_order_0_is_the_cache_of_last_outputs():
    """Against the cache of `models.cached`, which each layer keeps for itself, in a plain loop."""
    opened = models.intercepted(tiny(), models.cached(models.inner_modules))
    x, t = X, jnp.ones(8)
    state = opened.init(jax.random.key(0), params(), x, 1000 * t, COND)
    step = jax.jit(opened.apply)
    for index in range(STEPS):
        policy = models.per_layer(state["policy"], index % 3 == 0)
        t = jnp.full(8, GRID[index])
        velocity, _, state = step(params(), {**state, "policy": policy}, x, FLOW.network_time(t), COND)
        x = x + (GRID[index + 1] - GRID[index]) * velocity
    found = cached_run("reuse")[0](params(), 3, 1).x
    np.testing.assert_allclose(found, x, atol=1e-4)
    assert float(jnp.abs(found - cached_run("taylor 1")[0](params(), 3, 1).x).max()) > 1e-3


def test_what_is_kept_stands_before_the_gate():
    """With gates of zero no forecast reaches the tokens: runs are those of the plain network at any interval."""
    without = params()
    blocks = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "modulation" in jax.tree_util.keystr(path) else leaf,
        without["blocks"],
    )
    without = {**without, "blocks": blocks}
    np.testing.assert_allclose(cached_run("taylor 1")[0](without, 4, 1).x, plain_run()(without).x, atol=1e-6)


def test_the_carry_holds_order_plus_one_outputs_a_module_in_float32():
    for order, network in ((0, tiny()), (3, tiny(dtype="bfloat16"))):
        denoiser = cached_features(network, FLOW, taylor(order), every(2))
        values = jax.eval_shape(denoiser.init, params(), X, COND).table.values
        assert count_bytes(values) == 4 * (order + 1) * 2 * DEPTH * 8 * 4 * WIDTH


# What does not depend on the network is tested with the smallest one that has inner modules.
VECTORS = jnp.asarray(np.random.default_rng(5).standard_normal((8, 3), np.float32))


def smallest():
    return models.mlp(width=8, depth=2, conditions=(models.label(3),))


@functools.cache
def few_params():
    return ready(smallest(), VECTORS)


def cached_smallest(*policy):
    return cached_features(smallest(), FLOW, taylor(1), every(*policy))


@functools.cache
def whole():
    """A run with interval 3 and warm-up 2."""
    return compiled(cached_smallest, x=VECTORS)[0](few_params(), 3, 2)


@functools.partial(jax.jit, static_argnames=("start", "stop"))
def part(params, start, stop, **given):
    """The steps `start` .. `stop - 1` of the run of `whole`."""
    denoiser, key = cached_smallest(3, 2), jax.random.key(2)
    return sample(key, denoiser, params, solvers.flow_euler(), GRID, cond=COND, start=start, stop=stop, **given).run


def test_a_run_in_pieces_is_the_run():
    first = part(few_params(), 0, 4, x_init=VECTORS)
    found = part(few_params(), 4, STEPS, resume=first)
    np.testing.assert_allclose(found.x, whole().x, atol=1e-5)


def test_a_denoiser_that_takes_over_begins_with_an_empty_table():
    cached = cached_smallest(3, 2)
    # The times above 0.5 are those of the first four steps.
    both = denoisers.switched((cached, cached), (0.5,))
    found = compiled(lambda *_: both, x=VECTORS)[0]((few_params(), few_params()))
    first = part(few_params(), 0, 4, x_init=VECTORS)
    second = part(few_params(), 4, STEPS, resume=first._replace(carry=None))
    np.testing.assert_allclose(found.x, second.x, atol=1e-5)
    assert float(jnp.abs(found.x - whole().x).max()) > 1e-4


SOLVERS = {
    "multistep": (solvers.dpm_solver_pp(2), processes.vp_linear(), "log_snr", STEPS),
    "heun": (solvers.flow_heun(), FLOW, "t", 2 * STEPS),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_any_solver_runs_on_it(name):
    solver, process, along, calls = SOLVERS[name]

    def make(interval, warmup):
        return cached_features(smallest(), process, taylor(1), every(interval, warmup), along=along)

    plain = denoisers.denoiser(smallest(), process)
    expected = compiled(lambda *_: plain, solver, VECTORS, jit=shipped.jit)[0](few_params())
    run, _ = compiled(make, solver, VECTORS, jit=shipped.jit)
    np.testing.assert_array_equal(run(few_params()).x, expected.x)
    asked = float(expected.cost.evaluations)
    assert asked in (calls, calls - 1)
    skipped = run(few_params(), 2, 3)
    assert float(skipped.cost.evaluations) == 3 + (asked - 3) // 2
    assert bool(jnp.isfinite(skipped.x).all())


def test_the_two_rows_of_guidance_have_tables_of_their_own_and_shard_with_the_batch():
    cached = cached_smallest(3, 2)
    guided, solver = denoisers.guided(cached, 2.0, NULL), solvers.flow_euler()
    one, spread = (
        make_sampler(guided, solver, shape=VECTORS.shape[1:], mesh=mesh)(
            jax.random.key(2), few_params(), GRID, COND, jnp.arange(8), VECTORS
        )
        for mesh in (None, make_mesh(data=8))
    )
    apart = compiled(lambda *_: denoisers.autoguided(cached, cached, 2.0, NULL), x=VECTORS)[0]
    np.testing.assert_allclose(one.x, apart({"main": few_params(), "guide": few_params()}).x, atol=1e-4)
    np.testing.assert_allclose(spread.x, one.x, atol=1e-4)
    assert float(one.cost.evaluations) == float(spread.cost.evaluations) == 2 * 3


CONTEXT = {"context": np.random.default_rng(3).standard_normal((8, 3, 5), np.float32)}
CLIP = np.random.default_rng(4).standard_normal((8, 2, 4, 4, 1), np.float32)
PAIR = {"image": X, "text": X.reshape(8, 4, 4)}
ROWS = np.asarray(GRID)[:, None, None] * np.linspace(0.4, 1.0, 4, dtype=np.float32)
UNET = {
    "channels": 8,
    "multipliers": (1,),
    "num_residual": 1,
    "attention": (0,),
    "heads": 2,
    "conditions": (models.label(3),),
}
NETWORKS = {
    "rows in bfloat16": (lambda: tiny(dtype="bfloat16"), X, COND, ROWS),
    "video with a context": (
        lambda: models.video_dit(width=16, depth=2, heads=2, conditions=(models.context(),)),
        CLIP,
        CONTEXT,
        GRID,
    ),
    "unet": (lambda: models.unet(**UNET), X, COND, GRID, shipped.jit),
    "joint": (
        lambda: models.joint_transformer({"image": (2, 2), "text": (1,)}, width=16, depth=2, heads=2),
        PAIR,
        None,
        {"image": GRID, "text": GRID},
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_with_inner_modules_and_any_times(name):
    make, x, cond, grid, *jit = NETWORKS[name]
    network, joint = make(), isinstance(x, dict)
    process = processes.JointProcess(dict.fromkeys(x, FLOW)) if joint else FLOW
    weights = ready(network, x, cond)
    solver = solvers.ddim()

    def cached(interval, warmup):
        return cached_features(network, process, taylor(2), every(interval, warmup))

    run, _ = compiled(cached, solver, x, cond, grid, *jit)
    plain = denoisers.denoiser(network, process)
    expected = compiled(lambda *_: plain, solver, x, cond, grid, *jit)[0](weights)
    chex.assert_trees_all_equal(run(weights).x, expected.x)
    skipped = run(weights, 2, 3)
    assert float(skipped.cost.evaluations) == 5
    for one, other in zip(jax.tree.leaves(skipped.x), jax.tree.leaves(expected.x)):
        assert one.dtype == jnp.float32 and 0 < float(jnp.abs(one - other).max()) < 100.0


def test_what_cannot_be_cached_is_refused():
    with pytest.raises(InvalidInput, match="along"):
        cached_features(tiny(), FLOW, taylor(1), every(2), along="sigma")
    joint = processes.JointProcess({"image": FLOW})
    with pytest.raises(InvalidInput, match="one noise level"):
        cached_features(tiny(), joint, taylor(1), every(2), along="log_snr")
    nothing = cached_features(tiny(), FLOW, taylor(1), every(2), select="nowhere")
    with pytest.raises(InvalidInput, match="selects no module"):
        nothing.init(params(), X, COND)
