"""Laws of steps that the first block decides about, on prescribed features and on tiny networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, models, processes, solvers
from diffusion_jax.acceleration import cg_taylor, first_and_last, first_block_cached, gated, reuse, taylor
from diffusion_jax.distributed import make_mesh
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import Staged, param_shapes
from diffusion_jax.sampling import make_sampler, sample
from tests.models.drawn import drawn

FLOW, PROCESS = processes.rectified_flow(), processes.vp_linear()
STEPS, BATCH = 12, 8
GRID = jnp.asarray(np.linspace(1.0, 0.0, STEPS + 1, dtype=np.float32))
LABELS = {"label": jnp.asarray(np.arange(BATCH) % 3)}


def features(head, last):
    """Features at each step, `[S, B, D]` each: the parameters of `prescribed`."""
    return {"head": jnp.asarray(head, jnp.float32), "last": jnp.asarray(last, jnp.float32)}


def prescribed(on_body=None):
    """Stages whose features are given for each step; the tail says them as a velocity."""

    def at(values, t):
        return values[jnp.round((1 - t[0] / 1000) * STEPS).astype(int)]

    def body(params, h, x, t, cond=None):
        if on_body is not None:
            jax.debug.callback(on_body, t[0])
        return at(params["last"], t)

    def head(params, x, t, cond=None):
        return at(params["head"], t)

    return Staged(head, body, lambda params, z, x, t, cond=None: (z, {}), None)


def along(*coefficients, noise=0.0, size=4):
    """Polynomials of the step, `[S, B, D]`, one a sample and dimension."""
    rng = np.random.default_rng(len(coefficients))
    steps = np.arange(STEPS)[:, None, None]
    lines = sum(c * rng.normal(1, 0.3, (BATCH, size)) * steps**k for k, c in enumerate(coefficients))
    return lines + noise * rng.normal(size=(STEPS, BATCH, size))


@functools.cache
def compiled(denoiser, solver):
    seen = denoisers.recorded(denoiser, STEPS, lambda prediction, x, step: dict(prediction.extras))
    return jax.jit(lambda params: sample(jax.random.key(0), seen, params, solver, GRID, shape=(BATCH, 4)))


EULER = solvers.flow_euler()


def run(denoiser, params, solver=EULER):
    """x, whether each step was full `[S]`, the errors `[S]`, and the cost."""
    found = compiled(denoiser, solver)(params)
    kept = found.run.carry.values
    return found.x, np.asarray(kept["gate_full"]), np.asarray(kept["gate_error"]), found.cost


@functools.cache
def exact():
    """All steps are computed."""
    return cg_taylor(prescribed(), FLOW, 0.0)


def full_steps(denoiser, params):
    return run(denoiser, params)[1].nonzero()[0].tolist()


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_features_that_do_not_move_are_computed_in_the_warm_up_and_at_the_end_only(scope):
    calls = []
    params = features(along(1.0), along(2.0))
    denoiser = cg_taylor(prescribed(lambda t: calls.append(float(t))), FLOW, 1e-6, scope=scope)
    x, full, errors, cost = run(denoiser, params)
    jax.effects_barrier()
    assert len(calls) == float(cost.evaluations) == 4
    assert np.flatnonzero(full if scope == "batch" else full.all(axis=1)).tolist() == [0, 1, 2, STEPS - 1]
    assert full.sum() == (4 if scope == "batch" else 4 * BATCH)
    np.testing.assert_array_equal(x, run(exact(), params)[0])
    assert np.all(np.isinf(errors[0])) and np.all(errors[1:] == 0)


def test_affine_features_need_no_step_but_the_warm_up_and_the_last():
    params = features(along(1.0, 0.5), along(-1.0, 0.3))
    x, full, _, _ = run(cg_taylor(prescribed(), FLOW, 1e-4, probe_order=1, order=1, warmup=2), params)
    assert full.nonzero()[0].tolist() == [0, 1, STEPS - 1]
    expected = run(exact(), params)[0]
    np.testing.assert_allclose(x, expected, atol=1e-5)


def test_the_error_is_that_of_the_forecast_before_the_table_is_refreshed():
    """A parabola, all steps computed: the forecast of a backward difference is wrong by 2 c at each step."""
    curve = along(0.0, 0.0, 1.0)
    _, _, errors, _ = run(cg_taylor(prescribed(), FLOW, 0.0, probe_order=1), features(curve, curve))
    second = curve[2:] - 2 * curve[1:-1] + curve[:-2]
    np.testing.assert_allclose(errors[2:], np.abs(second).mean((1, 2)) / np.abs(curve[2:]).mean((1, 2)), rtol=1e-3)


def reference(params, threshold, orders, warmup):
    """The card's loop in plain Python: full steps, and what the tail was given at each."""
    tables, before, full, given = [[], []], None, [], []
    for i in range(STEPS):
        values = [np.asarray(params[name][i], np.float64) for name in ("head", "last")]
        forecasts = [
            sum((i - before) ** k / np.prod(range(1, k + 1)) * d for k, d in enumerate(table)) for table in tables
        ] if full else None  # fmt: skip
        error = np.abs(forecasts[0] - values[0]).mean() / np.abs(values[0]).mean() if full else np.inf
        if i < warmup or i == STEPS - 1 or not error < threshold:
            for index, (value, order) in enumerate(zip(values, orders)):
                new = [value]
                for old in tables[index][:order]:
                    new.append((new[-1] - old) / (i - before))
                tables[index] = new
            before = i
            full.append(i)
            given.append(values[1])
        else:
            given.append(forecasts[1])
    return full, np.stack(given)


