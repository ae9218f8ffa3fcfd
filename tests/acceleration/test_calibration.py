"""ERTACache: the exact laws of its schedule, its grid and its regression, and what a calibration is valid for."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, solvers
from diffusion_jax.acceleration import (
    adjusted_grid,
    cached_outputs,
    calibrate,
    ertacache,
    load_calibration,
    offline_schedule,
    on_schedule,
    record_outputs,
    replayed,
    save_calibration,
    taylor,
)
from diffusion_jax.acceleration.calibration import error_regression, step_fractions
from diffusion_jax.distributed import make_mesh
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import make_sampler, sample

FLOW = processes.rectified_flow()
STEPS, SHAPE = 12, (6,)
GRID = jnp.asarray(np.linspace(1.0, 0.0, STEPS + 1, dtype=np.float32))
EXACT = denoisers.analytic(FLOW)
THRESHOLDS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)


@functools.cache
def mixture():
    means = jnp.asarray(np.random.default_rng(7).standard_normal((4, *SHAPE), np.float32))
    return denoisers.gaussian_mixture(means, 0.15)


@jax.jit
def record(key, params):
    return record_outputs(key, EXACT, params, solvers.flow_euler(), GRID, shape=(32, *SHAPE))


@functools.cache
def recorded():
    """The runs, as NumPy arrays, and what is kept of them."""
    runs = jax.device_get(record(jax.random.key(0), mixture()))
    return runs, runs.output - runs.x


@functools.cache
def reused_at(threshold):
    """The schedule at a threshold, and what it forecasts of the outputs."""
    runs, kept = recorded()
    computed = offline_schedule(kept, threshold)
    forecast = np.asarray(replayed(kept, computed)) + runs.x
    return computed, forecast


@jax.jit
def fast(params, computed, correction, grid):
    denoiser = cached_outputs(EXACT, on_schedule(computed), residual=True, correction=correction)
    found = sample(jax.random.key(1), denoiser, params, solvers.flow_euler(), grid, shape=(16, *SHAPE))
    return found.x, found.cost.evaluations


@jax.jit
def full(params):
    return sample(jax.random.key(1), EXACT, params, solvers.flow_euler(), GRID, shape=(16, *SHAPE)).x


def test_threshold_zero_computes_everything_and_is_the_plain_sampler_bit_for_bit():
    found = calibrate(recorded()[0], GRID, FLOW, 0.0)
    assert bool(found.computed.all())
    grid = adjusted_grid(GRID, found.fraction)
    np.testing.assert_array_equal(grid, GRID)
    x, evaluations = fast(mixture(), found.computed, found.correction, grid)
    np.testing.assert_array_equal(x, full(mixture()))
    assert float(evaluations) == STEPS
    assert not np.any(found.correction.slope) and not np.any(found.correction.bias)


def test_more_steps_are_reused_as_the_threshold_grows_and_the_ends_never():
    kept = recorded()[1]
    schedules = np.asarray(jax.jit(jax.vmap(lambda at: offline_schedule(kept, at)))(np.float32(THRESHOLDS)))
    counts = (~schedules).sum(axis=1)
    assert bool((np.diff(counts) >= 0).all()) and counts[0] == 0 and counts[-1] > STEPS / 2
    assert bool(schedules[:, [0, -1]].all())


def test_the_schedule_and_the_replay_are_the_walk_of_the_publication():
    given, threshold = recorded()[1], 0.1
    kept = np.float64(given)
    last, computed, forecasts = kept[0], [], []
    for index, value in enumerate(kept):
        forecasts.append(last)
        reuse = np.abs(last - value).sum() / np.abs(value).sum() < threshold and 0 < index < STEPS - 1
        computed.append(not reuse)
        last = last if reuse else value
    found = offline_schedule(given, threshold)
    np.testing.assert_array_equal(found, computed)
    assert 2 < sum(computed) < STEPS
    np.testing.assert_allclose(replayed(given, found)[1:], forecasts[1:], rtol=1e-6)


@pytest.mark.parametrize("residual", [True, False])
def test_what_is_constant_is_reused_from_the_second_step_to_the_last_but_one_and_exact(residual):
    """Outputs: the straight lines to one point. Residuals: what a denoiser adds to its input, made constant here."""
    if residual:
        runs = recorded()[0]
        runs = runs._replace(output=runs.x + 0.5)
        found = calibrate(runs, GRID, FLOW, 1e-3)
        np.testing.assert_allclose(replayed(runs.output - runs.x, found.computed)[1:], 0.5, atol=1e-6)
    else:
        point = denoisers.gaussian_mixture(jnp.ones((1, *SHAPE)), 0.0)
        runs = record(jax.random.key(0), point)
        found = calibrate(runs, GRID, FLOW, 1e-3, residual=False)
        grid = adjusted_grid(GRID, found.fraction)

        @jax.jit
        def reused(point):
            denoiser = cached_outputs(EXACT, on_schedule(found.computed), correction=found.correction)
            return sample(jax.random.key(1), denoiser, point, solvers.flow_euler(), grid, shape=(8, *SHAPE))

        x = reused(point)
        np.testing.assert_allclose(x.x, 1.0, atol=1e-4)
        assert float(x.cost.evaluations) == 2
    np.testing.assert_array_equal(np.flatnonzero(found.computed), [0, STEPS - 1])
    np.testing.assert_allclose(found.fraction, 1.0, atol=1e-5)


@pytest.mark.parametrize("process", [None, FLOW, processes.vp_linear(100)], ids=["t", "flow in s", "vp in s"])
def test_the_grid_ends_where_it_ended_for_every_fraction(process):
    grid = np.linspace(1.0 if process is not FLOW else 0.99, 0.0, STEPS + 1, dtype=np.float32)
    for seed in range(4):
        fraction = np.random.default_rng(seed).random(STEPS, np.float32)
        fraction[3] = 0.0
        fraction[5:][fraction[5:] < 0.3] = 1.0
        moved = np.asarray(adjusted_grid(grid, fraction, process))
        assert moved[0] == grid[0] and moved[-1] == 0.0
        assert bool((np.diff(moved) <= 0).all()) and bool((moved >= grid - 1e-6).all())
        assert abs(float(-np.diff(moved).sum()) - float(grid[0])) < 1e-6
        np.testing.assert_allclose(moved[4], moved[3], rtol=1e-5)
    np.testing.assert_array_equal(adjusted_grid(grid, np.ones(STEPS), process), grid)


def test_the_grid_is_the_loop_of_the_publication():
    grid = np.linspace(1.0, 0.0, STEPS + 1) ** 1.5
    fraction = np.random.default_rng(0).uniform(size=STEPS)
    now, expected = 1.0, [1.0]
    for index in range(STEPS):
        share = (grid[index] - grid[index + 1]) * now / grid[index]
        now = 0.0 if index == STEPS - 1 else now - fraction[index] * share
        expected.append(now)
    np.testing.assert_allclose(adjusted_grid(grid, fraction), expected, rtol=1e-5)
    # Entries with times of their own move by themselves, and what is given stays.
    plan = np.stack([grid, 0 * grid], axis=1)
    np.testing.assert_allclose(adjusted_grid(plan, fraction), np.stack([expected, 0 * grid], axis=1), rtol=1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_corrected_error_is_centred_uncorrelated_and_never_larger(per_channel):
    (computed, forecast), output = reused_at(0.2), recorded()[0].output
    found = jax.jit(error_regression, static_argnums=3)(forecast, output, computed, per_channel)
    assert found.slope.shape == (STEPS, *SHAPE)[: 1 + per_channel]
    error = np.float64(forecast - output)
    wide = (Ellipsis,) if per_channel else (Ellipsis, None)
    slope, bias = (np.asarray(leaf, np.float64)[:, None][wide] for leaf in found)
    rest = error - (slope * np.asarray(forecast, np.float64) + bias)
    axes = (1,) if per_channel else (1, 2)
    reused = ~np.asarray(computed)
    assert np.abs(rest.mean(axes))[reused].max() < 1e-5
    assert np.abs((rest * np.asarray(forecast)).mean(axes))[reused].max() < 1e-5
    assert ((rest**2).mean(axes) <= (error**2).mean(axes) + 1e-6)[reused].all()
    assert (rest**2).mean(axes)[reused].sum() < 0.9 * (error**2).mean(axes)[reused].sum()


def test_the_logistic_fit_of_the_publication_is_the_regression_once_linearised():
    """K = 4 Cov / Var, B = 4 (mean e - 1/2) - K mean v; e ~ K v / 4 + B / 4 + 1/2."""
    (computed, forecast), output = reused_at(0.2), recorded()[0].output
    found = jax.jit(error_regression)(forecast, output, computed)
    index = int(np.flatnonzero(~np.asarray(computed))[0])
    v, e = (np.asarray(a[index], np.float64).ravel() for a in (forecast, forecast - output))
    big_k = 4 * np.cov(v, e, bias=True)[0, 1] / v.var()
    big_b = 4 * (e.mean() - 0.5) - big_k * v.mean()
    np.testing.assert_allclose(found.slope[index], big_k / 4, rtol=1e-4)
    np.testing.assert_allclose(found.bias[index], big_b / 4 + 0.5, rtol=1e-3, atol=1e-6)


def test_the_first_reuse_of_an_output_stands_still_by_its_change_and_not_by_its_size():
    output, computed = recorded()[0].output, np.arange(STEPS) % 3 != 1
    forecast = replayed(output, computed)
    fractions = jax.jit(step_fractions, static_argnums=3)
    change = np.asarray(fractions(forecast, output, computed, "change"))
    np.testing.assert_allclose(change[1:-1:3], 0.0, atol=1e-6)
    assert bool((change[computed] == 1).all())
    assert bool((np.asarray(fractions(forecast, output, computed, "output"))[1:-1:3] > 0.3).all())
    with pytest.raises(InvalidInput, match="distance"):
        step_fractions(forecast, output, computed, "norm")


def test_calibration_runs_on_any_solver_process_forecaster_and_mesh():
    vp = processes.vp_linear(100)
    exact = denoisers.analytic(vp)
    grid = GRID
    runs = jax.jit(
        lambda params: record_outputs(jax.random.key(0), exact, params, solvers.ddim(), grid, shape=(16, *SHAPE))
    )(mixture())
    found = calibrate(runs, grid, vp, 0.2, per_channel=True, valid_for={"solver": "ddim"})
    assert found.valid_for["prediction"] == "epsilon"
    denoiser, moved = ertacache(exact, found, grid, {"solver": "ddim"})
    assert bool((moved != grid).any())
    index, evaluations = jnp.arange(8), float(found.computed.sum())
    assert evaluations < STEPS
    for solver in (solvers.ddim(), solvers.ddpm(), solvers.dpm_solver_pp()):
        one, eight = (
            make_sampler(denoiser, solver, shape=SHAPE, mesh=mesh, save_every=4)(
                jax.random.key(3), mixture(), moved, index=index
            )
            for mesh in (None, make_mesh(data=8))
        )
        np.testing.assert_allclose(one.x, eight.x, atol=1e-4)
        assert one.trace.shape == (3, 8, *SHAPE)
        assert float(one.cost.evaluations) == float(eight.cost.evaluations) == evaluations
    # A better forecast is reused at more steps of the same threshold.
    kept = runs.output
    assert int(offline_schedule(kept, 0.05, taylor(1)).sum()) < int(offline_schedule(kept, 0.05).sum())


def test_a_calibration_is_saved_and_tells_what_it_is_not_valid_for(tmp_path):
    found = calibrate(recorded()[0], GRID, FLOW, 0.2, valid_for={"solver": "euler", "guidance": 3.0})
    save_calibration(tmp_path / "calibration.json", found)
    read = load_calibration(tmp_path / "calibration.json")
    assert read.valid_for == found.valid_for
    chex.assert_trees_all_equal(read[:4], found[:4])
    told = {"solver": "euler", "guidance": 3.0}
    ertacache(EXACT, read, GRID, told)
    with pytest.raises(InvalidInput, match=r"guidance of the run is 5.0, but the calibration is valid for 3.0 only"):
        ertacache(EXACT, read, GRID, told | {"guidance": 5.0})
    with pytest.raises(InvalidInput, match="solver of the run is None"):
        ertacache(EXACT, read, GRID, {"guidance": 3.0})
    with pytest.raises(InvalidInput, match=r"another grid \(6 steps\)"):
        ertacache(EXACT, read, GRID[::2], told)
    with pytest.raises(InvalidInput, match="prediction of the run is 'epsilon'"):
        ertacache(denoisers.analytic(processes.vp_linear(100)), read, GRID, told)
    denoiser, grid = ertacache(EXACT, read, GRID, told)
    with pytest.raises(InvalidInput, match="shape of the run"):
        sample(jax.random.key(0), denoiser, mixture(), solvers.ddim(), grid, shape=(4, 3))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InvalidInput, match="is not a calibration"):
        load_calibration(tmp_path / "other.json")


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(InvalidInput, match="infinite"):
        adjusted_grid(GRID, jnp.ones(STEPS), FLOW)
    with pytest.raises(InvalidInput, match="one grid"):
        adjusted_grid({"a": GRID}, jnp.ones(STEPS))
    joint = denoisers.analytic(processes.JointProcess({"a": FLOW}))
    with pytest.raises(InvalidInput, match="joint data"):
        record_outputs(jax.random.key(0), joint, None, solvers.ddim(), GRID)
