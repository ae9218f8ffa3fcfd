"""Runs that skip steps have derivatives, also where nothing changes: decisions have none, forecasts are finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import acceleration, denoisers, processes, solvers
from diffusion_jax.acceleration import calibration
from diffusion_jax.acceleration.modes import dmd
from diffusion_jax.errors import InvalidInput
from diffusion_jax.models import Staged
from diffusion_jax.sampling import sample
from diffusion_jax.typing import Network

FLOW = processes.rectified_flow(time="t")
GRID = jnp.asarray(np.linspace(1.0, 0.0, 9, dtype=np.float32))
X = jnp.zeros((2, 4, 4, 1)).at[1].set(jnp.asarray(np.random.default_rng(0).standard_normal((4, 4, 1)), jnp.float32))
COND = {"label": jnp.array([0, 1])}
ZERO = {"slope": jnp.zeros(()), "said": jnp.zeros(())}


def said(params, x):
    return params["slope"] * x + params["said"]


NETWORK = Network(lambda *_: ZERO, lambda params, x, t, cond=None, train=False, key=None: (said(params, x), {}))
STAGES = Staged(
    lambda params, x, t, cond=None: said(params, x),
    lambda params, h, x, t, cond=None: jnp.tanh(h),
    lambda params, z, x, t, cond=None: (z, {}),
    None,
)
PLAIN = denoisers.denoiser(NETWORK, FLOW)
EVERY = acceleration.every(2, 4)
FORECASTERS = {
    "reuse": acceleration.reuse(),
    "taylor": acceleration.taylor(2),
    "newton": acceleration.newton(2),
    "hermite": acceleration.hermite(2),
    "foca": acceleration.foca(),
    "dmd": dmd(4),
}
RUNS = {name: acceleration.cached_outputs(PLAIN, EVERY, forecaster) for name, forecaster in FORECASTERS.items()} | {
    "residual": acceleration.cached_outputs(PLAIN, EVERY, acceleration.newton(1), residual=True, along="log_snr"),
    "spectral": acceleration.sea_cached(PLAIN, 0.3),
    "gated": acceleration.gated(STAGES, FLOW, 0.1, probe=acceleration.taylor(1), last=acceleration.taylor(1)),
    "gated, by sample": acceleration.gated(
        STAGES, FLOW, 0.1, probe=acceleration.reuse(), last=acceleration.reuse(), relative_to="expected", scope="sample"
    ),
    "guide": acceleration.guided_with_reuse(PLAIN, 3.0, {"label": 2}, refresh=EVERY, rescale=0.7),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_skips_steps_has_derivatives_where_nothing_changes(name):
    """Of a network that says nothing, whose every relative change is 0 / 0, and of one that says something."""

    @jax.jit
    def slopes(params, x, grid):
        def end(params, x, grid):
            return sample(jax.random.key(0), RUNS[name], params, solvers.ddim(), grid, x_init=x, cond=COND).x

        values, backwards = jax.vjp(end, params, x, grid)
        return values, backwards(jnp.ones_like(values))

    for params in (ZERO, {"slope": jnp.float32(0.3), "said": jnp.float32(0.1)}):
        for leaf in jax.tree.leaves(slopes(params, X, GRID)):
            assert np.isfinite(leaf).all()


def test_the_derivative_of_a_forecast_by_modes_is_that_of_its_differences():
    """Values on a line have equal modes, where the root of their difference alone has an infinite derivative."""
    forecaster = dmd(4)

    def forecast(bend):
        table = acceleration.forecasting.init(forecaster, jnp.zeros((1, 3)))
        for i in range(4):
            value = jnp.ones((1, 3)) * (1.0 + 0.1 * i) + bend * 0.01 * i**2
            table = acceleration.forecasting.update(forecaster, table, value, float(i))
        return acceleration.forecasting.predict(forecaster, table, 5.0)[0, 0]

    step, both = 1e-2, jax.jit(jax.value_and_grad(forecast))
    expected = (both(step)[0] - both(-step)[0]) / (2 * step)
    np.testing.assert_allclose(both(0.0), [1.5, expected], rtol=0.05)


def test_a_calibrated_grid_and_influence_have_derivatives_at_the_ends():
    vp = processes.vp_cosine(20)

    @jax.jit
    def slopes(fraction):
        def moved(grid, fraction):
            return calibration.adjusted_grid(grid, fraction, vp), calibration.endpoint_influence(vp, grid, 0.5)

        values, backwards = jax.vjp(moved, GRID, fraction)
        return values, backwards(jax.tree.map(jnp.ones_like, values))

    for fraction in (jnp.ones(8), jnp.linspace(0.0, 1.0, 8)):
        for leaf in jax.tree.leaves(slopes(fraction)):
            assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: acceleration.sea_cached(PLAIN, np.nan),
        lambda: acceleration.sea_cached(PLAIN, 0.1, exponent=np.nan),
        lambda: acceleration.gated(STAGES, FLOW, np.nan, probe=acceleration.reuse(), last=acceleration.reuse()),
        lambda: acceleration.hermite(1, np.nan),
        lambda: acceleration.foca(np.nan),
        lambda: dmd(4, np.nan),
        lambda: acceleration.endpoint_influence(FLOW, GRID, np.nan),
    ],
)
def test_what_is_not_a_number_is_refused(make):
    with pytest.raises(InvalidInput, match="nan"):
        make()