@pytest.mark.parametrize("orders", [(3, 1), (1, 2), (0, 0)])
def test_decisions_and_forecasts_are_those_of_the_plain_loop(orders):
    """Tables hold computed values only: one forecast that came back as a value would change what follows."""
    params = features(along(1.0, 0.4, 0.02, noise=0.05), along(1.0, -0.3, 0.05, noise=0.05))
    thresholds = {(3, 1): 0.4, (1, 2): 0.1, (0, 0): 0.2}
    full, given = reference(params, thresholds[orders], orders, warmup=3)
    assert 4 < len(full) < STEPS
    denoiser = cg_taylor(prescribed(), FLOW, thresholds[orders], probe_order=orders[0], order=orders[1])
    x, decided, _, _ = run(denoiser, params)
    assert decided.nonzero()[0].tolist() == full
    plain = run(exact(), features(params["head"], given))[0]
    np.testing.assert_allclose(x, plain, atol=1e-4)


def test_a_threshold_without_bound_reuses_the_last_block_after_the_warm_up():
    params = features(along(1.0, noise=1.0), along(1.0, noise=1.0))
    denoiser = cg_taylor(prescribed(), FLOW, jnp.inf, probe_order=0, order=0, warmup=2)
    x, full, _, _ = run(denoiser, params)
    assert full.nonzero()[0].tolist() == [0, 1, STEPS - 1]
    reused = np.array(params["last"])
    reused[2 : STEPS - 1] = reused[1]
    expected = run(exact(), features(params["head"], reused))[0]
    np.testing.assert_allclose(x, expected, atol=1e-5)


def test_on_given_features_a_larger_threshold_computes_no_more_steps_and_compiles_nothing():
    params = features(along(1.0, 0.4, noise=0.3), along(1.0))
    traced = []

    @jax.jit
    def counted(threshold, warmup):
        traced.append(1)
        denoiser = cg_taylor(prescribed(), FLOW, threshold, probe_order=1, warmup=warmup)
        found = sample(jax.random.key(0), denoiser, params, solvers.flow_euler(), GRID, shape=(BATCH, 4))
        return found.cost.evaluations

    counts = [float(counted(threshold, 3)) for threshold in (-1.0, 0.0, 0.05, 0.1, 0.2, 0.4, 1.0, np.inf)]
    assert counts == sorted(counts, reverse=True) and counts[0] == counts[1] == STEPS
    assert len(set(counts)) > 3 and counts[-1] == 4
    assert float(counted(np.inf, 5)) == 6 and len(traced) == 1


