"""What each step contributes: an identity for any network, shares of known schedules, draws and weights made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import processes, timesteps
from diffusion_jax.config import build, call
from diffusion_jax.errors import InvalidInput

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def run(process):
    """`(grid, answers) -> x_0` of deterministic DDIM from ones, and the eps that the answers mean at each step."""

    def step(x, this):
        t, s, output = this
        said = process.predict(output, x, t)
        return process.marginal(said.x0, said.eps, s), said.eps

    return jax.jit(lambda grid, answers: jax.lax.scan(step, jnp.ones(3), (grid[:-1], grid[1:], answers)))


def test_a_run_is_its_noise_and_the_sum_of_what_its_steps_contribute_whatever_the_network_says():
    with jax.enable_x64(True):
        grids = [timesteps.padded(timesteps.linspace(n, num_train_steps=1000), 50) for n in (1, 10, 50)]
        answers, noise = RNG.standard_normal((50, 3)), processes.vp_linear(prediction="epsilon")
        sums = [np.asarray(timesteps.contributions(noise, grid)) for grid in grids]
        for prediction in ("epsilon", "v"):
            ran = run(processes.vp_linear(prediction=prediction))
            for grid, c in zip(grids, sums, strict=True):
                x, told = ran(grid, answers)
                expected = 1.0 / float(noise.alpha(grid[0])) + c @ told
                np.testing.assert_allclose(x, expected, rtol=1e-12, atol=1e-12 * abs(c).sum())
        # An Euler step of a flow adds its velocity.
        flow = processes.rectified_flow()
        ran = run(flow)
        for grid in grids:
            c = np.asarray(timesteps.contributions(flow, grid))
            np.testing.assert_allclose(ran(grid, answers)[0], 1.0 + c @ answers, atol=1e-12)
            np.testing.assert_allclose(c, np.diff(grid), atol=1e-12)


def test_an_error_of_one_answer_arrives_with_the_factor_of_its_step():
    # The eps of later steps stay what they are, as the errors of different steps are independent.
    with jax.enable_x64(True):
        grid = timesteps.from_array([0.9, 0.6, 0.35, 0.1, 0.0])
        ending = processes.residual_diffusion(processes.cosine(), end=0.95)
        ending, _ = ending.given({"endpoint": jnp.full(4, 0.2)})
        for process in (ending, *(processes.cosine(prediction=name) for name in ("epsilon", "v", "x0", "edm"))):

            def after(error, t, s, process=process):
                said = process.predict(0.7 + error, jnp.full(4, 0.3), t)
                return process.marginal(said.x0, said.eps, s) / process.alpha(s)

            zero = jnp.zeros(4)
            _, moved = jax.jit(lambda e, f=after: jax.jvp(lambda e: f(e, grid[:-1], grid[1:]), (e,), (e + 1.0,)))(zero)
            np.testing.assert_allclose(moved, timesteps.contributions(process, grid), rtol=1e-12)


def test_noise_prediction_contributes_all_the_noise_and_most_of_it_early():
    for make, noise, absolute, square in (
        (processes.vp_scaled_linear, 14.61, 0.65, 0.91),
        (processes.vp_linear, None, 0.84, 0.98),
    ):
        process = make(prediction="epsilon")
        c = -np.asarray(timesteps.contributions(process, timesteps.trailing(1000)), np.float64)
        total = float(timesteps.noise_ratio(process, 1.0))
        np.testing.assert_allclose(c.sum(), total, rtol=1e-4)
        assert noise is None or total == pytest.approx(noise, abs=0.01)
        assert c[:200].sum() / c.sum() == pytest.approx(absolute, abs=0.01)
        assert np.square(c[:200]).sum() / np.square(c).sum() == pytest.approx(square, abs=0.01)
    v = np.square(
        np.asarray(timesteps.contributions(processes.vp_scaled_linear(prediction="v"), timesteps.trailing(1000)))
    )
    assert v[:200].sum() / v.sum() == pytest.approx(0.40, abs=0.01)
    assert v[:500].sum() / v.sum() == pytest.approx(0.69, abs=0.01)


def test_drawing_by_weights_is_weighing_uniform_times_by_them():
    grid, weights = timesteps.linspace(5), np.asarray([4.0, 0.0, 3.0, 1.0, 2.0])
    rows, spread = 1000, "low_discrepancy"
    t, ones = timesteps.by_weights(grid, weights, 0.0, spread).draw((), KEY, (rows,))
    weight = timesteps.grid_weight(grid, weights)
    np.testing.assert_array_equal(ones, 1.0)
    # The expectation of any gradient, here of (p - f(t))^2 at p = 0.5.
    slope = jax.vmap(jax.grad(lambda p, t: jnp.square(p - jnp.cos(3 * t))), (None, 0))
    uniform = np.asarray(grid[:-1])
    np.testing.assert_allclose(slope(0.5, t).mean(), (weight(None, uniform) * slope(0.5, uniform)).mean(), atol=5e-3)
    np.testing.assert_allclose(np.asarray(weight(None, uniform)).mean(), 1.0)
    for share, expected in ((0.0, weights / 10), (0.5, weights / 20 + 0.1), (1.0, np.full(5, 0.2))):
        t, _ = timesteps.by_weights(grid, weights, share, spread).draw((), KEY, (rows,))
        found = (np.asarray(t)[:, None] == uniform).mean(axis=0)
        np.testing.assert_allclose(found, expected, atol=2 / rows)


def test_contribution_aware_draws_are_weights_of_squares_and_configurable():
    process, grid = processes.vp_linear(prediction="v"), timesteps.linspace(10)
    made = build(call("timesteps.by_contribution", process=call("processes.vp_linear", prediction="v"),
                      grid=call("timesteps.linspace", steps=10), uniform_share=0.2))  # fmt: skip
    squares = np.square(timesteps.contributions(process, grid))
    for spread in ("independent", "low_discrepancy"):
        made = timesteps.by_contribution(process, grid, 0.2, spread) if spread != "independent" else made
        other = timesteps.by_weights(grid, squares, 0.2, spread)
        np.testing.assert_array_equal(made.draw((), KEY, (64,))[0], other.draw((), KEY, (64,))[0])


def test_a_step_that_stands_still_contributes_nothing():
    padded = timesteps.padded(timesteps.linspace(3), 5)
    for prediction in ("epsilon", "v", "x0", "velocity"):
        c = np.asarray(timesteps.contributions(processes.vp_linear(prediction=prediction), padded))
        assert np.isfinite(c).all() and not c[3:].any() and c[:3].all()


def test_contributions_of_a_measure_follow_its_gains():
    times = np.linspace(1.0, 0.1, 10)
    # The gain of a step at t is t - 0.3 where positive: early steps gain most, the last ones lose.
    quality = np.concatenate([[0.0], np.cumsum(times[:-1] - 0.3)])
    found = timesteps.measured_contributions(times, quality)
    expected = np.maximum(times - 0.3, 0.0)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-12)
    at = np.asarray([0.9, 0.2])
    several = [quality + 0.2 * times, quality - 0.2 * times]
    np.testing.assert_allclose(timesteps.measured_contributions(times, several, at), [1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(timesteps.measured_contributions(times, several), found, atol=1e-12)
    np.testing.assert_allclose(timesteps.measured_contributions(times, np.zeros(10)), 0.1)


def test_what_no_draw_can_be_made_of_is_refused():
    grid = timesteps.linspace(3)
    for weights in ([1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, np.inf, 1.0]):
        with pytest.raises(InvalidInput, match=r"weights is .*were expected"):
            timesteps.by_weights(grid, weights)
    with pytest.raises(InvalidInput, match="one for each step of the grid"):
        timesteps.grid_weight(grid, [1.0, 2.0])
    with pytest.raises(InvalidInput, match="uniform_share"):
        timesteps.by_weights(grid, [1.0, 2.0, 3.0], 1.5)
    with pytest.raises(InvalidInput, match="finite ones"):
        # alpha is 0 at t = 1, and noise prediction there says nothing of the data.
        timesteps.by_contribution(processes.cosine(prediction="epsilon"), grid)
    with pytest.raises(InvalidInput, match="at least 3 steps"):
        timesteps.measured_contributions([1.0, 0.5], [0.0, 1.0])
    for wrong in (([1.0, 0.5, 0.5], [0.0, 1.0, 2.0]), ([1.0, 0.5, 0.2], [0.0, np.nan, 2.0])):
        with pytest.raises(InvalidInput, match="times that fall, finite qualities"):
            timesteps.measured_contributions(*wrong)
