"""Widths by step in a run: tables say what routers say, cut weights run what gates mask, and cost their share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import adapters, denoisers, models, processes, solvers, timesteps
from diffusion_jax.acceleration import dynamic, every, reuse
from diffusion_jax.acceleration.features import cached_features
from diffusion_jax.distributed import make_mesh
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import make_sampler, sample
from tests.models.drawn import drawn

SHAPE, STEPS = (4, 4, 1), 6
LABELS = {"label": jnp.arange(8) % 3}
GRID = timesteps.linspace(STEPS)
SOLVERS = {
    "ddpm": (processes.vp_linear, solvers.ddpm),
    "flow": (processes.rectified_flow, solvers.flow_euler),
}


@functools.cache
def routed_case(name):
    """`(network, process, routed, parameters)`, whose routers leave out about half, other parts at other times."""
    network, process = models.dit(width=16, depth=2, heads=2, conditions=(models.label(3),)), SOLVERS[name][0]()
    x, t, cond, key = jnp.zeros((1, *SHAPE)), jnp.zeros(1), {"label": np.zeros(1, np.int32)}, jax.random.key(0)
    params = drawn(models.param_shapes(network, x.shape, cond), seed=2)
    timed = adapters.routed(network, 4, bias=0.0)
    made = jax.jit(timed.init)(key, params, x, t, cond)
    return network, process, timed, {"params": params, **jax.tree.map(lambda leaf: 3 * np.asarray(leaf), made)}


@functools.cache
def tables(name):
    _, process, timed, tree = routed_case(name)
    gates = dynamic.tabulated(timed.fill, tree, process, GRID[:-1])
    costs = models.width_costs(
        timed.opened,
        {"params": tree["params"], "gates": jax.tree.map(lambda leaf: leaf[0], gates)},
        jnp.zeros((1, *SHAPE)),
        jnp.zeros(1),
        {"label": jnp.zeros(1, jnp.int32)},
    )
    return gates, costs


@pytest.mark.parametrize("name", SOLVERS)
def test_cut_weights_sample_what_routers_say_on_the_fly(name):
    network, process, timed, tree = routed_case(name)
    gates, costs = tables(name)
    assert any(np.any(leaf[0] != leaf[-1]) for leaf in jax.tree.leaves(gates))
    solver, key = SOLVERS[name][1](), jax.random.key(1)

    def run(denoiser, params):
        draw = functools.partial(sample, key, denoiser, solver=solver, grid=GRID, shape=(8, *SHAPE), cond=LABELS)
        return jax.jit(lambda params: draw(params=params))(params)

    on_the_fly = run(denoisers.denoiser(timed.network, process), tree)
    by_table = dynamic.tables_by_time(denoisers.denoiser(timed.opened, process), GRID[:-1])
    masked = run(by_table, {"params": tree["params"], "tables": {"gates": gates}})
    np.testing.assert_allclose(masked.x, on_the_fly.x, atol=1e-6)
    static = dynamic.static_widths(network, process, GRID[:-1], gates, costs, 3)
    cut = run(static.denoiser, static.prepare({"params": tree["params"]}))
    np.testing.assert_allclose(cut.x, on_the_fly.x, atol=1e-4)
    # What it cost is what its buckets run.
    assert float(cut.cost.evaluations) == STEPS
    np.testing.assert_allclose(cut.cost.compute, static.ratio.sum(), rtol=1e-5)
    assert static.needed.sum() <= static.ratio.sum() < STEPS
    np.testing.assert_allclose(masked.cost.compute, STEPS)


def test_a_table_is_what_the_routers_report():
    _, process, timed, tree = routed_case("ddpm")
    gates, costs = tables("ddpm")
    ledger = jax.jit(lambda t: timed.network.apply(tree, jnp.zeros((6, *SHAPE)), t, {"label": LABELS["label"][:6]})[1])
    reported = models.executed_ratio(ledger(process.network_time(GRID[:-1]))["ledger"])
    np.testing.assert_allclose(reported, dynamic.executed_share(gates, costs), rtol=1e-5)
    first = jax.tree.map(lambda leaf: leaf[0, :, 0], gates)
    np.testing.assert_allclose(reported[0], dynamic.executed_share(first, costs), rtol=1e-5)


def test_the_network_of_a_table_is_the_routed_one_at_its_times():
    _, process, timed, tree = routed_case("ddpm")
    times = process.network_time(GRID[:-1])
    under = dynamic.by_nearest_time(timed.opened, times)
    x, cond = jax.random.normal(jax.random.key(3), (6, *SHAPE)), {"label": LABELS["label"][:6]}
    nearly = {"params": tree["params"], "table": tables("ddpm")[0]}

    @jax.jit
    def both(x, t):
        return under.apply(nearly, x, t, cond)[0], timed.network.apply(tree, x, t, cond)[0]

    # Samples have times of their own.
    np.testing.assert_allclose(*both(x, times[::-1]), atol=1e-5)


def test_buckets_are_the_cheapest_ranges():
    _, costs = tables("ddpm")
    like = jax.tree.map(lambda leaf: np.zeros((5, *leaf.shape[1::2]), bool), tables("ddpm")[0])
    rng = np.random.default_rng(0)
    on = jax.tree.map(lambda leaf: rng.random(leaf.shape) > 0.6, like)

    def cost(ranges):
        unions = [jax.tree.map(lambda m, a=a, b=b: m[a:b].any(0), on) for a, b in ranges]
        return sum((b - a) * dynamic.executed_share(union, costs) for union, (a, b) in zip(unions, ranges, strict=True))

    every = [[(0, i), (i, j), (j, 5)] for i in range(1, 4) for j in range(i + 1, 5)]
    found = dynamic.partition(on, costs, 3)
    assert cost(found) == pytest.approx(min(map(cost, every)))
    # Equal steps are one range, however many there may be.
    assert dynamic.partition(jax.tree.map(lambda m: np.repeat(m[:1], 5, 0), on), costs, 4) == [(0, 5)]


def test_guidance_nests_and_eight_devices_agree_with_one():
    network, process, _, tree = routed_case("ddpm")
    gates, costs = tables("ddpm")
    static = dynamic.static_widths(network, process, GRID[:-1], gates, costs, 2)
    guided = denoisers.guided(static.denoiser, 2.0, null={"label": 3})
    params = static.prepare({"params": tree["params"]})
    alone = make_sampler(guided, solvers.ddim(), shape=SHAPE)
    spread = make_sampler(guided, solvers.ddim(), shape=SHAPE, mesh=make_mesh(data=8))
    key, index = jax.random.key(2), jnp.arange(8)
    out = alone(key, params, GRID, LABELS, index).x
    # Random weights drive x far out, and rounding with it.
    atol = 2e-6 * float(jnp.abs(out).max())
    np.testing.assert_allclose(spread(key, params, GRID, LABELS, index).x, out, atol=atol)


def test_features_are_cached_under_gates():
    _, process, timed, tree = routed_case("ddpm")
    gates, _ = tables("ddpm")
    params = {"params": tree["params"], "tables": {"gates": gates}}
    plain = denoisers.denoiser(timed.opened, process)
    computed, reused = (cached_features(timed.opened, process, reuse(), every(n)) for n in (1, 2))

    @jax.jit
    def run(params):
        timed = (dynamic.tables_by_time(inner, GRID[:-1]) for inner in (plain, computed, reused))
        options = {"shape": (8, *SHAPE), "cond": LABELS}
        return [sample(jax.random.key(1), one, params, solvers.ddim(), GRID, **options) for one in timed]

    out, same, fewer = run(params)
    np.testing.assert_allclose(same.x, out.x, atol=1e-5)
    assert np.abs(fewer.x - out.x).max() > 1e-3
    assert float(fewer.cost.evaluations) == STEPS / 2


def test_what_cannot_be_tabulated_is_told():
    network, process, timed, tree = routed_case("ddpm")
    gates, costs = tables("ddpm")
    with pytest.raises(InvalidInput, match="buckets is 0"):
        dynamic.static_widths(network, process, GRID[:-1], gates, costs, 0)
    by_table = dynamic.tables_by_time(denoisers.denoiser(timed.opened, process), GRID[:-1])
    frames = jnp.broadcast_to(GRID[:, None, None], (STEPS + 1, 8, 4))
    with pytest.raises(InvalidInput, match="one time for the whole batch"):
        sample(
            jax.random.key(0),
            by_table,
            {"params": tree["params"], "tables": {"gates": gates}},
            solvers.ddim(),
            frames,
            shape=(8, *SHAPE),
            cond=LABELS,
        )