def test_an_error_that_is_not_a_number_is_not_trusted():
    head = along(1.0)
    head[5] = np.nan
    full = full_steps(cg_taylor(prescribed(), FLOW, 0.1, probe_order=0), features(head, along(1.0)))
    # Nor is what is compared with it.
    assert full == [0, 1, 2, 5, 6, STEPS - 1]


def test_each_sample_decides_for_itself_as_if_it_were_alone():
    """With one noisy sample in the batch the others go on as they would without it."""
    head, last = along(1.0, 0.1), along(1.0, 0.4, 0.05)
    head[:, 3] += np.random.default_rng(0).normal(size=head[:, 3].shape)
    denoiser = cg_taylor(prescribed(), FLOW, 0.05, scope="sample", probe_order=1)
    x, full, errors, cost = run(denoiser, features(head, last))
    assert full.shape == errors.shape == (STEPS, BATCH)
    assert full[:, 3].sum() > 6 and full[:, 0].sum() == 4 == np.delete(full, 3, axis=1).any(axis=1).sum()
    assert float(cost.evaluations) == full.any(axis=1).sum()
    calm = head.copy()
    calm[:, 3] = head[:, 0]
    alone = run(denoiser, features(calm, last))
    np.testing.assert_array_equal(np.delete(x, 3, axis=0), np.delete(alone[0], 3, axis=0))
    # Together, one decides for all.
    assert full_steps(cg_taylor(prescribed(), FLOW, 0.05, probe_order=1), features(head, last)) != [0, 1, 2, STEPS - 1]


SMALL = {"width": 16, "depth": 3, "heads": 2}
TEXT = {"context": np.ones((BATCH, 3, 5), np.float32) * np.float32(np.arange(1, BATCH + 1) / BATCH)[:, None, None]}
NETWORKS = {
    "dit": (lambda: models.dit("S/2", **SMALL, conditions=(models.label(3),)), (4, 4, 1), LABELS),
    "pixart": (lambda: models.pixart("XL/2", **SMALL, in_channels=1), (4, 4, 1), TEXT),
    "video": (
        lambda: models.video_dit("S/2", **{**SMALL, "depth": 4}, conditions=(models.label(3),)),
        (2, 4, 4, 1),
        LABELS,
    ),
    "unet": (
        lambda: models.unet(channels=8, groups=4, multipliers=(1, 2), num_residual=1, conditions=(models.label(3),)),
        (4, 4, 1),
        LABELS,
    ),
}


def ready(name):
    make, shape, cond = NETWORKS[name]
    network = make()
    shapes = param_shapes(network, (1, *shape), jax.tree.map(lambda leaf: leaf[:1], cond))
    return network, drawn(shapes), shape, cond


@pytest.mark.parametrize("name", ["pixart", "video", "unet"])
def test_every_network_skips_and_on_a_mesh_all_devices_skip_alike(name):
    """Thresholds are parameters of one compiled program, so that the full run and the short one share it.

    One network is guided and on a mesh too: the DiT with a context.
    """
    network, params, shape, cond = ready(name)
    asked = 2 if name == "pixart" else 1

    def around(denoiser):
        return denoisers.guided(denoiser, 2.0, {"context": np.zeros((3, 5))}) if name == "pixart" else denoiser

    def draw(mesh, *thresholds):
        axis = None if mesh is None else "data"
        tuned = _with_threshold(lambda at: around(cg_taylor(network, PROCESS, at, probe_order=1, axis=axis)))
        sampler = make_sampler(tuned, solvers.ddim(), shape=shape, mesh=mesh)
        trees = [{"params": params, "threshold": jnp.float32(at)} for at in thresholds]
        return [sampler(jax.random.key(1), tree, GRID, cond, jnp.arange(BATCH)) for tree in trees]

    full, short = draw(None, 0.0, 0.25)
    assert float(full.cost.evaluations) == float(full.cost.compute) == asked * STEPS
    assert asked * 4 <= float(short.cost.evaluations) < float(short.cost.compute) < asked * STEPS
    if name == "pixart":
        whole = make_sampler(around(denoisers.denoiser(network, PROCESS)), solvers.ddim(), shape=shape)
        expected = whole(jax.random.key(1), params, GRID, cond, jnp.arange(BATCH))
        np.testing.assert_allclose(full.x, expected.x, atol=1e-4)
        (eight,) = draw(make_mesh(data=8), 0.25)
        np.testing.assert_allclose(short.x, eight.x, atol=1e-5)
        assert float(short.cost.evaluations) == float(eight.cost.evaluations)


