"""Forecasts by modes: exact for what the last values determine, a straight line where they determine nothing, and
every sample by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import denoisers, models, processes, solvers, timesteps
from diffusion_jax.acceleration import cached_features, cached_outputs, dmd, every, forecasting, taylor
from diffusion_jax.costs import carry_bytes
from diffusion_jax.errors import InvalidInput
from diffusion_jax.sampling import sample
from tests.models.shared import drawn_params

RNG = np.random.default_rng(0)
SHAPES = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)


def decaying(s):
    """Two samples with two real modes each, of their own rates."""
    rates = np.array([[0.97, 0.8], [1.02, 0.9]])
    return sum(SHAPES[mode, :2] * (rates[:, mode] ** s)[:, None, None] for mode in range(2)).astype(np.float32)


def turning(s):
    """A damped rotation: two turning modes."""
    return (0.95**s * (np.cos(0.3 * s) * SHAPES[0] + np.sin(0.3 * s) * SHAPES[1])).astype(np.float32)


def line(s):
    return (SHAPES[0] + 0.1 * s * SHAPES[1]).astype(np.float32)


def constant(s):
    return SHAPES[0]


def known(rule, curve, times, axes=0):
    table = forecasting.init(rule, curve(0), axes)
    for at in times:
        table = forecasting.update(rule, table, jnp.asarray(curve(at)), at, axes)
    return table


@pytest.mark.parametrize("curve", [decaying, turning, line, constant])
@pytest.mark.parametrize("history", [3, 4, 6])
def test_two_modes_lines_and_constants_are_exact_at_any_distance(curve, history):
    rule = dmd(history, ridge=1e-7)
    for times in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 5, 8, 11, 14][-max(3, history) :]):
        table = known(rule, curve, times)
        for ahead in (1, 2, 3):
            found = np.asarray(forecasting.predict(rule, table, times[-1] + ahead))
            np.testing.assert_allclose(found, curve(times[-1] + ahead), atol=5e-3)


def test_a_straight_line_is_not_exact_there():
    """The test above could fail."""
    for curve in (decaying, turning):
        table = known(taylor(1), curve, [0, 3, 6, 9])
        assert np.abs(np.asarray(forecasting.predict(taylor(1), table, 12)) - curve(12)).max() > 0.05


def test_unequal_spans_and_too_few_values_leave_the_straight_line():
    for times in ([0], [0, 3], [0, 1, 4]):
        found = forecasting.predict(dmd(), known(dmd(), turning, times), times[-1] + 2)
        expected = forecasting.predict(taylor(1), known(taylor(1), turning, times), times[-1] + 2)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    # A change of the span is where the memory ends: what lies before it says nothing.
    table = known(dmd(), lambda s: turning(s) if s >= 4 else constant(s), [1, 4, 6, 8])
    np.testing.assert_allclose(forecasting.predict(dmd(), table, 10), turning(10), atol=5e-3)


def test_each_sample_and_each_layer_has_modes_of_its_own():
    """Each is forecast as it is alone; with the depth in front of the places, each layer of each sample is."""
    rule, times, layers = dmd(), [0, 2, 4, 6], (decaying, lambda s: turning(s)[:2])

    def stacked(s):
        return np.stack([layer(s) for layer in layers])

    whole = np.asarray(forecasting.predict(rule, known(rule, stacked, times, axes=1), 9, axes=1))
    assert whole.shape == (2, 2, 4, 5)
    for i, layer in enumerate(layers):
        for b in range(2):
            alone = forecasting.predict(rule, known(rule, lambda s, b=b, layer=layer: layer(s)[b : b + 1], times), 9)
            np.testing.assert_allclose(whole[i, b], alone[0], atol=1e-5)


@pytest.fixture(scope="module")
def model():
    network = models.dit(width=16, depth=2, heads=2, conditions=(models.label(3),))
    x, cond = jnp.zeros((2, 4, 4, 1)), {"label": jnp.array([0, 2])}
    return network, drawn_params(network, x, jnp.zeros(2), cond), cond


def test_features_and_outputs_are_forecast_by_modes_in_whole_runs(model):
    network, params, cond = model
    process = processes.vp_linear()
    plain = denoisers.denoiser(network, process)
    cheap = {
        "features": cached_features(network, process, dmd(), every(3, 4)),
        "outputs": cached_outputs(plain, every(3, 4), dmd()),
    }

    def run(denoiser, rows):
        noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))[rows]
        own = {"label": cond["label"][rows]}
        shape, key, grid = noise.shape, jax.random.key(1), timesteps.linspace(16)
        return jax.jit(
            lambda params: sample(key, denoiser, params, solvers.ddim(), grid, shape=shape, cond=own, x_init=noise)
        )(params)

    full = run(plain, slice(0, 2)).x
    for made in cheap.values():
        both, first = run(made, slice(0, 2)), run(made, slice(0, 1))
        assert float(both.cost.evaluations) == 8 and float(both.cost.compute) < 16
        assert float(jnp.abs(both.x - full).max()) < 0.1 * float(jnp.abs(full).max())
        np.testing.assert_allclose(both.x[:1], first.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("history", [3, 4, 6])
def test_as_many_outputs_are_held_as_are_fitted(history):
    x = jnp.zeros((2, 4, 4, 1))
    held = carry_bytes(cached_outputs(denoisers.analytic(processes.vp_linear()), every(3), dmd(history)), None, x)
    assert history * x.nbytes <= held < (history + 3) * x.nbytes


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(InvalidInput, match="history"):
        dmd(2)
    with pytest.raises(InvalidInput, match="ridge"):
        dmd(3, ridge=0.0)
