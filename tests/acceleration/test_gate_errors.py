"""What gates saw along a run, whether it tells of the last block, and thresholds for a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, processes, solvers, timesteps
from diffusion_jax.acceleration import (
    cg_taylor,
    either,
    every,
    first_and_last,
    forecast_errors,
    gate_agreement,
    gated,
    record_gate,
    taylor,
    threshold_for,
)
from diffusion_jax.errors import InvalidInput

PROCESS, GRID, KEY = processes.vp_linear(time="t"), timesteps.linspace(10, 1000), jax.random.key(0)
MIXTURE = denoisers.gaussian_mixture(jax.random.normal(jax.random.key(1), (3, 4)), 0.2, weights=[1.0, 2.0, 3.0])
STAGES, ORDERS = denoisers.analytic_stages(PROCESS), {"probe": taylor(1), "last": taylor(1)}


@pytest.fixture(scope="module")
def run():
    """One program for all thresholds and intervals: the gate, and the clock that computes each so many steps."""

    @jax.jit
    def traced(threshold, interval):
        refresh = either(every(interval, 2), first_and_last(2))
        denoiser = gated(STAGES, PROCESS, threshold, refresh=refresh, **ORDERS)
        return record_gate(KEY, denoiser, MIXTURE, solvers.ddim(), GRID, shape=(8, 4))

    return lambda threshold, interval=11: traced(threshold, jnp.int32(interval))


@pytest.fixture(scope="module")
def replay():
    return jax.jit(lambda trace: forecast_errors(STAGES, PROCESS, MIXTURE, trace, GRID, **ORDERS))


def test_a_clock_is_a_gate_without_bound_and_what_it_asked_is_recorded(run):
    clock = run(jnp.inf, 2)
    assert clock.full.tolist() == [True, True, False, True, False, True, False, True, False, True]
    assert float(clock.samples.cost.evaluations) == clock.full.sum() == 6
    assert clock.x.shape == (10, 8, 4) and clock.error.shape == (10,)


def test_the_threshold_of_a_budget_is_met_from_below_and_no_lower_one_meets_it(run):
    def asked(threshold):
        return float(run(threshold).samples.cost.evaluations)

    found = threshold_for(asked, 6)
    assert 3 <= asked(found) <= 6 < asked(0.98 * found)
    assert threshold_for(lambda at: 1 / at, 2.5) == pytest.approx(0.4, rel=1e-3)
    assert threshold_for(lambda at: 0.0, 1.0, low=0.1) == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(InvalidInput, match="even the threshold 2 costs 3"):
        threshold_for(lambda at: 3.0, 2.0)
    with pytest.raises(InvalidInput, match="0 < low < high"):
        threshold_for(asked, 6, low=0.0)


def test_the_replayed_errors_are_what_the_gate_saw_and_those_of_computed_features(run, replay):
    gate = run(0.2)
    assert 3 < gate.full.sum() < 10
    probe, last = replay(gate)
    np.testing.assert_allclose(probe, gate.error, atol=1e-5)
    assert np.isinf(last[0]) and np.isfinite(last[1:]).all() and (last[1:] > 0).all()
    # The second step's forecast is the first value, both of which a plain run knows.
    h, z = (
        [np.asarray(stage(gate.x[i], jnp.full(8, GRID[i]))) for i in (0, 1)]
        for stage in (
            lambda x, t: STAGES.head(MIXTURE, x, t),
            lambda x, t: STAGES.body(MIXTURE, STAGES.head(MIXTURE, x, t), x, t),
        )
    )
    for found, (first, second) in zip((probe, last), (h, z)):
        np.testing.assert_allclose(found[1], np.abs(second - first).mean() / np.abs(second).mean(), rtol=1e-4)


def test_agreement_is_the_rank_correlation_over_skipped_steps_alone():
    full = np.array([True, False, False, False, False])
    rising = np.array([9.0, 1.0, 2.0, 3.0, 4.0])
    assert gate_agreement((rising, np.exp(rising)), full) == pytest.approx(1.0)
    assert gate_agreement((rising, -rising), full) == pytest.approx(-1.0)
    assert gate_agreement((rising, rising), ~full) == 0.0 == gate_agreement((rising, np.ones(5)), full)


def test_runs_without_one_decision_a_step_are_refused(run):
    with pytest.raises(InvalidInput, match="gate_full"):
        record_gate(KEY, denoisers.analytic(PROCESS), MIXTURE, solvers.ddim(), GRID, shape=(8, 4))
    by_sample = cg_taylor(STAGES, PROCESS, 0.2, scope="sample")
    trace = jax.eval_shape(lambda: record_gate(KEY, by_sample, MIXTURE, solvers.ddim(), GRID, shape=(8, 4)))
    assert trace.full.shape == (10, 8)
    with pytest.raises(InvalidInput, match="one decision a step"):
        forecast_errors(STAGES, PROCESS, MIXTURE, trace, GRID, **ORDERS)