def _with_threshold(make):
    """A denoiser whose parameters hold the threshold, an argument of the compiled program."""
    return make(0.0)._replace(
        init=lambda params, x, cond: make(params["threshold"]).init(params["params"], x, cond),
        apply=lambda params, carry, x, step, cond: make(params["threshold"]).apply(
            params["params"], carry, x, step, cond
        ),
    )


def test_solvers_that_ask_twice_go_along_the_time():
    """The second question of a step is at the time of the next step's first: along the index it would be another."""
    params = features(along(1.0, 0.5), along(-1.0, 0.3))

    def line(values, t):
        return values[0] + (1 - t[0] / 1000) * STEPS * (values[1] - values[0])

    stages = Staged(
        lambda params, x, t, cond=None: line(params["head"], t),
        lambda params, h, x, t, cond=None: line(params["last"], t),
        lambda params, z, x, t, cond=None: (z, {}),
        None,
    )
    options = {"probe_order": 1, "order": 1, "along": "t"}
    x, full, _, cost = run(cg_taylor(stages, FLOW, 1e-3, **options), params, solver=solvers.flow_heun())
    expected = run(cg_taylor(stages, FLOW, 0.0, **options), params, solver=solvers.flow_heun())
    np.testing.assert_allclose(x, expected[0], atol=1e-4)
    assert float(cost.evaluations) < 6 < float(expected[3].evaluations) and full[-1]


def test_the_first_block_cache_compares_with_the_last_computed_step():
    network, params, shape, cond = ready("dit")
    made = _with_threshold(lambda at: first_block_cached(network, PROCESS, at))
    seen = denoisers.recorded(made, STEPS, lambda prediction, x, step: dict(prediction.extras))

    @jax.jit
    def whole(threshold):
        tree = {"params": params, "threshold": threshold}
        found = sample(jax.random.key(0), seen, tree, solvers.ddim(), GRID, shape=(BATCH, *shape), cond=cond)
        return found.x, found.run.carry.values["gate_full"], found.run.carry.values["gate_error"]

    x, full, errors = whole(0.0)
    assert full.all() and np.isinf(errors[0])
    threshold = float(np.quantile(errors[1:], 0.3))
    fewer, full, errors = whole(threshold)
    assert full[0] and 1 < full.sum() < STEPS and np.abs(fewer - x).max() > 1e-4
    # No warm-up and no forced last step, as in diffusers: the error alone decides.
    np.testing.assert_array_equal(full[1:], ~(errors[1:] < threshold))


def test_what_makes_no_gate_is_refused():
    with pytest.raises(InvalidInput, match="threshold"):
        cg_taylor(prescribed(), FLOW, -0.1)
    with pytest.raises(InvalidInput, match="scope"):
        cg_taylor(prescribed(), FLOW, 0.1, scope="token")
    with pytest.raises(InvalidInput, match="relative_to"):
        gated(prescribed(), FLOW, 0.1, probe=reuse(), last=taylor(1), refresh=first_and_last(), relative_to="last")
    with pytest.raises(InvalidInput, match="network itself"):
        gated(prescribed(), FLOW, 0.1, probe=reuse(), last=reuse(), residual=True)
